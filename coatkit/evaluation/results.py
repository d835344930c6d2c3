"""From answers to results: a score for each task with its interval, and a score for each row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from coatkit import __version__
from coatkit.evaluation.bootstrap import DRAWS, interval
from coatkit.evaluation.items import Key, Task
from coatkit.evaluation.judge_client import judge_identity
from coatkit.evaluation.metrics import LOWER_IS_BETTER, METRICS, Answer, Scored

_LIBRARIES = ["torch", "transformers", "numpy", "openai"]
_LIBRARIES += ["jiwer", "whisper-normalizer", "scikit-learn", "scipy", "sacrebleu"]
_NONE: Mapping[Key, dict[str, Any]] = {}
_REASONS = 10
"""Most reasons for missing ratings that results hold."""


def score_tasks(
    tasks: Sequence[Task], lines: Mapping[Key, dict[str, Any]], ratings: Mapping[Key, dict[str, Any]] = _NONE
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results of each task by its name, and the lines with the score of each row, in the data's order.

    Args:
        ratings: What a judge said of answers, from `judge_answers`.
    """
    results, scored_lines = {}, []
    for task in tasks:
        # Right answers and choices are the rows' of now; what was said is what was said.
        mine = [item.described() | _outcome(lines[item.key]) | ratings.get(item.key, {}) for item in task.items]
        good = [line for line in mine if "answer" in line]
        scored = METRICS[task.spec.metric](answers_of(good), task.spec.language)
        results[task.spec.name] = _result(task, mine, scored)
        for line, row, read in zip(good, scored.rows.tolist(), scored.read_as, strict=True):
            line.update(read_as=read, score=None if math.isnan(row) else round(row, 4))
        scored_lines += mine
    return results, scored_lines


def _outcome(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("answer", "bad", "thought", "cot_unfinished") if key in line}


def answers_of(lines: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Lines of predictions.jsonl as answers to score."""
    return [
        Answer(line["answer"], tuple(line["references"]), tuple(line.get("choices", ())), line.get("rating"))
        for line in lines
    ]


def _result(task: Task, lines: Sequence[Mapping[str, Any]], scored: Scored) -> dict[str, Any]:
    low, high = interval(scored)
    bad = [{"index": index, "id": name, "reason": reason} for index, name, reason in task.bad]
    bad += [{"index": line["index"], "id": line["id"], "reason": line["bad"]} for line in lines if "bad" in line]
    counted = int(scored.kept.sum())
    unrated = Counter(line["judge_failure"] for line in lines if "judge_failure" in line)
    result: dict[str, Any] = {
        "metric": task.spec.metric,
        "better": "lower" if task.spec.metric in LOWER_IS_BETTER else "higher",
        "score": scored.value,
        "low": low,
        "high": high,
        "rows": counted,
        "bad": len(bad),
        "empty_references": len(scored.rows) - counted - unrated.total(),
        "filtered_out": task.left_out,
    }
    if scored.parse:
        result["parse_failures"] = scored.failures
        result["parse_failure_rate"] = 100 * scored.failures / counted if counted else float("nan")
    if task.spec.metric == "judge" and task.judge is not None:
        result["judge"] = {**judge_identity(task.judge), "base_url": task.judge.base_url}
        result["judge_failures"] = unrated.total()
        result["judge_failure_reasons"] = dict(unrated.most_common(_REASONS))
    if any("thought" in line for line in lines):
        result["cot_unfinished"] = sum("cot_unfinished" in line for line in lines)
    if task.own_sound:
        result["own_sound"] = task.own_sound
    result.update(details=scored.details, bad_rows=bad)
    return _plain(result)  # type: ignore[no-any-return]


def made_with(run: Mapping[str, Any]) -> dict[str, Any]:
    """What results say of themselves beside the scores."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return {**run, "coatkit": __version__, "libraries": found, "interval": f"95 %, bootstrap over rows, {DRAWS} draws"}


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not there is null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if math.isfinite(value) else None
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
