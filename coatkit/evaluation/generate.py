"""Asking a model about every row, batch by batch, from where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coatkit.errors import DataError
from coatkit.evaluation.cot import INSTRUCTION, Reasoned, reason
from coatkit.evaluation.items import Item, Task, batches
from coatkit.evaluation.likelihood import likeliest
from coatkit.evaluation.predictions import Predictions
from coatkit.evaluation.suite import TaskSpec
from coatkit.files import file_sha256
from coatkit.infer import AudioThinker
from coatkit.run_folder import RunFolder

Say = Callable[[int, int], None]
"""Called after each batch with rows done and rows in all."""


def model_digest(run: RunFolder, checkpoint: Path | None) -> str:
    """What tells the model of a run's checkpoint, or the one before training where that is None, from all others."""
    record = run.read_record()
    digest = hashlib.sha256(str(record["backbone"]["fingerprint"]).encode())
    if checkpoint is not None:
        learnt = file_sha256(checkpoint / "model.safetensors")
    else:  # before training, what learns follows the spec's seed; as the spec was before the project was moved
        learnt = str(record.get("spec_sha256") or file_sha256(run.spec))
    digest.update(learnt.encode())
    return digest.hexdigest()


def identity(
    model: AudioThinker,
    run: RunFolder,
    tasks: Sequence[Task],
    *,
    batch: int,
    shuffled: int | None,
    block: bool = True,
    cot: int | None = None,
) -> dict[str, Any]:
    """All that answers depend on: the model, the rows, and how they are asked.

    Args:
        batch: Rows asked together.
        shuffled: Seed by which sounds are shuffled; None when rows have their own.
        block: Whether the thinking block is there.
        cot: Tokens for a thought in words; None where none is asked for.
    """
    return {
        "model": model_digest(run, model.checkpoint),
        "trained": model.checkpoint is not None,
        "device": next(model.backbone.model.parameters()).device.type,
        "batch": batch,
        "shuffled_sounds": shuffled,
        # None where nothing is out of the ordinary: evaluations that know no such keys are the same.
        "without_block": None if block else True,
        "cot": None if cot is None else {"max_thought_tokens": cot, "instruction": INSTRUCTION},
        "tasks": {
            task.spec.name: {
                "data": task.sha256,
                "source": task.spec.data.model_dump(mode="json", exclude={"path"}),
                "max_new_tokens": task.spec.max_new_tokens,
                "rows": _digest(task.items),
                # Elsewhere answers do not depend on how they are scored.
                **({"options": _options(task.items)} if task.spec.metric == "likelihood" else {}),
            }
            for task in tasks
        },
    }


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(repr([item.index for item in items]).encode()).hexdigest()[:16]


def _options(items: Sequence[Item]) -> str:
    return hashlib.sha256(repr([item.choices for item in items]).encode()).hexdigest()[:16]


def answer_all(
    model: AudioThinker,
    tasks: Sequence[Task],
    into: Predictions,
    *,
    batch: int,
    cot: int | None = None,
    skip_bad: bool = False,
    say: Say = lambda done, total: None,
) -> None:
    """Ask about every row that has no answer yet.

    Args:
        into: Where answers are kept; open.
        batch: Rows asked together.
        cot: Tokens for a thought in words; None asks for none.
        skip_bad: Write down rows whose sound cannot be decoded, and go on.

    Raises:
        DataError: If a sound cannot be decoded, unless such rows are left out.
    """
    planned = [(task, part) for task in tasks for part in batches(task.items, batch)]
    into.keep(part for _, part in planned)
    done, total = len(into.lines), sum(len(task.items) for task in tasks)
    say(done, total)
    for task, part in planned:
        if all(item.key in into.lines for item in part):
            continue
        answers = _ask(model, part, task.spec, cot, skip_bad)
        into.append([_line(item, answer) for item, answer in zip(part, answers, strict=True)])
        done += len(part)
        say(done, total)


def _ask(
    model: AudioThinker, items: Sequence[Item], task: TaskSpec, cot: int | None, skip_bad: bool
) -> list[str | Reasoned | DataError]:
    """An answer for each item, or why there is none."""

    def said(part: Sequence[Item]) -> list[str] | list[Reasoned]:
        if task.metric == "likelihood":
            return likeliest(model, part)
        rows, most = [item.row for item in part], task.max_new_tokens
        if cot is None:
            return model.answer(rows, max_new_tokens=most)
        return reason(model, rows, max_new_tokens=most, max_thought_tokens=cot)

    try:
        return list(said(items))
    except DataError as error:
        if not skip_bad:
            raise
        if len(items) == 1:
            return [error]
    reasons = {item.key: _cannot(model, item) for item in items}
    good = [item for item in items if reasons[item.key] is None]
    answers: Iterator[str | Reasoned] = iter(said(good))
    return [why if (why := reasons[item.key]) is not None else next(answers) for item in items]


def _cannot(model: AudioThinker, item: Item) -> DataError | None:
    try:
        model.prepare([item.row])
    except DataError as error:
        return error
    return None


def _line(item: Item, answer: str | Reasoned | DataError) -> dict[str, Any]:
    outcome: dict[str, Any] = {"bad": str(answer)} if isinstance(answer, DataError) else {"answer": answer}
    if isinstance(answer, Reasoned):
        outcome = {"answer": answer.answer, "thought": answer.thought}
        outcome |= {} if answer.finished else {"cot_unfinished": True}
    return {**item.described(), **outcome}


def folder_for(
    run: Path, name: str, *, trained: bool, shuffled: int | None, block: bool = True, cot: int | None = None
) -> Path:
    """Where an evaluation is kept when no other place is named."""
    suffix = ("" if trained else "-untrained" if block else "-vanilla") + ("" if shuffled is None else "-shuffled")
    suffix += ("-no-block" if trained and not block else "") + ("" if cot is None else "-cot")
    return run / "eval" / f"{name}{suffix}"
