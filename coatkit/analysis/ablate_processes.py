"""Runs of an ablation in processes of their own: one that is killed takes no other with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from coatkit.analysis.ablate_job import Ended, Job, read_result
from coatkit.files import without_links

_LOOK_EVERY = 0.2
"""Seconds between looks at the processes."""


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    job: Job
    log: IO[bytes]
    device: str = ""
    seen: Ended | None = None


class Pool:
    """Processes that each do a job; used as a context manager, which ends those that are left.

    Args:
        logs: Folder for what they print.
        jobs: How many are meant to run at once; they share the machine's cores.
        lock: A descriptor that they keep open.
    """

    def __init__(self, logs: Path, jobs: int, lock: int) -> None:
        self.logs, self.jobs, self.lock = logs, jobs, lock
        self.running: dict[str, _Child] = {}
        self._stopped = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self.running.values():
            child.process.kill()
            child.process.wait()
            child.log.close()
        self.running.clear()

    def start(self, name: str, job: Job) -> None:
        """Begin a job in a new process."""
        stem = name.replace("/", ".")
        path = self.logs / f"{stem}.job.json"
        job.write(path)
        Path(job.result).unlink(missing_ok=True)
        log = open(self.logs / f"{stem}.log", "ab", opener=without_links)  # noqa: SIM115 (closed when the run ends)
        # The same modules are found there as here, and none by the accident of where it starts.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        device = self._device(environment.get("CUDA_VISIBLE_DEVICES", ""))
        environment |= {"CUDA_VISIBLE_DEVICES": device} if device else {}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "coatkit.analysis.ablate_job", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(self.lock,),
            start_new_session=True,  # Ctrl-C comes here alone, and is passed on as a wish to save and stop
        )
        self.running[name] = _Child(process, job, log, device)

    def _device(self, named: str) -> str:
        """Of several GPUs that are named, the one with the fewest runs; a run uses one. Empty where none are named."""
        taken = [child.device for child in self.running.values()]
        devices = named.split(",") if "," in named else []
        return min(devices, key=taken.count, default="")

    def stop(self) -> None:
        """Ask all to save and stop."""
        self._stopped = True
        for child in self.running.values():
            child.process.send_signal(signal.SIGTERM)

    def look(self) -> Iterator[tuple[str, Ended, bool]]:
        """Wait a little; then what is new: name, how far it is, and whether it still runs."""
        time.sleep(_LOOK_EVERY)
        for name, child in list(self.running.items()):
            code = child.process.poll()
            found = read_result(Path(child.job.result))
            if code is None:
                if found is not None and found != child.seen:
                    child.seen = found
                    yield name, found, True
                continue
            child.log.close()
            del self.running[name]
            yield name, self._ended(code, found or Ended("running"), child), False

    def _ended(self, code: int, found: Ended, child: _Child) -> Ended:
        if found.state != "running":
            return found
        # It told no end: something outside ended it.
        if self._stopped and -code in (signal.SIGTERM, signal.SIGINT):
            found.state = "stopped"
            return found
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        memory = "; was there enough memory?" if -code == signal.SIGKILL else ""
        found.state, found.reason = "failed", f"its process {how}{memory}; see {child.log.name}"
        return found
