"""The rows of each task: read, checked, with their right answers, in the order they are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coatkit.data import audio as sound
from coatkit.data.filters import Sieve
from coatkit.data.pools import permutation
from coatkit.data.rows import Row, Rows
from coatkit.data.sources import open_data
from coatkit.errors import DataError, SpecError
from coatkit.evaluation.metrics import Answer, cannot_score
from coatkit.evaluation.suite import METRICS, WITH_CHOICES, JudgeSpec, SuiteSpec, TaskSpec
from coatkit.protocols import Preparer
from coatkit.spec_data import FilterSpec, SourceSpec

Key = tuple[str, int]
"""Task and index of a row in its file."""
_SHOWN = 10


@dataclass(frozen=True)
class Item:
    """A row to ask about.

    Attributes:
        index: Of the row in its file.
        seconds: Of each of its sounds.
        references: Right answers, at least one.
        choices: Options; empty where it has none.
    """

    task: str
    index: int
    row: Row
    seconds: tuple[float, ...]
    references: tuple[str, ...]
    choices: tuple[str, ...]

    @property
    def key(self) -> Key:
        return self.task, self.index

    def described(self) -> dict[str, Any]:
        """The row as predictions.jsonl has it, without an answer; the question is the last thing the user says."""
        found = {"task": self.task, "index": self.index, "id": self.row.id, "question": self.row.question}
        choices = {"choices": list(self.choices)} if self.choices else {}
        return {**found, "references": list(self.references), **choices}


@dataclass
class Task:
    """A task with its rows.

    Attributes:
        sha256: Digest of the file its rows are in, hex.
        left_out: Rows its filter does not take.
        bad: Index, row id and reason of each row that cannot be used.
        own_sound: With shuffled sounds: rows that kept their own, for want of another to exchange with.
        judge: What rates the answers, for the metric `judge`.
    """

    spec: TaskSpec
    sha256: str
    items: list[Item] = field(default_factory=list)
    left_out: int = 0
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    own_sound: int = 0
    judge: JudgeSpec | None = None


def tasks_of_suite(suite: SuiteSpec, limit: int | None = None) -> list[Task]:
    """Every task of a suite with its rows.

    Args:
        limit: Take the first so many rows of each task that its filter takes.

    Raises:
        DataError: If a file cannot be opened, or a task's filter takes no row.
    """
    opened: dict[str, tuple[Rows, str]] = {}
    tasks = []
    for spec in suite.tasks:
        source = spec.data.model_dump_json(exclude={"filter"})
        if source not in opened:
            rows = open_data(spec.data)
            opened[source] = rows, rows.fingerprint()
        rows, digest = opened[source]
        task, sieve = Task(spec, digest, judge=suite.judge), Sieve({"the task": spec.data.filter})
        for index in range(len(rows)):
            if limit is not None and len(task.items) + len(task.bad) >= limit:
                break
            _take(rows, index, task, sieve)
        if not task.items and not task.bad:
            unknown = sieve.unknown_key()
            why = f"its filter asks for {unknown[1]}, a key no row has" if unknown else sieve.reasons()
            raise DataError(f"task {spec.name!r}: {spec.data.path}: no row is left of {len(rows)}: {why}")
        tasks.append(task)
    return tasks


def tasks_of_rows(
    path: Path,
    *,
    metric: str | None = None,
    choices: Sequence[str] | None = None,
    reference: str | None = None,
    max_new_tokens: int = 64,
    limit: int | None = None,
    judge: JudgeSpec | None = None,
) -> list[Task]:
    """The rows of one file, a task for each value of their label `task`, scored by `metric` or their label `metric`.

    Raises:
        DataError: If the file cannot be opened, or a row names no metric.
        SpecError: If the metric does not go with the choices.
    """
    rows = open_data(SourceSpec(path=str(path)))
    digest, tasks = rows.fingerprint(), dict[str, Task]()
    unread: list[tuple[int, str, str]] = []
    for index in range(len(rows)):
        try:
            row = rows[index]
        except DataError as error:
            unread.append((index, f"line {index + 1}", str(error)))
            continue
        name, said = str(row.labels.get("task", "all")), metric or row.labels.get("metric")
        if name not in tasks:
            if said not in METRICS:
                has = f"its metric is {said!r}" if said else "it has no label 'metric'"
                raise DataError(f"{rows.where(index)}: {has}; name one with --metric: {', '.join(METRICS)}")
            given: dict[str, Any] = {"choices": list(choices) if choices else None, "reference": reference}
            try:
                spec = TaskSpec(name=name, data=str(path), metric=said, max_new_tokens=max_new_tokens, **given)
            except ValidationError as error:
                problems = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
                raise SpecError([f"task {name!r}: {problem}" for problem in problems]) from None
            tasks[name] = Task(spec, digest, judge=judge)
        task = tasks[name]
        if limit is None or len(task.items) + len(task.bad) < limit:
            _take(rows, index, task, Sieve({"the task": FilterSpec()}))
    if not tasks:
        raise DataError(f"no row of {path} can be read, first: {unread[0][2]}")
    next(iter(tasks.values())).bad += unread  # nobody can say whose they are
    return list(tasks.values())


def _take(rows: Rows, index: int, task: Task, sieve: Sieve) -> None:
    row_id = f"line {index + 1}"
    try:
        row = rows[index]
        row_id = row.id
        if not sieve.takes(row):
            task.left_out += 1
            return
        task.items.append(_item(row, index, task.spec))
    except DataError as error:
        task.bad.append((index, row_id, str(error)))


def _item(row: Row, index: int, spec: TaskSpec) -> Item:
    answer = Answer("", _references(row, spec), _choices(row, spec))
    if reason := cannot_score(spec.metric, answer):
        raise row.fail(reason)
    try:
        seconds = tuple(sound.duration(ref) for ref in row.audios)
    except DataError as error:
        raise row.fail(str(error)) from None
    return Item(spec.name, index, row, seconds, answer.references, answer.choices)


def _references(row: Row, spec: TaskSpec) -> tuple[str, ...]:
    if spec.reference is None:
        if row.messages[-1].role != "assistant":
            raise row.fail("has no right answer: its last message is not the assistant's; name a key with `reference`")
        return (row.messages[-1].content,)
    found = row.labels.get(spec.reference)
    several = found if isinstance(found, list) else [found]
    if not several or any(not isinstance(one, str | int | float) or isinstance(one, bool) for one in several):
        raise row.fail(f"{spec.reference!r} must hold the right answer, a text or a list of texts; found {found!r:.60}")
    return tuple(str(one) for one in several)


def _choices(row: Row, spec: TaskSpec) -> tuple[str, ...]:
    found = row.labels.get("choices") if spec.metric in WITH_CHOICES else None
    if found is None:
        return tuple(spec.choices or ())
    if isinstance(found, dict) and list(found) == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(found)]):
        found = list(found.values())
    good = isinstance(found, list) and 2 <= len(found) <= 26 and all(isinstance(o, str) and o.strip() for o in found)
    if not good or len({" ".join(o.casefold().split()) for o in found}) < len(found):
        raise row.fail("'choices' must be a list of 2 to 26 different texts, or an object of them by A, B, C, ...")
    return tuple(found)


def unhearable(tasks: Sequence[Task], preparer: Preparer) -> None:
    """Set aside the rows with a sound that this backbone cannot hear in full."""
    for task in tasks:
        good = []
        for item in task.items:
            reasons = [reason for s in item.seconds if (reason := preparer.cannot_hear(s))]
            if reasons:
                task.bad.append((item.index, item.row.id, str(item.row.fail(reasons[0]))))
            else:
                good.append(item)
        task.items = good


def refuse_bad(tasks: Sequence[Task], skip: bool) -> None:
    """Refuse bad rows unless they are to be left out; and tasks without a good one.

    Raises:
        DataError: Naming the first of them.
    """
    reasons = [reason for task in tasks for _, _, reason in task.bad]
    if reasons and not skip:
        shown = "\n".join(f"  {reason}" for reason in reasons[:_SHOWN])
        more = f"\n  ... and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        raise DataError(
            f"{len(reasons)} bad row(s):\n{shown}{more}\n  Repair or remove them, or leave them out with --skip-bad,"
            " which says how many and which."
        )
    for task in tasks:
        if not task.items:
            raise DataError(f"task {task.spec.name!r}: every row is bad, first: {task.bad[0][2]}")


def shuffle_sounds(tasks: Sequence[Task], seed: int) -> None:
    """Give each row the sounds of another row of its task: what is then still right was not heard.

    Rows of as many sounds exchange with one another, in a ring shuffled by the seed. A row keeps its own sounds only
    where no other of the task has as many, or the other has the same.
    """
    for task in tasks:
        by_count: dict[int, list[int]] = {}
        for i, item in enumerate(task.items):
            by_count.setdefault(len(item.row.audios), []).append(i)
        before, after = task.items, list(task.items)
        for count, places in by_count.items():
            if not count:
                continue
            ring = [places[i] for i in permutation(len(places), seed, "sounds", task.spec.name, count)]
            for at, place in enumerate(ring):
                giver = before[ring[(at + 1) % len(ring)]]
                task.own_sound += giver.row.audios == before[place].row.audios
                row = replace(before[place].row, audios=giver.row.audios)
                after[place] = replace(before[place], row=row, seconds=giver.seconds)
        task.items = after


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items of like length together, longest first: what does not fit into memory then shows at once."""
    order = sorted(items, key=lambda i: (-sum(i.seconds), -sum(len(m.content) for m in i.row.messages), i.index))
    for at in range(0, len(order), size):
        yield order[at : at + size]
