"""What the machine does to a run, for real: a file system that is full or read-only, too few descriptors, signals.

Everything is compared with the run, or the store, that nothing happened to.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coatkit import store as store_module
from coatkit.cli import _SCREEN, main
from coatkit.data import audio
from coatkit.data.rows import AudioRef
from coatkit.errors import RunError
from coatkit.recovery import in_words
from coatkit.store import Store

sys.path.insert(0, str(Path(__file__).parent / "crash"))
from harness import differing, half_written

PAGE = 4096
"""Of a tmpfs: what the smallest file takes."""

SENDER = """
import multiprocessing, os, signal
import torch
from coatkit import Expert, Features

class Sender(Expert):
    '''Heard twice a step; in between its own frames, it sends what the environment says.'''

    sample_rate, frame_rate, dim = 16_000, 25.0, 1

    def __init__(self):
        self.calls = 0

    def encode(self, audio):
        self.calls += 1
        for call in filter(None, os.environ.get("SEND", "").split(",")):
            name, _, when = call.partition("@")
            if self.calls == int(when) and name == "worker":
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            elif self.calls == int(when):
                os.killpg(0, getattr(signal, name))
        frames = -(-audio.lengths // 640)
        power = audio.samples.square().mean(1)
        return Features(power[:, None, None].expand(-1, int(frames.max()), 1), frames, self.frame_rate)
"""
LAUNCHER = """
import json, os, resource, sys
from pathlib import Path
import coatkit.cli.train, coatkit.trainer, torch
from coatkit.build import build
from coatkit.spec_file import load_spec
torch.set_num_threads(1)
build(load_spec(Path(sys.argv[1])), "cpu")  # imports what takes seconds, once
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
            os.dup2(opened, number)
        os.environ.update(job["environment"])
        if job["spare"]:
            most = len(os.listdir("/proc/self/fd")) + job["spare"]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        sys.argv, code = ["coatkit", *job["words"]], 0
        try:
            coatkit.cli.main()
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
        os._exit(code)  # at once: to take everything down that was imported takes seconds
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Launcher:
    """Starts `coatkit` in processes of their own, one at a time, forked from one that has imported everything."""

    def __init__(self, spec: Path) -> None:
        command = [sys.executable, "-c", LAUNCHER, str(spec)]
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.started: int | None = None

    def start(self, said: Path, *words: str, spare: int = 0, **environment: str) -> int:
        """The process number of a command; `spare` is how many descriptors more than now it may have."""
        job = {"said": str(said), "words": words, "spare": spare, "environment": environment}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.started = self._answer()
        return self.started

    def ended(self) -> int:
        """Its exit code."""
        code = self._answer()
        self.started = None
        return code

    def _answer(self, limit: float = 120.0) -> int:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], limit)[0], "it hangs"
        return int(self.process.stdout.readline())

    def close(self) -> None:
        if self.started is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.started, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def started(whole: Any) -> Iterator[Launcher]:
    launcher = Launcher(whole.folder / "spec.yaml")
    yield launcher
    launcher.close()


@pytest.fixture
def launcher(started: Launcher) -> Iterator[Launcher]:
    yield started
    if started.started is not None:  # the test failed before its end
        with suppress(ProcessLookupError):
            os.killpg(started.started, signal.SIGKILL)
        started.ended()


@pytest.fixture(scope="module")
def whole(new_project: Callable[[], Any]) -> Any:
    """A project with dropout, a checkpoint after every step and two batches a step, and its run (`.whole`)."""
    project = new_project()
    (project.folder / "sender.py").write_text(SENDER)
    project.spec["backbone"]["lora"]["dropout"] = 0.1
    project.spec["checkpoint"] = {"every": 1, "keep": 100}
    project.spec["experts"] = {"audio": {}, "sender": {"use": "./sender.py:Sender"}}
    weights = {"audio": 1.0, "sender": 1.0}
    stage = {**project.spec["stages"][0], "batch": {"rows": 8, "accumulate": 2}, "steps": 8, "weights": weights}
    project.spec["stages"] = [stage]
    project.whole = project.train("output=whole").folder
    return project


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def leave(disk: Path, free: int) -> Path:
    """Fill a file system up to `free` bytes; the file to remove to make room."""
    filler = disk / "filler"
    filler.write_bytes(b"")
    found = os.statvfs(disk)
    filler.write_bytes(bytes(found.f_bavail * found.f_frsize - free))
    return filler


