"""What breaks around a run: a second trainer, a full disk, too few descriptors, a dead data worker, an odd clock."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from coatkit.cli import shown
from coatkit.errors import RunError
from coatkit.recovery import Hold, in_words
from coatkit.spikes import FEWEST, Spikes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/crash"))
from harness import differing  # noqa: E402

HOLDER = """
import sys, time
from pathlib import Path
from coatkit.recovery import Hold
with Hold(Path(sys.argv[1])) as hold:
    hold.take()
    print("held", flush=True)
    time.sleep(100)
"""
KILLER = """
import multiprocessing, os, signal
import torch
from coatkit import Expert, Features

class Killer(Expert):
    sample_rate, frame_rate, dim = 16_000, 25.0, 1
    calls = 0

    def encode(self, audio):
        Killer.calls += 1
        if Killer.calls == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
        frames = -(-audio.lengths // 640)
        return Features(torch.zeros(len(audio), int(frames.max()), 1), frames, self.frame_rate)
"""


def prepare(project: Any) -> Any:
    """A checkpoint after every step, and dropout, so that a step made again in another way would show."""
    project.spec["backbone"]["lora"]["dropout"] = 0.1
    project.spec["checkpoint"] = {"every": 1, "keep": 100}
    return project


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.fixture
def held(project: Any) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run folder."""
    command = [sys.executable, "-c", HOLDER, str(project.folder / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_trainer_on_one_folder_is_refused_until_the_first_is_dead(
    project: Any, held: subprocess.Popen[str], resume: bool
) -> None:
    with pytest.raises(RunError, match=rf"(?s)another process trains here \(process {held.pid} .*--set output="):
        project.train(resume=resume)
    assert not (project.folder / "run/run.json").exists()
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert project.train(resume=resume).result.finished


def test_a_stopped_process_still_holds_its_run(project: Any, held: subprocess.Popen[str]) -> None:
    held.send_signal(signal.SIGSTOP)
    with pytest.raises(RunError, match="another process trains here"):
        project.train()
    held.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("name", ["metrics.jsonl", "gradients.jsonl", "quarantine.jsonl"])
def test_a_link_in_a_run_folder_is_not_written_through(project: Any, tmp_path: Path, name: str) -> None:
    """A run of a stranger may have a link to any file of mine."""
    project.spec["stages"] = [{**project.spec["stages"][0], "steps": 1, "batch": {"rows": 4}}]
    project.spec["data"] |= {"on_bad_row": "quarantine", "max_bad_rows": 20}
    project.rows += [{**project.rows[0], "id": "lost", "audio": "lost.wav"}] * 20
    mine, run = tmp_path / "mine", project.folder / "run"
    mine.write_text("what is mine\n")
    run.mkdir(parents=True)
    (run / name).symlink_to(mine)
    (run / f".spec.yaml.{os.getpid()}.partial").symlink_to(mine)
    with pytest.raises(RunError, match=rf"{name}: .* A link is not written through: put a file in its place"):
        project.train("gradients_every=1")
    assert (run / "spec.yaml").is_file()
    (run / name).unlink()
    assert project.train("gradients_every=1", resume=True).result.finished
    assert mine.read_text() == "what is mine\n"


def test_a_link_in_place_of_a_lock_is_refused(project: Any, tmp_path: Path) -> None:
    mine, run = tmp_path / "mine", project.folder / "run"
    mine.write_text("what is mine\n")
    run.mkdir(parents=True)
    (run / ".lock").symlink_to(mine)
    with pytest.raises(RunError, match=r"run: cannot be written: .*\n  A link is not written through: put a file"):
        project.train()
    assert mine.read_text() == "what is mine\n"


def test_a_full_disk_is_told_and_nothing_is_lost(project: Any) -> None:
    """The limit on a file's size stands for it: a checkpoint has larger files than records have."""
    prepare(project)
    expected = project.train("output=expected").folder
    project.train("output=run")
    largest = max(p.stat().st_size for p in (expected / "checkpoints/step-00000001").iterdir())
    for path in (project.folder / "run/checkpoints").glob("step-*"):
        if path.name > "step-00000002":
            shutil.rmtree(path)
    with limited(resource.RLIMIT_FSIZE, largest // 2), pytest.raises(RunError) as told:
        project.train(resume=True)
    assert "step-00000003: cannot be written" in str(told.value)
    assert "Earlier checkpoints are intact" in str(told.value)
    assert sorted(p.name[-1] for p in (project.folder / "run/checkpoints").iterdir()) == ["1", "2"]
    assert project.train(resume=True).result.finished
    assert differing(project.folder / "run", expected) == []


def test_a_disk_that_is_full_for_the_records_is_told_too(tmp_path: Path) -> None:
    def write() -> None:
        with Hold(tmp_path), limited(resource.RLIMIT_FSIZE, 10):
            (tmp_path / "metrics.jsonl").write_text("x" * 100)

    with pytest.raises(RunError, match=r"File too large\. Make room there\. .*--resume"):
        write()


def test_too_few_descriptors_are_told_with_the_remedy(tmp_path: Path) -> None:
    opened = []

    def use_up() -> None:
        with Hold(tmp_path), limited(resource.RLIMIT_NOFILE, 64 + len(os.listdir("/proc/self/fd"))):
            for _ in count():
                opened.append(os.open(tmp_path, os.O_RDONLY))

    try:
        with pytest.raises(RunError, match=r"too many open files\..*ulimit -n"):
            use_up()
    finally:
        for descriptor in opened:
            os.close(descriptor)


def test_a_folder_that_cannot_be_written_is_told(project: Any) -> None:
    (project.folder / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run: cannot be written"):
        project.train("output=file/run")


# torch raises what it knows of a dead worker in whatever code runs at that moment; in a finaliser it is lost there, and
# the loader finds the worker dead when it next waits for it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_data_worker_is_told_and_the_run_goes_on(project: Any) -> None:
    prepare(project)
    (project.folder / "killer.py").write_text(KILLER)
    project.spec["experts"]["killer"] = {"use": "./killer.py:Killer"}
    project.spec["stages"] = [{**project.spec["stages"][0], "weights": {"killer": 1.0}, "steps": 12}]
    with pytest.raises(RunError) as told:
        project.train("data.workers=1")
    assert "a data worker ended" in str(told.value)
    assert "--resume" in str(told.value)
    assert len(shown(told.value).splitlines()) < 10
    project.train(resume=True)
    assert differing(project.folder / "run", project.train("output=expected").folder) == []


@pytest.mark.parametrize("dying", [0.0, 0.3])
def test_what_the_system_tells_of_a_dead_worker_late_does_not_break_what_comes_after(
    tmp_path: Path, dying: float
) -> None:
    rows = iter(DataLoader([0, 1], num_workers=1))
    next(rows)  # from now on torch asks for the signal
    told_by_system = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    assert callable(told_by_system)
    try:
        [worker] = active_children()
        assert worker.pid is not None
        if dying:  # its pipes are closed before it is dead
            threading.Timer(dying, os.kill, (worker.pid, signal.SIGKILL)).start()
        else:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has been told
        with pytest.raises(RunError, match="a data worker ended"), in_words(tmp_path, "All is well."):
            raise ConnectionResetError("Connection reset by peer")
        time.sleep(2 * dying)
        told_by_system(signal.SIGCHLD, None)  # torch raises here for a worker that nobody waited for
        del rows
    finally:
        signal.signal(signal.SIGCHLD, told_by_system)


def test_a_clock_that_goes_backwards_changes_nothing(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepare(project).train("output=expected").folder
    back = count(2_000_000_000, -3600)
    monkeypatch.setattr("time.time", lambda: float(next(back)))
    project.train("output=run")
    assert differing(project.folder / "run", expected) == []


# Spikes


def test_a_spike_is_told_once_and_noise_is_not() -> None:
    spikes = Spikes()
    noise = [2.0 + 0.1 * (i % 5) for i in range(40)]
    assert [spikes.look("one", loss) for loss in noise] == [None] * 40
    assert spikes.look("one", 9.0) == pytest.approx(2.2)
    assert spikes.look("one", 2.2) is None
    assert spikes.look("one", float("nan")) is None
    assert spikes.look("two", 9.0) is None  # a stage has its own level


def test_nothing_is_judged_before_there_is_something_to_compare_with() -> None:
    spikes = Spikes()
    assert [spikes.look("one", 1.0) for _ in range(FEWEST - 1)] == [None] * (FEWEST - 1)
    assert spikes.look("one", 100.0) is None
    assert spikes.look("one", 100.0) == 1.0


def test_a_run_that_goes_on_judges_as_one_that_was_not_cut_short() -> None:
    fresh = Spikes()
    fresh.seen({"stage": "one", "loss": 1.0} for _ in range(FEWEST))
    assert fresh.look("one", 5.0) == 1.0


# Killed: a few; `make test-crash` has the others


def test_killed_writers_of_the_feature_store_leave_nothing_half(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/crash/matrix.py"), str(tmp_path), "--kills", "40", "--only", "store"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    assert "| **all** | **5** |" in done.stdout
