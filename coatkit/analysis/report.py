"""`coatkit report`: one page on one run or several: what differs, how they learnt, what they score."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from coatkit.analysis import plots
from coatkit.analysis.report_read import Told, read_run
from coatkit.errors import RunError
from coatkit.files import write_atomic
from coatkit.page import Html, page, paragraph, picture, section, table

_NOT_LOSSES = {"step", "stage", "stage_step", "rows", "epoch", "seconds", "lr", "grad_norm"}
_ASIDE = {"output", "name"}
"""Keys that always differ between runs, and say nothing."""


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write a page about runs.

    Args:
        runs: Run folders.
        out: The page.

    Raises:
        RunError: If one is no run folder, or is given twice.
        PluginError: If matplotlib is not installed.
    """
    names = _names(runs)
    told = [read_run(path, name) for path, name in zip(runs, names, strict=True)]
    title = "coatkit: " + ", ".join(names)
    warnings = [
        f"{one.name}: random weights in {', '.join(map(str, one.record['random_weights']))}; it shows nothing real"
        for one in told
        if one.record.get("random_weights")
    ]
    notes = [f"{one.name}: {note}" for one in told for note in one.notes]
    body = [
        *_overview(told),
        *_spec(told),
        *_curves(told),
        *_gradients(told),
        *_evaluations(told),
        *_pictures(told),
        *_environment(told),
    ]
    try:
        write_atomic(out, page(title, body, notes=notes, warnings=warnings))
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    whole = [path.resolve() for path in runs]
    if len(set(whole)) < len(whole):
        raise RunError("a run is given twice; give each once")
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _overview(told: Sequence[Told]) -> list[Html]:
    rows = []
    for one in told:
        experts = ", ".join(one.record.get("experts", {})) or "none"
        data = one.record.get("data", {}).values()
        learns = sum(
            _number(count) or 0.0 for count in _keys(_keys(one.record.get("parameters")).get("trainable")).values()
        )
        last = {key: value for key, value in one.metrics[-1].items() if key == "loss"} if one.metrics else {}
        seconds = sum(_number(line.get("seconds")) or 0.0 for line in one.metrics)
        rows.append(
            [
                one.name,
                str(one.spec.get("backbone.use", "?")),
                experts,
                f"{one.steps:,}",
                f"{sum(int(_number(d.get('rows')) or 0) for d in data):,}",
                f"{learns / 1e6:.2f} M",
                _short(last.get("loss")),
                f"{seconds / 60:.1f} min",
            ]
        )
    heads = ["run", "backbone", "experts", "steps", "rows", "learns", "last loss", "time in steps"]
    return [section("Runs", table(heads, rows, words=(1, 2)))]


def _spec(told: Sequence[Told]) -> list[Html]:
    first = told[0].spec
    if len(told) == 1:
        rows = [[key, _shown(value)] for key, value in first.items()]
        inner = f"<details><summary>{len(rows)} keys</summary>{table(['key', 'value'], rows, words=(1,))}</details>\n"
        return [section("Spec", Html(inner))]
    keys = list(dict.fromkeys(key for one in told for key in one.spec))
    differing = [
        key for key in keys if key not in _ASIDE and len({repr(one.spec.get(key, _Missing)) for one in told}) > 1
    ]
    if not differing:
        return [section("What differs in the specs", paragraph("Nothing."))]
    rows = [[key, *(_shown(one.spec.get(key, _Missing)) for one in told)] for key in differing]
    words = range(1, len(told) + 1)
    return [section("What differs in the specs", table(["key", *(one.name for one in told)], rows, words=[*words]))]


class _Missing:
    """The value of a key that a spec does not have."""


def _shown(value: Any) -> str:
    return "-" if value is _Missing else str(value)


def _curves(told: Sequence[Told]) -> list[Html]:
    terms = list(dict.fromkeys(key for one in told for line in one.metrics for key in line if key not in _NOT_LOSSES))
    terms = [term for term in ("loss", "ce") if term in terms] + [t for t in terms if t not in ("loss", "ce")]
    terms += ["grad_norm"] if terms else []
    if not terms:
        return [section("Losses", paragraph("No step has been taken yet."))]
    columns = min(2, len(terms))
    rows = math.ceil(len(terms) / columns)
    made, axes = plots.figure(9.0, 2.4 * rows, rows, columns)
    for axis, term in zip(axes.flat, terms, strict=False):
        for one, color in zip(told, _colors(len(told)), strict=True):
            steps, values = _series(one.metrics, term)
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, _smooth(values), color=color, linewidth=1.6, label=plots.plain(one.name))
        _stages(axis, told)
        axis.set_title(plots.plain(term), fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=9)
        if term == "grad_norm":
            axis.set_yscale("log")
    for axis in list(axes.flat)[len(terms) :]:
        axis.set_visible(False)
    if len(told) > 1:
        axes.flat[0].legend(fontsize=8, frameon=False)
    caption = "Faint: each step. Strong: smoothed. Dotted: where a stage begins."
    ends = ", ".join(f"{one.name} {_short(_last(one.metrics, 'loss'))}" for one in told)
    return [section("Losses", picture(plots.png(made), f"Loss terms over steps; the last loss: {ends}", caption))]


