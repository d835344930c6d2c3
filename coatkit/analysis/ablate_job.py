"""One run of an ablation: train what is left, then ask what is left. In this process, or in one of its own:

python -m coatkit.analysis.ablate_job JOB.json
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from coatkit.checkpoint import load_position
from coatkit.errors import CoatkitError
from coatkit.files import write_atomic
from coatkit.run_folder import RunFolder


@dataclass(frozen=True)
class Ask:
    """One evaluation of a run.

    Attributes:
        arm: Arm of the table it stands for.
        key: Digest of the suite, its rows, and how they are asked.
    """

    arm: str
    key: str
    trained: bool = True
    block: bool = True
    cot: int | None = None
    shuffle: int | None = None


@dataclass(frozen=True)
class Job:
    """All that one run needs.

    Attributes:
        base: The spec's file, and `overrides` to it.
        suite: The suite's file; `limit` takes the first rows of each task.
        asks: Evaluations that are left.
        restart: Throw away answers that are there.
        result: File for how it ended.
    """

    base: str
    overrides: list[str]
    suite: str
    limit: int | None
    batch: int
    asks: list[Ask]
    restart: bool
    result: str

    def write(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")


State = Literal["waiting", "running", "stopped", "done", "failed"]


@dataclass
class Ended:
    """How a job ended.

    Attributes:
        reason: Why it failed.
        minutes: Of training, in this sitting.
        asked: Digests of the evaluations that are complete, by arm.
    """

    state: State
    reason: str = ""
    minutes: float = 0.0
    asked: dict[str, dict[str, str]] = field(default_factory=dict)


def read_job(path: Path) -> Job:
    data = json.loads(path.read_text(encoding="utf-8"))
    return Job(**{**data, "asks": [Ask(**ask) for ask in data["asks"]]})


def is_trained(folder: Path, stages: int) -> bool:
    """Whether a run has all its stages behind it.

    Raises:
        RunError: If its newest checkpoint is damaged.
    """
    newest = RunFolder(folder).latest()
    return newest is not None and load_position(newest).stage >= stages


def work(job: Job, report: Callable[[Ended], None] = lambda ended: None) -> Ended:
    """Do what is left of a job; what fails is the job's, and is told in the result.

    Args:
        report: Called with the state so far, after training and after each evaluation.
    """
    ended = Ended("running")
    try:
        _work(job, ended, report)
    except CoatkitError as error:
        ended.state, ended.reason = "failed", str(error)
    except Exception as error:  # whatever it is, the other arms go on; the log has all of it
        traceback.print_exc()
        ended.state, ended.reason = "failed", f"{type(error).__name__}: {error}"
    report(ended)
    return ended


def _work(job: Job, ended: Ended, report: Callable[[Ended], None]) -> None:
    from coatkit.evaluation.evaluate import evaluate
    from coatkit.evaluation.items import tasks_of_suite
    from coatkit.evaluation.suite import read_suite
    from coatkit.spec_file import load_spec
    from coatkit.trainer import train

    loaded = load_spec(Path(job.base), job.overrides)
    if not is_trained(loaded.output, len(loaded.spec.stages)):
        begun = time.monotonic()
        result = train(loaded, resume=True)
        ended.minutes = (time.monotonic() - begun) / 60
        if not result.finished:
            ended.state = "stopped"
            return
        report(ended)
    suite = read_suite(Path(job.suite))
    for ask in job.asks:
        tasks = tasks_of_suite(suite, job.limit)  # anew each time: shuffling changes them
        folder, _ = evaluate(
            loaded.output,
            suite.name or "suite",
            tasks,
            trained=ask.trained,
            block=ask.block,
            cot=ask.cot,
            shuffle=ask.shuffle,
            batch=job.batch,
            restart=job.restart,
        )
        ended.asked[ask.arm] = {"key": ask.key, "folder": str(folder)}
        report(ended)
    ended.state = "done"


def read_result(path: Path) -> Ended | None:
    """How far a job of another process came; None when it wrote nothing."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Ended(**data)


def main(path: Path) -> None:
    job = read_job(path)

    def report(ended: Ended) -> None:
        write_atomic(Path(job.result), json.dumps(asdict(ended), indent=1) + "\n")

    from coatkit.memory import keep_freed_memory

    keep_freed_memory()
    ended = work(job, report)
    if ended.reason:
        print(f"error: {ended.reason}", file=sys.stderr)
    sys.exit(0 if ended.state in ("done", "stopped") else 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
