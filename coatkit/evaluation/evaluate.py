"""`evaluate`: from a run and tasks to results on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coatkit import infer
from coatkit.errors import RunError
from coatkit.evaluation.cot import without_block
from coatkit.evaluation.generate import Say, answer_all, folder_for, identity
from coatkit.evaluation.items import Task, refuse_bad, shuffle_sounds, unhearable
from coatkit.evaluation.judge import judge_answers, judged, require_judges
from coatkit.evaluation.judge_client import judge_identity
from coatkit.evaluation.likelihood import indistinct
from coatkit.evaluation.metrics import METRICS
from coatkit.evaluation.predictions import Predictions
from coatkit.evaluation.results import made_with, score_tasks
from coatkit.run_folder import RunFolder


def evaluate(
    run: Path,
    name: str,
    tasks: Sequence[Task],
    *,
    out: Path | None = None,
    trained: bool = True,
    block: bool = True,
    cot: int | None = None,
    shuffle: int | None = None,
    batch: int = 8,
    skip_bad: bool = False,
    restart: bool = False,
    device: str | None = None,
    say: Say = lambda done, total: None,
    say_judged: Say = lambda done, total: None,
) -> tuple[Path, dict[str, Any]]:
    """Ask a run about every row of the tasks, score the answers, and write both down.

    Args:
        run: The run folder.
        name: What is evaluated; names the folder where `out` does not.
        tasks: From `tasks_of_suite` or `tasks_of_rows`; their rows change with `shuffle`.
        out: Where answers and results go; `RUN/eval/NAME` when left out. Answers that are there are used again.
        trained: False for the model as it was before training.
        block: False leaves the thinking block out.
        cot: Tokens for a thought in words before the answer; None asks for none. Tasks by likelihood are then left out.
        shuffle: Seed by which rows of a task exchange their sounds; None leaves them alone.
        batch: Rows asked together.
        skip_bad: Leave bad rows out, and say so in the results, where else they are refused.
        restart: Throw away answers that are there.
        device: Torch device; the best there is when left out.
        say: Called with rows answered and rows in all.
        say_judged: Called with answers rated by a judge and answers in all.

    Returns:
        The folder, and what is in its results.json.

    Raises:
        DataError: If rows are bad.
        RunError: If the run cannot be loaded, or the folder holds answers of another model or to other rows.
        PluginError: If a library that a metric needs is not installed.
        JudgeError: If a judge is wanted and cannot be asked, or rates nothing; answers and ratings are kept.
    """
    if cot is not None:  # an answer after a thought has no first token of its own
        tasks = [task for task in tasks if task.spec.metric != "likelihood"]
        if not tasks:
            raise RunError("every task has the metric likelihood, which knows no thought in words; leave out --cot")
    refuse_bad(tasks, skip_bad)
    folder = RunFolder(run)
    folder.read_record()
    for task in tasks:  # a library that is missing is told before hours of asking
        METRICS[task.spec.metric]((), task.spec.language)
    place = out or folder_for(run, name, trained=trained, shuffled=shuffle, block=block, cot=cot)
    require_judges(tasks, place)
    model = infer.load(run, trained=trained, device=device)
    if not block:
        without_block(model)
    unhearable(tasks, model.backbone.preparer)
    indistinct(tasks, model)
    refuse_bad(tasks, skip_bad)
    if shuffle is not None:
        shuffle_sounds(tasks, shuffle)
        if all(task.own_sound == sum(bool(i.seconds) for i in task.items) for task in tasks):
            raise RunError("no sound can be shuffled: no task has two rows with different sounds")
    known = identity(model, folder, tasks, batch=batch, shuffled=shuffle, block=block, cot=cot)
    scoring: dict[str, dict[str, Any]] = {
        task.spec.name: {"metric": task.spec.metric, "language": task.spec.language} for task in tasks
    }
    for task in judged(tasks):
        if task.judge is not None:
            scoring[task.spec.name]["judge"] = judge_identity(task.judge)
    with Predictions(place, known, restart=restart) as kept:
        answer_all(model, tasks, kept, batch=batch, cot=cot, skip_bad=skip_bad, say=say)
        ratings = judge_answers(tasks, kept.lines, kept.folder, say_judged)
        scores, lines = score_tasks(tasks, kept.lines, ratings)
        about = {"run": str(run), "step": model.step, "trained": trained, "block": block, "cot": cot}
        about |= {"shuffled_sounds": shuffle, "data": name}
        results = {**made_with(about), "tasks": scores}
        kept.finish(lines, results, scoring)
    return kept.folder, results
