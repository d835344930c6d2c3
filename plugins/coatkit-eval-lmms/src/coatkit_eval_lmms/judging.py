"""Answers to open questions, rated by the judge of `coatkit eval`. Needs no lmms-eval.

Upstream's own judges take a failed request for a rating of 0 and say nothing; here a failure does not count, and is
counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from coatkit import CoatkitError, Message, PluginError, Row
from coatkit.evaluation.items import Item, Task
from coatkit.evaluation.judge import judge_answers
from coatkit.evaluation.judge_client import require_judge
from coatkit.evaluation.suite import JudgeSpec, TaskSpec, read_judge, read_options

DATA, JUDGE = "COATKIT_LMMS_DATA", "COATKIT_LMMS_JUDGE"
_done: dict[str, list[int | None]] = {}
"""Ratings by what was rated: a task has two metrics, and what failed is not to be asked twice."""


def data_folder() -> Path:
    """Where local data is: the folder that COATKIT_LMMS_DATA names, or the one the program was started in."""
    return Path(os.environ.get(DATA) or ".").expanduser().resolve()


def judge_of(task: str) -> JudgeSpec:
    """The judge that COATKIT_LMMS_JUDGE describes: `KEY=VALUE` pairs between spaces, the keys of a suite's `judge`.

    Raises:
        PluginError: If there is none, or it is wrong; or openai is not installed.
        CoatkitError: If there is no key.
    """
    text = os.environ.get(JUDGE, "")
    if not text.strip():
        raise PluginError(f"{task}: answers are rated by a judge; describe it in {JUDGE}, such as {JUDGE}='model=NAME'")
    try:
        spec = read_judge(read_options(text.split()))
    except CoatkitError as error:
        raise PluginError(f"{JUDGE}: {str(error).replace('--judge: ', '').replace('--judge ', '')}") from None
    require_judge(spec)  # ratings of other runs and tasks are no reason to find out hours later
    return spec


def _task(name: str, items: list[Item], spec: JudgeSpec) -> Task:
    return Task(TaskSpec(name=name, data="rows of lmms-eval", metric="judge"), "", items, judge=spec)


def rate(entries: Sequence[Mapping[str, Any]], task: str) -> list[int | None]:
    """Ratings 0 to 5 of answers; None where the judge gave none.

    They are kept in judge.jsonl of the data folder as they come, and not asked for again.

    Args:
        entries: With question, right answers, and what was said.
    """
    known = json.dumps([task, *entries], sort_keys=True)
    if known not in _done:
        items = []
        for i, one in enumerate(entries):
            row = Row(str(i), (Message("user", one["question"]),), (), f"{task}, document {i}")
            items.append(Item(task, i, row, (), tuple(one["references"]), ()))
        lines = {item.key: {"answer": one["said"]} for item, one in zip(items, entries, strict=True)}
        try:
            judged = [_task(task, items, judge_of(task))]
            with FileLock(data_folder() / ".judge.lock"):  # other jobs rate into the same file
                found = judge_answers(judged, lines, data_folder())
        except (CoatkitError, OSError) as error:
            # Whatever else was evaluated would be lost with it: lmms-eval writes all results at the end.
            logging.getLogger(__name__).error("%s: no ratings: %s", task, error)
            found = {}
        _done[known] = [found.get(item.key, {}).get("rating") for item in items]
    return _done[known]
