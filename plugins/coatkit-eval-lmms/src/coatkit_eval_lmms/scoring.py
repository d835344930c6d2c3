"""Scores of lmms-eval's tasks by the metrics of `coatkit eval`, so that the two agree. Needs no lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from coatkit import PluginError
from coatkit.evaluation.metrics import LOWER_IS_BETTER, METRICS, Answer, Scored
from coatkit_eval_lmms.judging import judge_of, rate

Entry = Mapping[str, Any]
"""An answer with what would have been right, as JSON has it: what lmms-eval gathers and logs for each document."""
Reading = Callable[[Mapping[str, Any]], tuple[Sequence[str], Sequence[str]]]
"""From a document to its right answers and its options, which may be none."""


def entry(said: str, references: Sequence[str], choices: Sequence[str]) -> dict[str, Any]:
    """What is gathered for a document."""
    return {"said": said, "references": list(references), "choices": list(choices)}


def process(
    doc: Mapping[str, Any], results: Sequence[str], *, reading: Reading, names: Sequence[str], question: str = ""
) -> dict[str, Any]:
    """lmms-eval's `process_results`: the same entry for each of a task's metrics.

    Args:
        question: Column of the question, for a judge.
    """
    found = entry(results[0] if results else "", *reading(doc))
    if "id" in doc:  # samples are logged without their document
        found["id"] = doc["id"]
    if question:
        found["question"] = doc[question]
    return dict.fromkeys(names, found)


def scored(entries: Sequence[Entry], metric: str, language: str, task: str = "") -> Scored:
    """The scores of answers."""
    ratings = rate(entries, task) if metric == "judge" else [None] * len(entries)
    answers = [
        Answer(one["said"], tuple(one["references"]), tuple(one["choices"]), rating)
        for one, rating in zip(entries, ratings, strict=True)
    ]
    return METRICS[metric](answers, language)


def _value(results: Sequence[Entry], **how: str) -> float:
    return scored(results, **how).value


def _accuracy(results: Sequence[Entry], **how: str) -> float:
    return float(np.mean(scored(results, **how).rows))


def _unread(results: Sequence[Entry], **how: str) -> float:
    found = scored(results, **how)
    return 100 * found.failures / int(found.kept.sum()) if found.kept.any() else float("nan")


def _not_counted(results: Sequence[Entry], **how: str) -> float:
    return float((~scored(results, **how).kept).sum())


def metric_list(metric: str, language: str, task: str = "") -> list[dict[str, Any]]:
    """lmms-eval's `metric_list`: the metric, and what has to be known beside it.

    `choice`, `f1` and `note` come with `parse_failure_rate`, the share of answers that name no option or several;
    `f1` with `accuracy`; `wer` with `empty_references` and `judge` with `judge_failures`, the number of documents that
    do not count. All but these two are in percent.

    Raises:
        PluginError: If the metric is unknown, or answers are to be rated and there is no judge.
    """
    if metric not in METRICS:
        raise PluginError(f"metric: {metric!r} is unknown; there are: {', '.join(METRICS)}")
    METRICS[metric]((), language)  # a library that is missing is told before anything is asked
    if metric == "judge":
        judge_of(task)
    more: list[tuple[str, Callable[..., float], bool]] = []
    if metric == "f1":
        more.append(("accuracy", _accuracy, True))
    if metric in ("choice", "f1", "note"):
        more.append(("parse_failure_rate", _unread, False))
    if metric == "wer":
        more.append(("empty_references", _not_counted, False))
    if metric == "judge":
        more.append(("judge_failures", _not_counted, False))
    how: dict[str, Any] = {"metric": metric, "language": language, "task": task}
    return [
        {"metric": name, "aggregation": partial(function, **how), "higher_is_better": better}
        for name, function, better in [(metric, _value, metric not in LOWER_IS_BETTER), *more]
    ]
