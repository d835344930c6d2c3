"""Two evaluations of the same rows, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coatkit.errors import RunError
from coatkit.evaluation.bootstrap import Paired, paired
from coatkit.evaluation.metrics import METRICS
from coatkit.evaluation.predictions import read_lines, read_record
from coatkit.evaluation.results import answers_of

_SAME = ("index", "id", "question", "references", "choices")


def compare(first: Path, second: Path) -> dict[str, tuple[str, Paired]]:
    """Metric and paired comparison of each task of two evaluations' folders.

    Raises:
        RunError: If one is no finished evaluation, or they have not the same tasks, metrics, data or rows; names where
            they part.
    """
    one, two = read_finished(first), read_finished(second)
    if (names := [list(part) for part in (one, two)])[0] != names[1]:
        raise RunError(f"{first} and {second} have other tasks: {', '.join(names[0])} and {', '.join(names[1])}")
    found = {}
    for name, (task, lines) in one.items():
        other, others = two[name]
        for key in ("metric", "language", "data", "judge"):
            if task.get(key) != other.get(key):
                raise RunError(
                    f"task {name!r}: {first} and {second} differ in {key}: {task.get(key)} and {other.get(key)}"
                )
        check_same_rows(name, lines, others, (first, second))
        score = METRICS[task["metric"]]
        parts = rated_in_all(name, (lines, others))
        scored = [score(answers_of(part), task["language"]) for part in parts]
        found[name] = task["metric"], replace(paired(scored[0], scored[1]), left_out=len(lines) - len(parts[0]))
    return found


def rated_in_all(name: str, parts: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The lines of several evaluations of the same rows, without the rows that a judge did not rate in all of them.

    Raises:
        RunError: If no row is left.
    """
    good = [i for i, row in enumerate(zip(*parts, strict=True)) if not any("judge_failure" in line for line in row)]
    if parts[0] and not good:
        raise RunError(f"task {name!r}: no row was rated by the judge in all evaluations; run them again")
    return [[part[i] for i in good] for part in parts]


def read_finished(folder: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each task's scoring and its lines.

    Raises:
        RunError: If the folder holds no finished evaluation.
    """
    record = read_record(folder)
    lines = read_lines(folder / "predictions.jsonl")
    if not (folder / "results.json").exists() or any("score" not in line and "bad" not in line for line in lines):
        raise RunError(f"{folder}: the evaluation is not finished; run it again, and it goes on where it stopped")
    try:
        data = record["identity"]["tasks"]
        found = {
            name: ({**task, "data": data[name]["data"]}, [line for line in lines if line["task"] == name])
            for name, task in record["scoring"].items()
        }
        known = all(task["metric"] in METRICS and isinstance(task["language"], str) for task, _ in found.values())
    except (KeyError, TypeError, AttributeError, IndexError):
        known = False
    if not known:
        raise RunError(f"{folder}/eval.json: damaged; evaluate again with --restart")
    for line in lines:
        if "bad" not in line and not {"answer", "references"} <= line.keys():
            raise RunError(
                f"{folder}/predictions.jsonl: row {line['id']!r:.80} is damaged; evaluate again with --restart"
            )
    return found


def check_same_rows(
    name: str, one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]], folders: tuple[Path, Path]
) -> None:
    """Check that two evaluations of a task answered the same rows.

    Raises:
        RunError: If they did not; names where they part.
    """
    for a, b in zip(one, two, strict=False):
        if wrong := [key for key in _SAME if a.get(key) != b.get(key)]:
            raise RunError(
                f"task {name!r}: {folders[0]} and {folders[1]} part at row {a['id']} ({wrong[0]}): compare evaluations"
                " of the same rows"
            )
        if ("bad" in a) != ("bad" in b):
            which = folders[0] if "bad" in a else folders[1]
            raise RunError(f"task {name!r}: row {a['id']} is bad in {which} alone; evaluate that again")
    if len(one) != len(two):
        raise RunError(
            f"task {name!r}: {folders[0]} has {len(one)} rows and {folders[1]} has {len(two)}: compare evaluations of"
            " the same rows"
        )
    if any("bad" in line for line in one):
        raise RunError(f"task {name!r}: both hold rows that could not be decoded; evaluate again without them")