def _gradients(told: Sequence[Told]) -> list[Html]:
    parts: list[Html] = []
    for one in told:
        if not one.gradients:
            continue
        names = list(dict.fromkeys(name for line in one.gradients for name in line.get("norms", {})))
        pairs = list(dict.fromkeys(pair for line in one.gradients for pair in line.get("cosines", {})))
        made, axes = plots.figure(9.0, 3.0, 1, 2)
        for axis, kind, keys in ((axes[0, 0], "norms", names), (axes[0, 1], "cosines", pairs)):
            for key, color in zip(keys, _colors(len(keys)), strict=True):
                values = [(line["step"], line.get(kind, {}).get(key)) for line in one.gradients]
                kept = [(step, value) for step, value in values if _number(value) is not None]
                shown = plots.plain(key.replace("|", " and "))
                axis.plot(*zip(*kept, strict=True), color=color, linewidth=1.4, marker=".", label=shown)
            axis.set_title({"norms": "norm", "cosines": "cosine"}[kind], fontsize=10, loc="left")
            axis.set_xlabel("step", fontsize=9)
            if keys:
                axis.legend(fontsize=7, frameon=False)
        axes[0, 0].set_yscale("log")
        axes[0, 1].axhline(0, color="#999", linewidth=0.8)
        axes[0, 1].set_ylim(-1.05, 1.05)
        rows = []
        for pair in pairs:
            cosines = [v for line in one.gradients if (v := _number(line.get("cosines", {}).get(pair))) is not None]
            opposed = sum(value < 0 for value in cosines)
            mean = sum(cosines) / len(cosines) if cosines else math.nan
            rows.append([pair.replace("|", " and "), f"{mean:+.3f}", f"{opposed} of {len(cosines)}"])
        said = f"Gradients of {', '.join(names)} on what all share, {len(one.gradients)} looks"
        parts += [
            paragraph(one.name) if len(told) > 1 else Html(),
            picture(plots.png(made), said),
            table(["losses", "mean cosine", "looks below 0"], rows),
        ]
    if not parts:
        return []
    words = "Each loss's own gradient, weighted as in training, on the parameters that all of them teach. Below 0, two"
    return [section("Which teachers pull apart", paragraph(f"{words} pull apart.", "soft"), *parts)]


def _evaluations(told: Sequence[Told]) -> list[Html]:
    rows = []
    for one in told:
        for name, found in one.evaluations.items():
            for task, score in found["tasks"].items():
                span = (
                    "-" if score.get("low") is None else f"{_short(score['low'], 1)} to {_short(score.get('high'), 1)}"
                )
                failures = str(score.get("parse_failures", "-"))
                frequent = _short(_keys(score.get("details")).get("most_frequent_reference"), 1)
                what = [one.name, name, task, str(score.get("metric", "?"))]
                numbers = [str(score.get("rows", "?")), _short(score.get("score"), 1), span, failures, frequent]
                rows.append([*what, *numbers])
    if not rows:
        return [section("Evaluations", paragraph("None yet: coatkit eval RUN --data FILE", "soft"))]
    heads = ["run", "evaluation", "task", "metric", "rows", "score", "95 % interval", "unread", "most frequent"]
    words = (
        "Unread: answers that name no option or several. Most frequent: always giving the most frequent right answer."
    )
    return [section("Evaluations", table(heads, rows, words=(1, 2, 3)), paragraph(words, "soft"))]


def _pictures(told: Sequence[Told]) -> list[Html]:
    found = [(one.name, *those) for one in told for those in one.pictures]
    made = []
    for kind, group in groupby(sorted(found, key=lambda p: p[1].partition("/")[0]), lambda p: p[1].partition("/")[0]):
        parts: list[Html] = []
        for run, title, png, words in group:
            parts.append(picture(png, f"{run}: {title}", f"{run}: {title}"))
            parts += _markdown(words)
        made.append(section({"probe": "Probes", "latency": "Latency", "view": "Views"}.get(kind, kind), *parts))
    return made


def _markdown(words: str) -> list[Html]:
    """Tables and paragraphs of a text in Markdown, as coatkit writes it."""
    made: list[Html] = []
    for is_table, group in groupby(words.splitlines(), lambda line: line.startswith("|")):
        lines = [line for line in group if line.strip()]
        if not is_table:
            made += [paragraph(line.replace("**", ""), "soft") for line in lines]
            continue
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        rows = [row for row in rows if not all(set(cell) <= set("-: ") for cell in row)]
        wide = max(map(len, rows), default=0)
        rows = [row + [""] * (wide - len(row)) for row in rows]
        if rows:
            made.append(table(rows[0], rows[1:]))
    return made


def _environment(told: Sequence[Told]) -> list[Html]:
    facts = [one.record.get("environment", {}) for one in told]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    rows = [[key, *(_shown(fact.get(key, _Missing)) for fact in facts)] for key in keys]
    plugins = [
        {p: f"{c.get('from')} {c.get('version')}" for p, c in one.record.get("components", {}).items()} for one in told
    ]
    places = list(dict.fromkeys(place for one in plugins for place in one))
    rows += [[place, *(one.get(place, "-") for one in plugins)] for place in places]
    return [section("Made with", table(["", *(one.name for one in told)], rows, words=range(1, len(told) + 1)))]


def _series(lines: Sequence[dict[str, Any]], term: str) -> tuple[list[float], list[float]]:
    found = [(line["step"], value) for line in lines if (value := _number(line.get(term))) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _last(lines: Sequence[dict[str, Any]], term: str) -> float | None:
    values = _series(lines, term)[1]
    return values[-1] if values else None


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean that begins without a bias."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _stages(axis: Any, told: Sequence[Told]) -> None:
    starts = {line["step"] for one in told for line in one.metrics if line.get("stage_step") == 1 and line["step"] > 1}
    for step in starts:
        axis.axvline(step, color="#999", linewidth=0.8, linestyle=":")


def _colors(count: int) -> list[str]:
    return [plots.COLORS[i % len(plots.COLORS)] for i in range(count)]


def _keys(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    # Compared, not made a float, which a whole number of 400 digits cannot be.
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if good else None


def _short(value: Any, digits: int = 3) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.{digits}f}"
