"""`coatkit probe`: from a run and tasks to probes over its checkpoints, with controls, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coatkit import checkpoint
from coatkit.analysis import plots
from coatkit.analysis.probe import (
    SHUFFLES,
    OutOfFold,
    Settings,
    accuracy,
    check,
    probe,
    rank_correlation,
    shuffled,
)
from coatkit.analysis.probe_states import KINDS, LAST, Source, collect, hearable
from coatkit.errors import RunError
from coatkit.evaluation.compare import read_finished
from coatkit.evaluation.evaluate import evaluate
from coatkit.evaluation.generate import model_digest
from coatkit.evaluation.items import Item, Task, refuse_bad
from coatkit.evaluation.predictions import read_record
from coatkit.files import write_atomic
from coatkit.run_folder import RunFolder

VANILLA = "vanilla"
_OTHERWISE = {"without_block": "without the thinking block", "cot": "after a thought in words"}
_OTHERWISE |= {"shuffled_sounds": "to exchanged sounds"}


@dataclass(frozen=True)
class Labelled:
    """A task's rows as probes take them: what is to be read off, and what must stay together."""

    task: Task
    labels: list[str]
    groups: list[str]


def labelled(task: Task, label: str | None, group: str | None) -> Labelled:
    """Labels and groups of a task's rows.

    Args:
        label: Key of the rows; the right answer when left out.
        group: Key of the rows; their sounds' files when left out.

    Raises:
        DataError: If a row lacks a key; names it.
    """
    return Labelled(
        task,
        [item.references[0] if label is None else _text(item, label) for item in task.items],
        [_sounds(item) if group is None else _text(item, group) for item in task.items],
    )


def _text(item: Item, key: str) -> str:
    value = item.row.labels.get(key)
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise item.row.fail(f"{key!r} must be a text or a number to probe for; found {value!r:.60}")
    return str(value)


def _sounds(item: Item) -> str:
    return " ".join(str(ref.path) for ref in item.row.audios) or item.row.id