@pytest.fixture
def coatkit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`coatkit` with arguments: its exit code, and what stood on the screen from its error on."""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    # Python's own, which print: pytest's would take what a command is to keep quiet about.
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["coatkit", *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        for thread in threading.enumerate():  # TensorBoard's, which may outlast the run
            if type(thread).__name__ == "_AsyncWriterThread" and code:
                thread.join(60)
        return code, screen(capfd.readouterr().err)

    return run


def screen(printed: str) -> str:
    """What a command printed from its error on; never a traceback."""
    assert "Traceback" not in printed, printed
    _, found, said = printed.partition("error: ")
    assert len(said.splitlines()) <= _SCREEN
    return found + said


# A full file system


@pytest.mark.parametrize("room", ["lock", "record", "curves", "metrics", "checkpoint"])
def test_a_full_file_system_is_told_and_the_run_goes_on(
    whole: Any, disk: Path, room: str, coatkit: Callable[..., tuple[int, str]]
) -> None:
    """Full before the first file, before run.json, before TensorBoard's file, before the metrics, at the third step."""
    files = [sum(-(-f.stat().st_size // PAGE) * PAGE for f in step.iterdir()) for step in steps(whole.whole)]
    free = {"lock": 0, "record": 2, "curves": 3, "metrics": 4}.get(room, 6) * PAGE
    filler = leave(disk, free + (files[0] + files[1] + files[2] // 2 if room == "checkpoint" else 0))
    train = ("train", str(whole.folder / "spec.yaml"), "--set", f"output={disk / 'run'}")
    code, said = coatkit(*train)
    assert code == 3
    assert f"error: {disk / 'run'}" in said
    assert "No space left on device" in said
    assert "room" in said or "--set output=" in said
    before = [step.name for step in steps(disk / "run")]
    assert before == (["step-00000001", "step-00000002"] if room == "checkpoint" else [])
    assert half_written(disk / "run") == []
    code, said = coatkit(*train, "--resume")
    assert (code, "No space left on device" in said) == (3, True)
    assert [step.name for step in steps(disk / "run")] == before
    filler.unlink()
    assert coatkit(*train, "--resume") == (0, "")
    assert differing(disk / "run", whole.whole) == []


def steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def caching(project: Any) -> tuple[str, ...]:
    return ("cache", str(project.folder / "spec.yaml"), "--yes", "--expert", "sender")


@pytest.fixture(scope="module")
def kept(whole: Any) -> dict[str, bytes]:
    """Frames of every sound in a store that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coatkit", *caching(whole), "--set", "cache.folder=store"])
        patch.setattr(threading, "excepthook", threading.excepthook)
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        with suppress(SystemExit):
            main()
    return frames(whole.folder / "store")


def frames(root: Path) -> dict[str, bytes]:
    (folder,) = root.glob("sender-*")
    store = Store(folder)
    assert store.damaged == []
    found = {key: store.frames(key) for key in sorted(store.keys())}
    return {key: value.numpy().tobytes() for key, value in found.items() if value is not None}


@pytest.mark.parametrize("pages", [0, 1, 6])
def test_a_store_that_fills_the_file_system_is_told_and_goes_on(
    whole: Any,
    kept: dict[str, bytes],
    disk: Path,
    pages: int,
    coatkit: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full before its first file, before the first shard, after some."""
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1)  # a shard for each sound
    filler = leave(disk, pages * PAGE)
    command = (*caching(whole), "--set", f"cache.folder={disk / 'store'}")
    code, said = coatkit(*command)
    assert code == 3
    assert f"error: {disk / 'store'}" in said
    assert "No space left on device" in said
    assert "make room" in said.lower()
    some = frames(disk / "store") if pages else {}
    assert (0 < len(some) < len(kept)) == (pages > 1)
    assert half_written(disk / "store") == []
    filler.unlink()
    assert coatkit(*command)[0] == 0
    assert frames(disk / "store") == kept
    assert some.items() <= kept.items()


# A read-only file system


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_folder_is_told_and_left_alone(
    whole: Any, disk: Path, begun: bool, coatkit: Callable[..., tuple[int, str]]
) -> None:
    run = disk / "run"
    train = ("train", str(whole.folder / "spec.yaml"), "--set", f"output={run}", "--resume")
    if begun:
        subprocess.run(["cp", "-r", str(whole.whole), str(run)], check=True)
        for step in steps(run)[2:]:
            subprocess.run(["rm", "-r", str(step)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, said = coatkit(*train)
    assert code == 3
    assert f"error: {run}" in said
    assert "Read-only file system" in said
    assert "--set output=" in said
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert [step.name[-1] for step in steps(run)] == (["1", "2"] if begun else [])
    assert coatkit(*train) == (0, "")
    assert differing(run, whole.whole) == []


def test_a_read_only_store_is_told(whole: Any, disk: Path, coatkit: Callable[..., tuple[int, str]]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command = (*caching(whole), "--set", f"cache.folder={disk / 'store'}")
    code, said = coatkit(*command)
    assert (code, f"error: {disk / 'store'}: Read-only file system. Make it writable." in said) == (3, True)


# Data workers and descriptors


def test_a_killed_worker_of_the_store_is_told_and_it_goes_on(
    whole: Any, kept: dict[str, bytes], tmp_path: Path, coatkit: Callable[..., tuple[int, str]], monkeypatch: Any
) -> None:
    command = (*caching(whole), "--set", f"cache.folder={tmp_path}", "--set", "data.workers=1")
    monkeypatch.setattr("coatkit.extract._ROWS", 4)  # so that the worker is still there
    monkeypatch.setenv("SEND", "worker@2")
    code, said = coatkit(*command)
    assert code == 3
    assert said.startswith("error: a data worker ended: ")
    assert "What was stored before is intact" in said
    (folder,) = tmp_path.glob("sender-*")
    some = Store(folder).keys()
    assert 2 <= len(some) < len(kept)
    monkeypatch.delenv("SEND")
    assert coatkit(*command)[0] == 0
    assert Store(folder).keys() == kept.keys() > some


@pytest.mark.parametrize(("workers", "spare"), [(0, 1), (2, 10), (2, 14), (2, 24)])
def test_too_few_descriptors_end_the_run_and_it_goes_on(
    whole: Any, tmp_path: Path, launcher: Launcher, workers: int, spare: int, coatkit: Callable[..., tuple[int, str]]
) -> None:
    """At the curves, at starting workers, and in workers that cannot hand over what they read."""
    run = tmp_path / "run"
    words = ("train", str(whole.folder / "spec.yaml"), "--set", f"output={run}", "--set", f"data.workers={workers}")
    launcher.start(tmp_path / "said", *words, spare=spare)
    assert launcher.ended() == 3
    said = screen((tmp_path / "said").read_text())
    assert "too many open files" in said
    assert "ulimit -n" in said
    assert "--resume" in said
    assert half_written(run) == []
    assert coatkit(*words, "--resume") == (0, "")
    assert differing(run, whole.whole) == []


@pytest.mark.parametrize("part", ["", "0+1000"])
def test_too_few_descriptors_are_no_fault_of_a_row(whole: Any, part: str) -> None:
    """Else `on_bad_row: quarantine` would set sounds aside that are whole."""
    ref = AudioRef(whole.folder / "clips/r00.wav", part=part)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []

    def read() -> None:
        with in_words(whole.folder, "Go on."):
            audio.read(ref, 10.0)

    resource.setrlimit(resource.RLIMIT_NOFILE, (16 + len(os.listdir("/proc/self/fd")), before[1]))
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(RunError, match=r"too many open files\..*ulimit -n"):
            read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in opened:
            os.close(descriptor)


# Signals


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_in_the_middle_of_a_step_and_continued_equals_in_one_go(
    whole: Any, tmp_path: Path, launcher: Launcher, workers: int
) -> None:
    """The whole process group, as a terminal or a scheduler does."""
    run = tmp_path / "run"
    words = ("train", str(whole.folder / "spec.yaml"), "--set", f"output={run}", "--set", f"data.workers={workers}")
    pid = launcher.start(tmp_path / "said", *words, SEND="SIGSTOP@5")  # twice a step: within the third
    wait_until_stopped(pid)
    assert (run / "metrics.jsonl").read_text().count("\n") == 2
    os.killpg(pid, signal.SIGCONT)
    assert launcher.ended() == 0, (tmp_path / "said").read_text()
    assert differing(run, whole.whole) == []


@pytest.mark.parametrize(
    ("sent", "times", "workers", "code", "steps_done"),
    [
        (signal.SIGTERM, 1, 0, 0, 3),
        (signal.SIGTERM, 1, 1, 0, 3),
        (signal.SIGINT, 1, 1, 0, 3),
        (signal.SIGINT, 2, 1, 130, 2),
    ],
)
def test_a_signal_to_the_process_group_saves_and_the_run_goes_on(
    whole: Any,
    tmp_path: Path,
    launcher: Launcher,
    sent: signal.Signals,
    times: int,
    workers: int,
    code: int,
    steps_done: int,
    coatkit: Callable[..., tuple[int, str]],
) -> None:
    """SIGTERM or Ctrl-C ends after the step, a second Ctrl-C at once; a data worker reads ahead meanwhile."""
    run, spec = tmp_path / "run", whole.folder / "spec.yaml"
    change = ("--set", f"output={run}", "--set", f"data.workers={workers}", "--set", "checkpoint.every=2")
    # It stops itself within the third step, so that the signal comes there, and from outside.
    pid = launcher.start(tmp_path / "said", "train", str(spec), *change, SEND="SIGSTOP@5,SIGSTOP@6")
    for number in range(2):
        wait_until_stopped(pid)
        if number < times:
            os.killpg(pid, sent)
        os.killpg(pid, signal.SIGCONT)
    assert launcher.ended() == code
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    told = f"stopped at step {steps_done}; continue with --resume: {run}"
    if code:
        told = f"interrupted; what was saved is intact. Go on with: coatkit train {spec} --resume"
    assert told in " ".join(said.split())
    assert steps(run)[-1].name == f"step-{steps_done:08d}"
    assert half_written(run) == []
    assert coatkit("train", str(spec), *change, "--resume") == (0, "")
    assert differing(run, whole.whole) == []
