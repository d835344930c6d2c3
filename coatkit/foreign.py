"""An expert that runs in another interpreter, because what it needs cannot be installed beside coatkit.

The other interpreter gets this package alone on its path, and the expert's own (`coatkit.worker`); sounds and frames go
through a pair of pipes of their own, so that what packages print disturbs nothing. What they print is kept to be shown
when something fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from coatkit import worker
from coatkit.errors import AssetError, CoatkitError, PluginError
from coatkit.model import check_features
from coatkit.plugins import Component
from coatkit.protocols import AudioBatch, Features

_SHOWN_LINES = 12
_KEPT_BYTES = 1 << 16
_STEPS = {
    "import": "cannot be imported",
    "make": "cannot be made with {options}",
    "load": "cannot be loaded",
    "describe": "is not complete",
    "encode": "encode failed",
}


class ForeignExpert:
    """An expert's `encode` in another interpreter; a context manager.

    Args:
        python: The interpreter: a path, or a name that is looked for on PATH. It needs torch, numpy, and what the
            expert imports.
        component: The expert: a plugin's, or a user's own class.
        options: Keyword arguments of its class, as a spec gives them.
        start_seconds: How long the interpreter may take until it runs coatkit's code.
        load_seconds: How long it may take after that to import torch and the expert, and to load the weights.

    Attributes:
        sample_rate: Hz of what `encode` receives; here and below as the class says after `load`.
        frame_rate: Frames per second, Hz.
        dim: Width of the features.
        upsampling: As in `coatkit.Expert`, like `hears_all`.
        fingerprint: Identity of the features.
        device: Where it computes there: `cuda` where that torch sees a GPU.
    """

    sample_rate: int
    frame_rate: float
    dim: int
    upsampling: Literal["linear", "repeat"]
    hears_all: bool
    fingerprint: str
    device: str

    def __init__(
        self,
        python: Path,
        component: Component,
        options: Mapping[str, Any],
        *,
        start_seconds: float = 60.0,
        load_seconds: float = 900.0,
    ) -> None:
        self.python, self.component, self.options = python, component, options
        self.start_seconds, self.load_seconds = start_seconds, load_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._speaks = self._waiting = False

    def __enter__(self) -> ForeignExpert:
        """Start the interpreter and load the expert there.

        Raises:
            AssetError: If the expert's weights are missing.
            PluginError: If anything else fails; says what, in which interpreter, and the remedy.
        """
        with contextlib.ExitStack() as stack:
            order = self._order(folder := stack.enter_context(tempfile.TemporaryDirectory(prefix="coatkit-")))
            command = [self._interpreter(), "-I", "-B", "-u", f"{folder}/coatkit/worker.py", folder]
            self._start(command, stack)
            self._speaks = self._waiting = False
            hello, _ = self._receive(time.monotonic() + self.start_seconds, "to start", self.start_seconds)
            self._speaks = True
            if tuple(hello.get("python", ())) < worker.OLDEST:
                found, oldest = (".".join(map(str, v)) for v in (hello.get("python", ()), worker.OLDEST))
                self._fail(f"is Python {found}; there, too, coatkit needs {oldest} or newer")
            self._send(order)
            answer, _ = self._receive(time.monotonic() + self.load_seconds, "to load the expert", self.load_seconds)
            self._raise_failure(answer)
            try:
                vars(self).update({**answer["loaded"], "device": answer["device"]})
            except (KeyError, TypeError):
                self._garbage(answer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._patience = 5.0 if kind is None else 0.0  # an answer may be half read: there is nothing to wait for
        self._stack.close()

    def encode(self, audio: AudioBatch) -> Features:
        """Features of each sound: values [A, L, dim] float32, on the CPU.

        Raises:
            PluginError: If `encode` fails there (the expert can be used again), or the process ends or answers
                nonsense.
        """
        samples = audio.samples.detach().to("cpu", torch.float32).contiguous()
        payload = samples.view(torch.uint8).reshape(-1).numpy().data
        lengths = audio.lengths.tolist()
        if self._waiting:
            raise PluginError(f"{self._who()}: an earlier call was broken off, its answer may yet come; start it anew")
        self._waiting = True
        self._send({"shape": list(samples.shape), "lengths": lengths, "sample_rate": audio.sample_rate}, payload)
        header, values = self._receive(None, "", 0)
        self._waiting = False
        self._raise_failure(header)
        try:
            features = Features(
                torch.frombuffer(values, dtype=torch.float32).reshape(header["shape"])
                if values
                else torch.zeros(header["shape"]),
                torch.tensor(header["lengths"], dtype=torch.int64),
                header["frame_rate"],
                header["offset"],
            )
        except (KeyError, TypeError, ValueError, RuntimeError):
            self._garbage(header)
        try:
            expert: Any = self
            check_features(features, audio, expert)
        except ValueError as error:
            raise PluginError(f"{self._who()}: {error}") from None
        return features

    # What the other side is given

    def _order(self, folder: str) -> dict[str, Any]:
        """The expert's address and options; links in `folder` to the packages it needs of this environment."""
        self.component.enter()
        place, _, name = self.component.target.rpartition(":")
        order: dict[str, Any] = {"use": self.component.use, "name": name, "options": dict(self.options)}
        os.symlink(Path(worker.__file__).parent, f"{folder}/coatkit")
        if place.endswith(".py"):
            order["file"] = place
        else:
            order["module"] = place
            top = place.partition(".")[0]
            found = None if top == "coatkit" else importlib.util.find_spec(top)
            if found is not None and found.origin not in (None, "built-in", "frozen"):
                origin = Path(str(found.origin))
                whole = origin.parent if found.submodule_search_locations else origin
                os.symlink(whole, Path(folder, top if whole.is_dir() else whole.name))
        for option, value in self.options.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise PluginError(
                    f"{self._who()}: the option {option!r} cannot be sent to another interpreter: {error};"
                    " use text, numbers, lists and mappings"
                ) from None
        return order

    def _interpreter(self) -> str:
        """The command to start, never resolved: a virtual environment is told from its link."""
        given = os.path.expanduser(self.python)
        found = shutil.which(given)
        if found is not None:
            return os.path.abspath(found)
        if os.path.isdir(given):
            inside = os.path.join(given, "bin", "python")
            self._fail(f"is a folder; name the interpreter in it{f', {inside}' if os.path.exists(inside) else ''}")
        if os.path.exists(given):
            self._fail("cannot be run; name an interpreter, such as ENVIRONMENT/bin/python")
        self._fail("is not there; name an interpreter, such as ENVIRONMENT/bin/python")

    def _start(self, command: list[str], stack: contextlib.ExitStack) -> None:
        source, self._sink = os.pipe()
        self._source, sink = os.pipe()
        theirs = (source, sink)
        stack.callback(os.close, self._source)
        stack.callback(self._close_sink)
        with contextlib.ExitStack() as ours:
            for descriptor in theirs:
                ours.callback(os.close, descriptor)
            for descriptor in (self._source, self._sink):
                os.set_blocking(descriptor, False)
            try:
                self._process = subprocess.Popen(
                    [*command, *map(str, theirs)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=theirs,
                    start_new_session=True,  # Ctrl-C reaches this process, which ends that one and all it started
                )
            except OSError as error:
                self._fail(f"cannot be run ({error.strerror or error}); name an interpreter")
        self._said, self._patience = _Said(self._process), 0.0
        stack.callback(self._stop)

    def _close_sink(self) -> None:
        if self._sink >= 0:
            os.close(self._sink)
            self._sink = -1

    def _stop(self) -> None:
        process = self._process
        assert process is not None
        self._close_sink()  # the end of its input is the worker's order to end
        try:
            process.wait(self._patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # programs it started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            self._said.end()
            self._process = None

    # Messages

    def _send(self, header: dict[str, Any], payload: memoryview | None = None) -> None:
        self._running()
        for part in (memoryview(worker.pack(header, payload or b"")), payload or b""):
            at = 0
            while at < len(part):
                self._ready(None, "", 0, writing=True)
                try:
                    at += os.write(self._sink, part[at : at + (1 << 20)])
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    self._died()

    def _receive(self, until: float | None, what: str, limit: float) -> tuple[dict[str, Any], bytearray]:
        """One message; `until` (monotonic seconds) ends the wait."""
        start = bytes(self._read(8, until, what, limit))
        try:
            header = json.loads(self._read(worker.unpack_length(start), until, what, limit))
            size = header["bytes"]
            if not isinstance(size, int) or not 0 <= size <= 1 << 40:
                raise ValueError("no size")
        except (ValueError, KeyError, TypeError):
            self._garbage(start)
        return header, self._read(size, until, what, limit)

    def _read(self, size: int, until: float | None, what: str, limit: float) -> bytearray:
        data = bytearray()
        while len(data) < size:
            self._ready(until, what, limit)
            try:
                got = os.read(self._source, min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not got:
                self._died()
            data += got
        return data

    def _ready(self, until: float | None, what: str, limit: float, *, writing: bool = False) -> None:
        """Wait until the pipe can be used."""
        while True:
            poll = select.poll()  # unlike `select`, takes any number of open files
            poll.register(self._sink if writing else self._source, select.POLLOUT if writing else select.POLLIN)
            if poll.poll(500):
                return
            assert self._process is not None
            if self._process.poll() is not None:  # programs it started may still hold the pipe open
                self._died()
            if until is not None and time.monotonic() > until:
                self._fail(
                    f"took more than {limit:g} s {what}, and was stopped; does it work by itself?{self._said.shown()}"
                )

    # What went wrong

    def _running(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self._died()

    def _who(self) -> str:
        return f"{self.component.use} in {self.python}"

    def _fail(self, what: str) -> NoReturn:
        raise PluginError(f"{self.component.use}: the interpreter {self.python} {what}")

    def _garbage(self, got: object) -> NoReturn:
        raise PluginError(
            f"{self._who()}: its answer is not what coatkit's own code there would send ({str(got)[:80]}); does the"
            f" expert write to descriptors that it did not open?{self._said.shown()}"
        )

    def _died(self) -> NoReturn:
        if self._process is None:
            raise PluginError(f"{self._who()}: it is not running; use it as a context manager")
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            raise PluginError(f"{self._who()}: the process closed its pipes{self._said.shown()}") from None
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (was there too little memory?)"
        else:
            how = f"ended with exit code {code}"
        if not self._speaks:
            self._fail(f"is no Python that coatkit can use: it {how} before it answered{self._said.shown()}")
        raise PluginError(f"{self._who()}: the process {how} before it answered{self._said.shown()}")

    def _raise_failure(self, answer: Mapping[str, Any]) -> None:
        if "failed" not in answer:
            return
        kind, message, step = (answer.get(name) for name in ("kind", "message", "failed"))
        if step == "torch":
            self._fail(
                f"has no torch that can be imported ({message}).\n"
                f"  Install it there: {self.python} -m pip install torch numpy"
            )
        what = _STEPS.get(str(step), "failed").format(options=dict(self.options))
        lines = [f"{self._who()}: {what}: {kind}: {message}"]
        if answer.get("frame"):
            lines.append(f"at {answer['frame']}")
        if missing := answer.get("missing"):
            lines.append(f"the package that has {missing!r} is not installed there: {self.python} -m pip install ...")
        error: type[CoatkitError] = AssetError if kind == "AssetError" else PluginError
        raise error("\n  ".join(lines) + (self._said.shown() if step != "encode" else ""))


class _Said:
    """The last of what a process prints, read as it comes: a full pipe would stop it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._pipe, self._kept = process.stdout, bytearray()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while got := os.read(self._pipe.fileno(), 1 << 16):
                self._kept = (self._kept + got)[-_KEPT_BYTES:]

    def shown(self) -> str:
        """The last lines, to put behind a message; empty when nothing was printed."""
        self._thread.join(0.3)  # what a process that ended has printed may still be in the pipe
        # Progress bars write over their line.
        text = self._kept.decode(errors="replace").replace("\r\n", "\n")
        lines = [line.rpartition("\r")[2] for line in text.split("\n")]
        lines = [line.rstrip() for line in lines if line.strip()][-_SHOWN_LINES:]
        return "".join(["\n  the last it printed:", *(f"\n    {line}" for line in lines)]) if lines else ""

    def end(self) -> None:
        self._thread.join(2.0)
        if not self._thread.is_alive():  # else somebody holds the pipe, and the thread waits for it
            self._pipe.close()
