"""From the evaluations of an ablation to its table: means over seeds, and differences paired by seed and by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coatkit.errors import RunError
from coatkit.evaluation.bootstrap import DRAWS, over_seeds, over_seeds_t, two_sided
from coatkit.evaluation.compare import check_same_rows, rated_in_all, read_finished
from coatkit.evaluation.metrics import LOWER_IS_BETTER, METRICS, Array, Scored
from coatkit.evaluation.results import answers_of

Evaluations = Mapping[str, Mapping[int, Path]]
"""Arm to seed to the folder of the evaluation."""


def score_arms(evaluations: Evaluations, baselines: Mapping[str, str], draws: int = DRAWS) -> dict[str, Any]:
    """Each task with the scores of every arm, as plain data.

    An arm's difference is to its baseline on the seeds both have. Its interval and p-value come from draws of seeds and
    rows (`bootstrap.over_seeds`); they are null where there is nothing to compare. Rows that a judge did not rate in
    all evaluations are left out.

    Args:
        baselines: Arm to the arm it is compared with.
        draws: Of the bootstrap.

    Raises:
        RunError: If an evaluation is not finished, or two are not of the same rows.
    """
    answered: dict[str, dict[tuple[str, int], list[dict[str, Any]]]] = {}
    first: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Path]] = {}
    for arm, seeds in evaluations.items():
        for seed, folder in seeds.items():
            for task, (how, lines) in read_finished(folder).items():
                one = first.setdefault(task, (how, lines, folder))
                for key in ("metric", "language", "data", "judge"):
                    if how.get(key) != one[0].get(key):
                        raise RunError(f"task {task!r}: {one[2]} and {folder} differ in {key}; evaluate with --restart")
                check_same_rows(task, one[1], lines, (one[2], folder))
                answered.setdefault(task, {})[arm, seed] = lines
    scored: dict[str, dict[str, dict[int, Scored]]] = {}
    for task, runs in answered.items():
        how = first[task][0]
        for (arm, seed), lines in zip(runs, rated_in_all(task, list(runs.values())), strict=True):
            found = METRICS[how["metric"]](answers_of(lines), how["language"])
            scored.setdefault(task, {}).setdefault(arm, {})[seed] = found
    return {task: _task(first[task][0]["metric"], arms, baselines, draws) for task, arms in scored.items()}


def _task(
    metric: str, arms: Mapping[str, Mapping[int, Scored]], baselines: Mapping[str, str], draws: int
) -> dict[str, Any]:
    any_one = next(iter(next(iter(arms.values())).values()))
    # With the same seeds the draws are the same, so they are kept: an arm's own serve for its difference too.
    kept: dict[tuple[str, tuple[int, ...]], Array] = {}

    def drawn(arm: str, seeds: Sequence[int]) -> Array:
        key = arm, tuple(seeds)
        if key not in kept:
            kept[key] = over_seeds([arms[arm][seed] for seed in seeds], draws)
        return kept[key]

    def mean(arm: str, seeds: Sequence[int]) -> float:
        return float(np.mean([arms[arm][seed].value for seed in seeds]))

    table: dict[str, Any] = {}
    for arm, runs in arms.items():
        seeds = sorted(runs)
        low, high = _ends(drawn(arm, seeds))
        entry: dict[str, Any] = {
            "score": _number(mean(arm, seeds)),
            "low": low,
            "high": high,
            "seeds": {str(seed): _number(runs[seed].value) for seed in seeds},
        }
        if any_one.parse:
            entry["parse_failures"] = sum(run.failures for run in runs.values())
        against = baselines[arm]
        both = sorted(set(seeds) & set(arms.get(against, {})))
        if against != arm and both:
            differences = drawn(arm, both) - drawn(against, both)
            low, high = _ends(differences)
            finite = differences[np.isfinite(differences)]
            each = [runs[seed].value - arms[against][seed].value for seed in both]
            entry["difference"] = {
                "to": against,
                "seeds": both,
                "points": _number(mean(arm, both) - mean(against, both)),
                "low": low,
                "high": high,
                "p": _number(two_sided(finite)) if finite.size else None,
                "by_seed": {str(seed): _number(one) for seed, one in zip(both, each, strict=True)},
                "p_seeds": None if (p := over_seeds_t(each)) is None else _number(p),
            }
        table[arm] = entry
    return {
        "metric": metric,
        "better": "lower" if metric in LOWER_IS_BETTER else "higher",
        "rows": int(any_one.kept.sum()),
        "most_frequent_reference": _number(any_one.details.get("most_frequent_reference", float("nan"))),
        "arms": table,
    }


def _ends(drawn: Array) -> tuple[float | None, float | None]:
    finite = drawn[np.isfinite(drawn)]
    if not finite.size:
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return _number(low), _number(high)


def _number(value: float) -> float | None:
    """JSON has no NaN: what is not there is null."""
    return round(float(value), 6) if np.isfinite(value) else None


HEADER = (
    "task",
    "arm",
    "seeds",
    "steps",
    "rows",
    "score",
    "95 % interval",
    "difference",
    "95 % interval",
    "p",
    "p (seeds)",
    "unread",
)


def lines_of(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells from results.json, the header first."""
    table: list[tuple[str, ...]] = [HEADER]
    wanted = len(results["seeds"])
    for name, task in results["tasks"].items():
        arrow = ", lower is better" if task["better"] == "lower" else ""
        for arm, entry in task["arms"].items():
            about = results["arms"].get(arm) or results["arms"][results["controls"][arm]["of"]]
            mark = "*" if about["differs"] else ""
            seeds = f"{len(entry['seeds'])}" + (f" of {wanted}" if len(entry["seeds"]) < wanted else "")
            trained = arm not in results["controls"] or results["controls"][arm]["trained"]
            found = entry.get("difference")
            table.append(
                (
                    f"{name} ({task['metric']}{arrow})",
                    arm,
                    seeds,
                    f"{about['steps']}{mark}" if trained else "0",
                    ("-" if about["rows"] is None else f"{about['rows']}{mark}") if trained else "0",
                    _shown(entry["score"]),
                    _span(entry, "{:.1f}"),
                    "-" if found is None else _shown(found["points"], "{:+.1f}"),
                    "-" if found is None else _span(found, "{:+.1f}"),
                    *("-" if found is None or found[key] is None else _p(found[key]) for key in ("p", "p_seeds")),
                    str(entry.get("parse_failures", "-")),
                )
            )
    return table


