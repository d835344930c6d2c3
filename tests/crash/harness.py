"""Processes that are killed: forked from one that has imported everything, with SIGKILL at a chosen moment.

Production code knows nothing of this: the child replaces `os.replace`, `os.fsync` and the like by ones that count.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

Work = Callable[[], Any]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(seconds: float) -> None:
    """Be killed from outside after a while, whatever is being done then."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(victim, signal.SIGKILL)
        os._exit(0)


class Counted:
    """Puts a killer before or after the n-th call of a function of a module or class."""

    def __init__(self, owner: Any, name: str, nth: int, *, after: bool = False, delay: float | None = None) -> None:
        self.left, self.after, self.delay, self.made = nth, after, delay, getattr(owner, name)
        setattr(owner, name, self.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and self.delay is not None:
            die_in(self.delay)
        if self.left == 0 and self.delay is None and not self.after:
            die()
        found = self.made(*args, **kwargs)
        if self.left == 0 and self.delay is None:
            die()
        return found


@contextmanager
def forked(work: Work, arm: Work | None = None, **environment: str) -> Iterator[int]:
    """A child that arms its killer and works; its exit code is 0 when it came to the end."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            os.environ.update(environment)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if not os.environ.get("CRASH_LOUD"):
                os.dup2(null, 2)
            if arm is not None:
                arm()
            work()
            code = 0
        except BaseException:
            with Path(os.environ["CRASH_LOG"]).open("a") as log:
                log.write(traceback.format_exc())
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        for group in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                group(pid, signal.SIGKILL)


def ended(pid: int, limit: float = 120.0) -> int:
    """A child's exit code, minus the signal that killed it; waits without spinning."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    raise AssertionError("it hangs")


def run_one(work: Work, arm: Work | None = None) -> int:
    with forked(work, arm) as pid:
        return ended(pid)


def run_two(work: Work, arm: Work | None, victim: int) -> int:
    """Two processes of one training; when one ends badly, the other is killed too, as torchrun does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])

    def place(rank: int) -> dict[str, str]:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        return {k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    with (
        forked(work, arm if victim == 0 else None, **place(0)) as first,
        forked(work, arm if victim == 1 else None, **place(1)) as second,
    ):
        codes: dict[int, int] = {}
        end = time.monotonic() + 180
        while len(codes) < 2 and time.monotonic() < end:
            for pid in {first, second} - codes.keys():
                found_pid, status = os.waitpid(pid, os.WNOHANG)
                if found_pid:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if len(codes) == 1 and next(iter(codes.values())):
                for pid in {first, second} - codes.keys():
                    os.killpg(pid, signal.SIGKILL)
                    codes[pid] = ended(pid) or -9
            time.sleep(0.02)
        assert len(codes) == 2, "it hangs"
        return codes[(first, second)[victim]] or next((c for c in codes.values() if c), 0)


def half_written(root: Path) -> list[str]:
    """Files under their final names that are not whole. Logs grow by lines: only their last may be cut off."""
    wrong = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        inner = path.relative_to(root)
        if any(part.startswith(".") for part in inner.parts) or "tensorboard" in inner.parts:
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                for line in path.read_text().split("\n")[:-1]:
                    json.loads(line)
            elif path.suffix == ".yaml":
                assert isinstance(yaml.safe_load(path.read_text()), dict)
            elif path.suffix == ".npy":
                np.load(path, allow_pickle=False)
            elif path.suffix == ".parquet":
                from coatkit.data.mixture import MixtureRows

                rows = MixtureRows(path)
                _ = [rows[i] for i in range(len(rows))]
        except Exception as error:
            wrong.append(f"{inner}: {type(error).__name__}: {error}")
    for folder in root.rglob("step-*"):
        if not folder.parent.name.startswith(".") and {p.name for p in folder.iterdir()} != {
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
        }:
            wrong.append(f"{folder.relative_to(root)}: holds {sorted(p.name for p in folder.iterdir())}")
    return wrong


def differing(ours: Path, theirs: Path) -> list[str]:
    """Tensors of the last checkpoint, and metrics, that are not equal to the bit."""
    last = [sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (ours, theirs)]
    wrong = [] if last[0].name == last[1].name else [f"{last[0].name} is not {last[1].name}"]
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(path / file) for path in last)
        wrong += [f"{file}: {name}" for name in a.keys() | b.keys() if not same(a.get(name), b.get(name))]
    lines = []
    for folder in (ours, theirs):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if k != "seconds"} for line in found])
    return wrong + ([] if lines[0] == lines[1] else ["metrics.jsonl"])


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def moments_of_training(draw: random.Random) -> tuple[str, Work]:
    """A moment drawn from the kinds there are: its name, and what arms it in the child."""
    kind = draw.choice(["step", "checkpoint", "stage", "log line", "start or resume", "any time"])
    nth, after, delay = draw.randint(1, 3), draw.random() < 0.5, draw.uniform(0, 0.15)

    def arm() -> None:
        from coatkit import checkpoint, trainer

        if kind == "step":
            owner, name = draw.choice([(torch.optim.AdamW, "step"), (trainer, "_accumulate"), (trainer, "_fetch")])
            Counted(owner, name, nth, after=after, delay=delay if draw.random() < 0.5 else None)
        elif kind == "checkpoint":
            saved = checkpoint.save
            how = draw.choice(["fsync", "replace", "save_file", "timed", "rmtree"])

            def save(*args: Any) -> Any:
                if how == "timed":
                    die_in(draw.uniform(0, 0.04))
                elif how == "save_file":
                    Counted(checkpoint, "save_file", draw.randint(1, 2), after=after)
                elif how == "rmtree":
                    # The last entry but some of an old checkpoint that is being removed.
                    Counted(os, "unlink", draw.randint(1, 3), after=after)
                else:
                    Counted(os, how, draw.randint(1, 5 if how == "fsync" else 2), after=after)
                return saved(*args)

            calls = [nth]

            def wait(*args: Any) -> Any:
                calls[0] -= 1
                return save(*args) if calls[0] <= 0 else saved(*args)

            checkpoint.save = wait
        elif kind == "stage":
            Counted(trainer, "group_parameters", 2 + nth, after=after, delay=delay if draw.random() < 0.5 else None)
        elif kind == "log line":
            from coatkit.journal import Journal

            written, calls = Journal._append, [nth]

            def cut(journal: Any, file: Path, line: dict[str, Any]) -> None:
                calls[0] -= 1
                if calls[0] > 0:
                    return written(journal, file, line)
                text = json.dumps(line)
                with file.open("a") as stream:
                    stream.write(text[: draw.randint(0, len(text))])
                die()

            Journal._append = cut
        elif kind == "start or resume":
            Counted(os, draw.choice(["replace", "fsync"]), nth, after=after)
        else:
            die_in(draw.uniform(0.2, 4.0))

    return kind, arm
