"""Put what the study found into the documentation: raw results, tables and figures.

    python collect.py --study runs/mini-study --docs ../../docs

Writes DOCS/results/mini-study.json (all scores, differences, curves and probes; no path of this machine), the tables
between the markers of DOCS/results/mini-study.md, and DOCS/images/mini-study-*.png. Of a study that is not finished the
page says which runs are missing.

    python collect.py --keep runs.tar.xz                       # every answer of the runs that are done; no weights
    tar -xJf runs.tar.xz -C runs/mini-study                    # elsewhere: `coatkit ablate` goes on from there

The rows are in the archive too (runs/mini-study/rows): the runs were made from these, so data/ must hold the same.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy
from matplotlib import pyplot

HERE = Path(__file__).parent
ARMS = ("sft", "block-only", "reconstruction", "with-pitch", "all", "linear-heads", "half", "quarter", "calibrated")
CONTROLS = ("untrained of all", "text-cot of all", "shuffled-audio of all")
TASKS = ("transcription", "speaker", "pitch", "instrument", "sound")
TERMS = ("ce", "audio.mse", "basic-pitch.mse", "speaker.mse")
PROBED = ("speaker", "pitch", "instrument")
SMOOTH = 15
"""Steps that a point of a curve is the mean of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "runs/mini-study")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the finished runs' answers and records")
    arguments = parser.parse_args()
    results = json.loads((arguments.study / "results.json").read_text(encoding="utf-8"))
    done = {name for name, run in results["runs"].items() if run["state"] == "done"}
    if arguments.keep:
        keep(arguments.study, sorted(done), arguments.keep)
        return
    curves = {name: curve(arguments.study / "arms" / name) for name in sorted(done)}
    raw = {
        "study": {key: results[key] for key in ("name", "coatkit", "seeds", "draws", "arms")},
        "done": sorted(done),
        "missing": sorted(set(results["runs"]) - done),
        "minutes_of_training": {name: round(results["runs"][name]["train_minutes"], 1) for name in sorted(done)},
        "tasks": results["tasks"],
        "curves": {name: curves[name]["terms"] for name in curves},
        "probes": {name: found for name in sorted(done) if (found := probes(arguments.study / "arms" / name))},
        "gradients": {name: curves[name]["gradients"] for name in curves if curves[name]["gradients"]},
    }
    images, page = arguments.docs / "images", arguments.docs / "results/mini-study.md"
    text = json.dumps(raw, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+((?:-?[\d.e+-]+|null)(?:,\s+(?:-?[\d.e+-]+|null))*)\s+\]", shortened, text)
    (arguments.docs / "results/mini-study.json").write_text(text + "\n", encoding="utf-8")
    draw_scores(raw["tasks"], images / "mini-study-scores.png")
    draw_curves(curves, images / "mini-study-curves.png")
    if raw["probes"]:
        draw_probes(raw["probes"], images / "mini-study-probes.png")
    said = page.read_text(encoding="utf-8")
    for name, table in {
        "scores": scores(raw["tasks"]),
        "gradients": gradients(raw["gradients"]),
        "probes": probe_table(raw["probes"]),
        "runs": state(raw),
    }.items():
        said = put(said, name, table)
    page.write_text(said, encoding="utf-8")
    print(state(raw))


def keep(study: Path, done: list[str], to: Path) -> None:
    """Answers, records, metrics and rows of finished runs; of the last checkpoint only where it stands."""
    with tarfile.open(to, "w:xz") as archive:
        add(archive, study / "results.json", "results.json")
        for rows in sorted(HERE.glob("data/study-*.jsonl")):
            add(archive, rows, f"rows/{rows.name}")
        for name in done:
            run = study / "arms" / name
            last = max(run.glob("checkpoints/step-*/state.json"))
            for path in sorted(run.rglob("*")):
                inside = path.relative_to(run)
                heavy = inside.parts[0] in ("checkpoints", "tensorboard") or path.suffix in (".safetensors", ".png")
                if path.is_file() and path.name != ".lock" and (path == last or not heavy):
                    add(archive, path, f"arms/{name}/{inside}")


def add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a text without this machine's folder, owner and time; a run whose project was moved is followed."""
    content = path.read_bytes().replace(str(HERE.resolve()).encode(), b"/mini-study")
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def shortened(match: re.Match[str]) -> str:
    """A list of numbers on one line."""
    return "[" + " ".join(match[1].split()) + "]"


