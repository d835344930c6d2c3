"""What a run does when something around it breaks: one process holds the folder, a damaged checkpoint is passed over,
a moved project is followed, and a full disk or a killed data worker is told in words, once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from coatkit import checkpoint
from coatkit.errors import RunError
from coatkit.files import file_sha256, write_atomic
from coatkit.run_folder import RunFolder

INTACT = "What was saved before is intact; continue with --resume when this is mended."
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a trainer to save and end."""
_REFUSALS = (OSError, RuntimeError, EOFError)
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable"),
    errno.ELOOP: "A link is not written through: put a file in its place, or remove it",
}


class Hold:
    """Keeps a run folder for one trainer, and turns what the machine refuses into words; a context manager.

    The lock ends with the process that has it, however that ends, and forked data workers do not inherit it.

    Args:
        folder: The run folder, which need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None

    def take(self) -> None:
        """Hold the folder from now on, making it if need be; does nothing when it is held already.

        Raises:
            RunError: If another process trains there, or the folder cannot be written.
        """
        import fcntl

        if self._file is not None:
            return
        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            remedy = f"{_REMEDIES.get(error.errno or 0, 'Mend that')}, or name another folder with --set output=..."
            raise RunError(f"{self.folder}: cannot be written: {error.strerror or error}.\n  {remedy}") from None
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.read(opened, 200).decode(errors="replace").strip()
            os.close(opened)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks: nothing to hold
            raise RunError(
                f"{self.folder}: another process trains here ({who or 'unknown'}).\n"
                "  Wait for it or stop it (its lock ends with it), or name another folder with --set output=..."
            ) from None
        self._file = opened
        os.ftruncate(opened, 0)
        os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)  # the file stays: removing it would let two hold one name
            self._file = None
        if isinstance(error, _REFUSALS) and (words := _in_words(error, self.folder, INTACT)):
            _bury_workers(error)
            raise RunError(words) from error


@contextmanager
def in_words(place: Path, intact: str) -> Iterator[None]:
    """Turns what the machine refuses into words: a full disk, too few descriptors, a data worker that was killed.

    Args:
        place: What is named where the machine names no file.
        intact: What is said of what was written before, and how to go on.

    Raises:
        RunError: With the place and the remedy.
    """
    try:
        yield
    except _REFUSALS as error:
        if words := _in_words(error, place, intact):
            _bury_workers(error)
            raise RunError(words) from error
        raise


def _bury_workers(error: BaseException) -> None:
    """Wait for data workers that ended: when the system tells torch of one, it raises in whatever code runs then, and
    that must not be code that comes after the run.
    """
    # A worker's pipes close before it counts as ended.
    patience = 5.0 if isinstance(error, ConnectionError | EOFError) else 0.0
    for _ in range(10):  # a signal that came meanwhile raises here
        try:
            while True:
                workers = {worker.sentinel: worker for worker in active_children()}
                if not workers or not (ended := wait(list(workers), patience)):
                    break
                for sentinel in ended:
                    workers[sentinel].join()  # type: ignore[index]
                patience = 0.2
        except RuntimeError:
            continue
        return


def _in_words(error: OSError | RuntimeError | EOFError, place: Path, intact: str) -> str | None:
    """What the machine refused, and the remedy; None for an error of another kind."""
    text = str(error)
    # Sent by a process whose table has room to one that has none, descriptors are lost, and that is all torch says.
    few = ("Too many open files", "items of ancillary data")
    if (isinstance(error, OSError) and error.errno == errno.EMFILE) or any(words in text for words in few):
        return f"{place}: too many open files. Raise the limit (ulimit -n 4096), or lower data.workers.\n  {intact}"
    if "/gloo/" in text or isinstance(error, torch.distributed.DistError):
        return f"another process of this run ended, or cannot be reached: its own words say why.\n  {text}\n  {intact}"
    # A killed worker shows itself as any of these: torch's own words come only once the system has reaped it.
    if "DataLoader worker" in text or isinstance(error, ConnectionError | EOFError):
        return (
            f"a data worker ended: {(text or 'its pipe closed').splitlines()[0]}\n"
            "  It may have been killed for memory; lower data.workers or the batch, or give it more memory and shared"
            f" memory. If it wrote of too many open files, raise the limit (ulimit -n 4096).\n  {intact}"
        )
    if isinstance(error, OSError) and error.errno is not None:
        remedy = f"{_REMEDIES[error.errno]}. " if error.errno in _REMEDIES else ""
        return f"{os.fsdecode(error.filename or place)}: {error.strerror or text}. {remedy}{intact}"
    return None


def start_worker(worker: int) -> None:
    """In a data worker: a signal to the process group must not end it while the trainer still saves, and what it cannot
    hand over has to end it, for the trainer would wait for that for ever.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(lambda error, item: _end_worker(error))  # type: ignore[attr-defined]
    sys.excepthook = lambda kind, error, trace: _end_worker(error)  # of the thread that hands over descriptors