def run_probes(
    run: Path,
    tasks: Sequence[Task],
    out: Path,
    *,
    label: str | None = None,
    group: str | None = None,
    steps: Sequence[int] | None = None,
    correct: Path | None = None,
    settings: Settings = Settings(),  # noqa: B008
    batch: int = 8,
    skip_bad: bool = False,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Probe a run's states over its checkpoints, and write results.json, table.md and probe.png into `out`.

    Args:
        tasks: From `tasks_of_suite` or `tasks_of_rows`; a probe for each.
        label: Key of the rows to read off the states; the right answer when left out.
        group: Key of the rows whose value must not be on both sides; the sound's file when left out.
        steps: Checkpoints to probe, 0 for before training; all of them, and 0, when left out.
        correct: An evaluation's folder with answers of one of `steps` to the same rows; else the newest is asked here.
        skip_bad: Leave bad rows out.

    Returns:
        What is in results.json.

    Raises:
        DataError: If rows are bad, or too few for the folds.
        RunError: If the run has no such checkpoint, or the evaluation is not of these rows and one of these models.
        PluginError: If scikit-learn or matplotlib is not installed.
    """
    plots.figure()  # a library that is missing is told before anything is run
    refuse_bad(tasks, skip_bad)
    hearable(run, tasks, device)
    refuse_bad(tasks, skip_bad)
    rows = [labelled(task, label, group) for task in tasks]
    for one in rows:
        check(one.labels, one.groups, settings.folds, one.task.spec.name)
    sources = _sources(run, steps)
    if correct is None:
        answered = max(source.step for source in sources)
        correct = _ask(run, tasks, out, answered, batch=batch, skip_bad=skip_bad, device=device, say=say)
    else:
        answered = _answered(run, correct, sources)
    right = _correct(tasks, correct)
    results: dict[str, Any] = {
        "run": str(run),
        "settings": {"C": settings.c, "folds": settings.folds, "seed": settings.seed, "shuffles": SHUFFLES},
        "label": label or "the right answer",
        "group": group or "the sound's file",
        "answered": answered,
        "tasks": {one.task.spec.name: _about(one) for one in rows},
    }
    for source in sources:
        found = collect(run, source, tasks, out / "states", batch=batch, device=device, say=say)
        for one in rows:
            name = one.task.spec.name
            for kind in (LAST,) if source.vanilla else KINDS:
                if (states := found[name].get(kind)) is None:
                    continue
                seen = probe(states, one.labels, one.groups, settings)
                cell = {"kind": kind, "source": source.name, "step": source.step}
                cell |= accuracy(seen, one.groups, settings.seed)
                cell["shuffled"] = shuffled(states, one.labels, one.groups, settings)
                # A correctness is of the model that answered: the vanilla model's states only stand beside it.
                if source.step == answered or source.vanilla:
                    cell["foretells"] = _foretells(seen, right[name], one.groups, settings.seed)
                results["tasks"][name]["probes"].append(cell)
    _write(out, results)
    return results


def _sources(run: Path, steps: Sequence[int] | None) -> list[Source]:
    folder = RunFolder(run)
    there = [checkpoint.step_of(path) for path in checkpoint.complete(folder.checkpoints)]
    wanted = [0, *there] if steps is None else sorted(set(steps))
    for step in wanted:
        if step:
            folder.at(step)  # names those there are
    if not any(wanted):
        raise RunError(f"{run}: has no checkpoint to probe")
    return [Source(0, vanilla=True), *(Source(step) for step in wanted)]


def _about(one: Labelled) -> dict[str, Any]:
    names, counts = np.unique(np.asarray(one.labels), return_counts=True)
    return {
        "rows": len(one.labels),
        "groups": len(set(one.groups)),
        "bad": len(one.task.bad),
        "classes": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "most_frequent": 100 * float(counts.max() / counts.sum()),
        "probes": [],
    }


def _ask(run: Path, tasks: Sequence[Task], out: Path, step: int, *, say: Callable[[str], None], **options: Any) -> Path:
    """The folder of the run's own answers; those that are there are used again."""
    if step != _newest(run):
        raise RunError(f"{run}: answers are of its newest checkpoint; probe that too, or name --correct FOLDER")
    say("asking the run itself")
    # A folder for each step: a run that was trained on is asked anew.
    folder, _ = evaluate(run, "probe", tasks, out=out / "answers" / Source(step).name, **options)
    return folder


def _answered(run: Path, evaluation: Path, sources: Sequence[Source]) -> int:
    """The step whose model gave an evaluation's answers.

    Raises:
        RunError: If none of those that are probed did, or not in the way that is probed.
    """
    asked = read_record(evaluation)["identity"]
    for key, how in _OTHERWISE.items():
        if asked.get(key) is not None:
            raise RunError(f"{evaluation}: its answers were given {how}; --correct takes the run's plain ones")
    folder = RunFolder(run)
    for source in sources:
        at = folder.at(source.step) if source.step else None
        if not source.vanilla and asked.get("model") == model_digest(folder, at):
            return source.step
    steps = ", ".join(str(source.step) for source in sources if not source.vanilla)
    raise RunError(
        f"{evaluation}: its answers are not of this run at step {steps}; add the step that answered to --steps, or name"
        " another evaluation"
    )


def _correct(tasks: Sequence[Task], folder: Path) -> dict[str, np.ndarray]:
    """Whether the answer to each row was right, [N] of 0 and 1 by task."""
    answered = read_finished(folder)
    found = {}
    for task in tasks:
        _, lines = answered.get(task.spec.name, ({}, []))
        scores = {(line["index"], line["id"]): line.get("score") for line in lines}
        mine = [scores.get((item.index, item.row.id)) for item in task.items]
        if any(score not in (0, 100) for score in mine):
            raise RunError(
                f"{folder}: has not for every row of task {task.spec.name!r} whether its answer was right; it must be"
                " of the same rows, with a metric that is right or wrong (choice, exact)"
            )
        found[task.spec.name] = np.asarray([score == 100 for score in mine], float)
    return found


def _newest(run: Path) -> int:
    latest = RunFolder(run).latest()
    return 0 if latest is None else checkpoint.step_of(latest)


def _foretells(seen: OutOfFold, right: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, Any]:
    return {
        "answers_right": 100 * float(right.mean()),
        "most_probable": rank_correlation(seen.sure, right, groups, seed),
        "true_class": rank_correlation(seen.of_true, right, groups, seed),
    }


def table(results: dict[str, Any]) -> list[str]:
    """Lines in Markdown: accuracies by step, and what confidence foretells."""
    lines = []
    for name, task in results["tasks"].items():
        lines += [
            f"**{name}**: {task['rows']} rows in {task['groups']} groups, classes "
            + ", ".join(f"{label} {count}" for label, count in task["classes"].items())
            + f"; always the most frequent: {task['most_frequent']:.1f}",
            "",
            "| states | step | accuracy | 95 % interval | labels shuffled (highest) |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {_title(cell)} | {cell['step']} | {cell['accuracy']:.1f} | {cell['low']:.1f} to {cell['high']:.1f} |"
            f" {cell['shuffled']['mean']:.1f} ({cell['shuffled']['highest']:.1f}) |"
            for cell in _ordered(task["probes"])
        ]
        lines += [
            "",
            "| states | answers right | rho, most probable class | rho, true class |",
            "|---|---|---|---|",
        ]
        for cell in _ordered(task["probes"]):
            if said := cell.get("foretells"):
                both = (_rho(said["most_probable"]), _rho(said["true_class"]))
                lines.append(f"| {_title(cell)} | {said['answers_right']:.1f} | {both[0]} | {both[1]} |")
        lines.append("")
    settings = results["settings"]
    lines += [
        f"Logistic regression on standardised states, C = {settings['C']:g}, {settings['folds']} folds grouped by"
        f" {results['group']}, out of fold; probed for {results['label']}. rho: Spearman's, between the probe's"
        f" probability and whether the run's own answer (step {results['answered']}) was right; intervals are a"
        " bootstrap over groups."
    ]
    return lines


def _ordered(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(cells, key=lambda cell: (cell["source"] != VANILLA, list(KINDS).index(cell["kind"]), cell["step"]))


def _title(cell: dict[str, Any]) -> str:
    return f"{KINDS[cell['kind']]}{', vanilla' if cell['source'] == VANILLA else ''}"


def _rho(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['rho']:+.2f} (too few)"
    return f"{found['rho']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def draw(results: dict[str, Any]) -> Any:
    """One figure: a panel for each task, accuracy over steps with its interval, and the controls."""
    tasks = results["tasks"]
    figure, axes = plots.figure(4.4 * len(tasks) + 0.6, 3.8, 1, len(tasks))
    for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
        for color, kind in zip(plots.COLORS, KINDS, strict=False):
            cells = [c for c in _ordered(task["probes"]) if c["kind"] == kind and c["source"] != VANILLA]
            if not cells:
                continue
            steps = [c["step"] for c in cells]
            axis.plot(steps, [c["accuracy"] for c in cells], "o-", color=color, label=KINDS[kind])
            axis.fill_between(steps, [c["low"] for c in cells], [c["high"] for c in cells], color=color, alpha=0.15)
            axis.plot(steps, [c["shuffled"]["mean"] for c in cells], ":", color=color, label="labels shuffled")
        for cell in task["probes"]:
            if cell["source"] == VANILLA:
                axis.axhline(cell["accuracy"], ls="--", color="#555555", label=_title(cell))
        axis.axhline(task["most_frequent"], ls="-.", color="#AAAAAA", label="most frequent class")
        axis.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102))
        axis.set_title(plots.plain(name), fontsize=10)
    axes[0][0].legend(fontsize=7, frameon=False)
    return figure


def _write(out: Path, results: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "table.md", "\n".join(table(results)) + "\n")
        plots.save(draw(results), out / "probe.png")
        write_atomic(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from None