def _shown(value: float | None, how: str = "{:.1f}") -> str:
    return "-" if value is None else how.format(value)


def _span(entry: Mapping[str, Any], how: str) -> str:
    return "-" if entry["low"] is None else f"{how.format(entry['low'])} to {how.format(entry['high'])}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know; what is amiss comes first."""
    said = []
    random = sorted({place for run in results["runs"].values() for place in run.get("random_weights", ())})
    if random:
        said.append(f"RANDOM WEIGHTS in {', '.join(random)}: these runs teach nothing real.")
    runs = results["runs"].values()
    if left := [run for run in runs if run["state"] != "done"]:
        said.append(f"Not complete: {len(left)} of {len(runs)} runs are not done.")
    said += [
        f"{arm}*: not the same training: {', '.join(a['differs'])}."
        for arm, a in results["arms"].items()
        if a["differs"]
    ]
    if not any(a["differs"] for a in results["arms"].values()):
        said.append("All arms train the same steps on the same data, with as many rows.")
    said.append(
        "Score: mean over seeds, in percent. Intervals and p: bootstrap over seeds and rows"
        f" ({results['draws']} draws), differences paired by seed and row. p (seeds): t-test of the differences, one"
        " for each seed, on these rows. Neither is corrected for the number of arms."
    )
    if len(results["seeds"]) < 3:
        why = (
            "the intervals are over rows alone"
            if len(results["seeds"]) == 1
            else "two trainings tell little of their spread"
        )
        said.append(f"With so few seeds {why}; take three or more.")
    for name, task in results["tasks"].items():
        if task["most_frequent_reference"] is not None:
            said.append(
                f"{name}: {task['rows']} rows; always giving the most frequent right answer:"
                f" {task['most_frequent_reference']:.1f}."
            )
        else:
            said.append(f"{name}: {task['rows']} rows.")
    return said


def markdown(results: Mapping[str, Any]) -> str:
    """table.md."""
    header, *rows = lines_of(results)
    lines = [f"# Ablation {results['name']}", ""]
    lines += [
        f"Base `{results['base']}`, suite `{results['suite']}`, seeds {', '.join(map(str, results['seeds']))}.",
        "",
    ]
    lines += [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] * 2 + ['---:'] * (len(header) - 2))}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {said}" for said in remarks(results)), "", "| arm | differs from the base in |", "|---|---|"]
    for arm, about in results["arms"].items():
        lines.append(f"| {arm} | {', '.join(f'`{change}`' for change in about['changes']) or 'nothing'} |")
    lines += [f"| {arm} | {about['says']} |" for arm, about in results["controls"].items()]
    failed = {name: run for name, run in results["runs"].items() if run["state"] == "failed"}
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {name}: {' '.join(run['reason'].split())}" for name, run in failed.items()]
    return "\n".join(lines) + "\n"