def _end_worker(error: BaseException) -> None:
    print(f"a data worker cannot hand over its rows: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def say_it_once() -> None:
    """Print no traceback of what a run raises anyway; for the whole process, whose threads may outlast the run.

    TensorBoard's thread fails, and its error comes again where the run writes next. A loader of torch's that could not
    start fails once more when it is thrown away.
    """
    in_thread, ignored = threading.excepthook, sys.unraisablehook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            in_thread(args)

    def of_loader(args: sys.UnraisableHookArgs) -> None:
        if getattr(args.object, "__qualname__", "") != "_MultiProcessingDataLoaderIter.__del__":
            ignored(args)

    threading.excepthook, sys.unraisablehook = of_thread, of_loader


def newest_sound(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    Those are set aside as `damaged-step-NNNNNNNN`, for the run makes their steps again. What a killed process left of
    writing and removing is cleared away.

    Raises:
        RunError: If there are checkpoints and none is whole, or one is of another format.
    """
    for left in run.checkpoints.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    damaged: list[tuple[Path, str]] = []
    found = None
    for path in sorted(run.checkpoints.glob("step-*"), reverse=True):
        reason = _damage(path)
        if reason is None:
            found = path
            break
        damaged.append((path, reason))
    if damaged and found is None:
        raise RunError(
            "\n  ".join(reason for _, reason in damaged[:5])
            + f"\n  No checkpoint of this run is whole. Bring one back, or remove {run.checkpoints} to begin at step 0."
        )
    lines = []
    for path, reason in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        lines.append(f"{reason}; set aside as {aside.name}")
    if lines and found is not None:
        lines.append(f"going back to the checkpoint before: {found.name}")
    return found, lines


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its state, and by the headers and lengths of its files; None if nothing."""
    if not (path / "state.json").is_file():
        return f"{path}: has no state.json"
    try:
        checkpoint.load_position(path)
    except RunError as error:
        if "format" in str(error) and "damaged" not in str(error):
            raise
        return str(error)
    for name in ("model.safetensors", "optimizer.safetensors"):
        if not (path / name).is_file():
            return f"{path / name}: cannot be read: there is no such file"
        try:
            with safe_open(path / name, "pt") as opened:  # compares the header with the file's length
                opened.keys()
        except (OSError, SafetensorError) as error:
            return f"{path / name}: cannot be read: {error}"
    return None


def follow(run: RunFolder, here: Path) -> str | None:
    """Write the paths of a run anew whose project was moved to `here`; gives a line that says so.

    Contents are compared after this as always, by their digests, so only places may differ. The record keeps the digest
    of the spec as it was first written: answers of the model before training are known by it.
    """
    record = run.read_record()
    before = record.get("folder")
    if not isinstance(before, str) or before == str(here):
        return None
    if "spec_sha256" not in record:
        record["spec_sha256"] = file_sha256(run.spec)
        run.write_record(record)
    spec = _moved(run.read_spec(), before, str(here))
    write_atomic(run.spec, yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
    # Last: until it is there, the same is done again, and a path that was moved is not moved twice.
    write_atomic(run.record, json.dumps(_moved(record, before, str(here)), indent=1, ensure_ascii=False) + "\n")
    return f"the project was moved from {before}"


def _moved(value: Any, before: str, here: str) -> Any:
    if isinstance(value, dict):
        return {_moved(key, before, here): _moved(one, before, here) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, before, here) for one in value]
    if not isinstance(value, str) or (here.startswith(before + os.sep) and _under(value, here)):
        return value
    return here + value[len(before) :] if _under(value, before) else value


def _under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