def curve(run: Path) -> dict[str, Any]:
    """Loss terms by step, and the mean cosines between losses' gradients."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = {term: [round(line[term], 4) if term in line else None for line in lines] for term in TERMS}
    found: dict[str, list[float]] = {}
    looks = run / "gradients.jsonl"
    for line in map(json.loads, looks.read_text().splitlines() if looks.exists() else []):
        for pair, cosine in line.get("cosines", {}).items():
            found.setdefault(pair, []).append(round(cosine, 4))
    return {"terms": {k: v for k, v in terms.items() if any(x is not None for x in v)}, "gradients": found}


def probes(run: Path) -> dict[str, list[dict[str, Any]]]:
    """What `coatkit probe` found of a run, by task."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(run.glob("probe/*/results.json")):
        for task, told in json.loads(file.read_text(encoding="utf-8"))["tasks"].items():
            for cell in told["probes"]:
                kept = {key: cell[key] for key in ("kind", "source", "step")}
                kept |= {key: round(cell[key], 1) for key in ("accuracy", "low", "high")}
                kept["shuffled"] = {key: round(value, 1) for key, value in cell["shuffled"].items()}
                kept["foretells"] = cell.get("foretells")
                found.setdefault(task, []).append(kept)
    return found


def probe_table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Accuracies before and after training, and of the controls; one line for each run and state; and the figure."""
    if not found:
        return "None yet."
    words = ["run", "state", "step", *(f"{task} (% right)" for task in PROBED)]
    lines = []
    for name in sorted(found, key=lambda name: (ARMS.index(name.partition("/")[0]), name)):
        cells = {task: {(c["source"], c["kind"]): c for c in found[name].get(task, [])} for task in PROBED}
        steps = sorted({(c["step"], c["source"]) for c in found[name][PROBED[0]] if c["source"] != "vanilla"})
        wanted = [(steps[0][1], "thinking"), (steps[-1][1], "thinking"), (steps[-1][1], "last"), ("vanilla", "last")]
        for key in wanted:
            mine = [cells[task].get(key) for task in PROBED]
            first = next((cell for cell in mine if cell), None)
            if first is not None:
                state = "mean thinking" if key[1] == "thinking" else "before the answer"
                state += ", stock model without block" if key[0] == "vanilla" else ""
                lines.append([name, state, str(first["step"]), *map(probed, mine)])
    figure = "![Accuracy of probes on the mean thinking state, over steps](../images/mini-study-probes.png)"
    return f"| {' | '.join(words)} |\n" + "|---" * len(words) + f"|\n{table(lines)}\n{figure}"


def probed(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    return f"{cell['accuracy']:.1f} ({cell['low']:.1f} to {cell['high']:.1f}); shuffled {cell['shuffled']['mean']:.1f}"


def shown(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["score"] is None:
        return ""
    return f"{entry['score']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"


def scores(tasks: dict[str, Any]) -> str:
    """Scores and differences to the baseline: answers in words, then by likelihood."""
    parts = []
    for ending, said in (("", "Answers in words"), (" (likelihood)", "By likelihood of the options' first tokens")):
        named = [f"{task}{ending}" for task in TASKS if f"{task}{ending}" in tasks]
        arms = [arm for arm in (*ARMS, *CONTROLS) if any(arm in tasks[task]["arms"] for task in named)]
        words = ["arm", *(label(task.removesuffix(ending), tasks[task]) for task in named)]
        head = f"| {' | '.join(words)} |\n" + "|---" * len(words) + "|\n"
        always = ["always the commonest", *(percent(tasks[task]["most_frequent_reference"]) for task in named)]
        lines = [[arm, *(shown(tasks[task]["arms"].get(arm)) for task in named)] for arm in arms]
        parts.append(f"{said}, means over seeds with 95 % intervals:\n\n{head}{table([*lines, always])}")
        others = [arm for arm in arms if any("difference" in tasks[task]["arms"].get(arm, {}) for task in named)]
        lines = [[arm, *(difference(tasks[task]["arms"].get(arm)) for task in named)] for arm in others]
        parts.append(
            f"{said}, differences to `sft` in points, with 95 % intervals, p over seeds and rows, and over seeds alone:"
            f"\n\n{head}{table(lines)}"
        )
    return "\n".join(parts)


def table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def label(task: str, found: dict[str, Any]) -> str:
    return f"{task} (WER, lower is better)" if found["better"] == "lower" else f"{task} (% right)"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def difference(entry: dict[str, Any] | None) -> str:
    found = (entry or {}).get("difference")
    if not found or found["points"] is None:
        return ""
    p = ", ".join(
        "-" if one is None else "<0.001" if one < 5e-4 else f"{one:.3f}" for one in (found["p"], found["p_seeds"])
    )
    return f"{found['points']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f}; p {p})"


def gradients(found: dict[str, dict[str, list[float]]]) -> str:
    """Mean cosine of each pair of losses over all looks and seeds, by arm."""
    table = "| arm | losses | looks | mean cosine | below 0 |\n|---|---|---|---|---|\n"
    for arm in ARMS:
        pairs: dict[str, list[float]] = {}
        for name, run in found.items():
            if name.startswith(f"{arm}/"):
                for pair, cosines in run.items():
                    pairs.setdefault(pair, []).extend(cosines)
        for pair, cosines in pairs.items():
            below = sum(cosine < 0 for cosine in cosines)
            losses = pair.replace("|", " and ")
            table += f"| {arm} | {losses} | {len(cosines)} | {numpy.mean(cosines):+.3f} | {below} |\n"
    return table


def state(raw: dict[str, Any]) -> str:
    done, count = raw["done"], len(raw["done"]) + len(raw["missing"])
    minutes = sum(raw["minutes_of_training"].values())
    said = f"{len(done)} of {count} runs are in, {minutes:.0f} minutes of training"
    return f"{said}." if len(done) == count else f"{said}: {', '.join(done)}."


def put(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table.rstrip()}\n{end}{rest.partition(end)[2]}"


def draw_scores(tasks: dict[str, Any], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(TASKS), figsize=(15, 3.6), sharey=True)
    arms = [arm for arm in (*ARMS, *CONTROLS) if arm in tasks["speaker"]["arms"]][::-1]
    for axis, task in zip(axes, TASKS, strict=True):
        for shift, name, color in ((0.12, task, "#1f5f99"), (-0.12, f"{task} (likelihood)", "#d1812b")):
            for place, arm in enumerate(arms):
                entry = tasks.get(name, {}).get("arms", {}).get(arm)
                if entry and entry["score"] is not None:
                    axis.plot([entry["low"], entry["high"]], [place + shift] * 2, color=color, linewidth=1.5)
                    axis.plot(entry["score"], place + shift, "o", color=color, markersize=4)
        axis.set_title(
            f"{task}, " + ("word error rate" if tasks[task]["better"] == "lower" else "% right"), fontsize=10
        )
        axis.set_yticks(range(len(arms)), arms)
        axis.grid(axis="x", alpha=0.3)
    axes[1].plot([], [], "o", color="#1f5f99", label="in words")
    axes[1].plot([], [], "o", color="#d1812b", label="by likelihood")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_curves(curves: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(TERMS), figsize=(15, 3.4))
    kernel = numpy.ones(SMOOTH) / SMOOTH
    for axis, term in zip(axes, TERMS, strict=True):
        for arm in ARMS:
            runs = [c["terms"][term] for name, c in curves.items() if name.startswith(f"{arm}/") and term in c["terms"]]
            if runs:
                values = numpy.array(runs, float)
                mean = numpy.where(numpy.isnan(values).all(0), numpy.nan, numpy.nansum(values, 0) / len(values))
                first = int(numpy.flatnonzero(~numpy.isnan(mean))[0])
                smooth = numpy.convolve(mean[first:], kernel, "valid")
                axis.plot(
                    numpy.arange(len(smooth)) + first + SMOOTH,
                    smooth,
                    label=arm,
                    color=f"C{ARMS.index(arm)}",
                    linewidth=1.2,
                )
        axis.set_title({"ce": "cross-entropy of the answer"}.get(term, term), fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_probes(found: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy of probes on the mean thinking state over steps, means over the seeds that were probed."""
    figure, axes = pyplot.subplots(1, len(PROBED), figsize=(12, 3.4))
    for axis, task in zip(axes, PROBED, strict=True):
        for arm in ARMS:
            by_step: dict[int, list[float]] = {}
            for name, tasks in found.items():
                for cell in tasks.get(task, []) if name.startswith(f"{arm}/") else []:
                    if cell["kind"] == "thinking" and cell["source"] != "vanilla":
                        by_step.setdefault(cell["step"], []).append(cell["accuracy"])
            if by_step:
                steps = sorted(by_step)
                means = [numpy.mean(by_step[step]) for step in steps]
                axis.plot(steps, means, "o-", label=arm, color=f"C{ARMS.index(arm)}", linewidth=1.2, markersize=4)
        stock = [c["accuracy"] for tasks in found.values() for c in tasks.get(task, []) if c["source"] == "vanilla"]
        if stock:
            axis.axhline(numpy.mean(stock), color="gray", linestyle="--", label="stock model, before the answer")
        axis.set_title(f"{task}, % right", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
