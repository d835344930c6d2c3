"""What data at the paper's scale costs: opening a manifest, planning batches, drawing a mixture, by number of rows.

    make bench-data                          # 16 k, 160 k and 1.6 M rows; about three minutes
    python benchmarks/data.py --rows 16000   # one size

Every measurement runs in a process of its own, so that its peak memory is its own; memory is what the process used
above what it had after importing. Results go to benchmarks/results/data.json and into the table of docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/data.json"
PAGE = ROOT / "docs/data.md"
BEGIN, END = "<!-- scale: written by `make bench-data` -->", "<!-- end of scale -->"
SIZES = (16_000, 160_000, 1_600_000)
REPEATS = 3
CATEGORIES = ("speech", "sound", "music", "emotion", "speaker", "captions", "text")


def write_manifests(folder: Path, rows: int) -> Path:
    """One manifest of `rows` rows, and one for each of seven categories that add up to it."""
    random = np.random.default_rng(0)
    seconds = np.exp(random.normal(np.log(5.0), 0.8, rows)).clip(0.3, 110)
    words = random.integers(1, 30, rows)
    streams = [(folder / f"{name}.jsonl").open("w") for name in CATEGORIES]
    whole = folder / "rows.jsonl"
    with whole.open("w") as stream:
        for i in range(rows):
            row = {
                "id": f"utt-{i:08d}",
                "messages": [
                    {"role": "user", "content": "<audio>What is said in this recording, and how?"},
                    {"role": "assistant", "content": " ".join(["word"] * int(words[i]))},
                ],
                "audio": f"audio/{i % 1000:03d}/{i:08d}.flac",
                "duration": round(float(seconds[i]), 3),
                "language": "en" if i % 5 else "de",
            }
            line = json.dumps(row) + "\n"
            stream.write(line)
            streams[i % len(CATEGORIES)].write(line)
    for category in streams:
        category.close()
    return whole


def costs_of(rows: int) -> np.ndarray:
    """Tokens as rows of the paper's kind cost: twice 25 a second, and some text."""
    random = np.random.default_rng(0)
    seconds = np.exp(random.normal(np.log(5.0), 0.8, rows)).clip(0.3, 110)
    return (50 * seconds).astype(np.int64) + random.integers(30, 120, rows)


def measure_open(folder: Path, rows: int) -> dict[str, float]:
    from coatkit.data.rows import JsonlRows

    def work() -> dict[str, float]:
        assert len(JsonlRows(folder / "rows.jsonl")) == rows
        return {}

    return measured(work)


def measure_read(folder: Path, rows: int) -> dict[str, float]:
    from coatkit.data.rows import JsonlRows

    opened = JsonlRows(folder / "rows.jsonl")
    picks = np.random.default_rng(1).integers(0, rows, 20_000)

    def work() -> dict[str, float]:
        for i in picks:
            opened[int(i)]
        return {"count": len(picks)}

    return measured(work)


def measure_plan_rows(folder: Path, rows: int) -> dict[str, float]:
    return _plan(rows, rows_a_batch=16)


def measure_plan_tokens(folder: Path, rows: int) -> dict[str, float]:
    return _plan(rows, rows_a_batch=None)


def _plan(rows: int, rows_a_batch: int | None) -> dict[str, float]:
    from coatkit.data.batches import BatchPlan
    from coatkit.spec import BatchSpec

    costs = costs_of(rows)
    batch = BatchSpec(rows=16) if rows_a_batch else BatchSpec(tokens=16_000)

    def work() -> dict[str, float]:
        plan = BatchPlan(costs, batch, (17, 0))
        plan.rows(0)
        return {"steps": len(plan._epochs[0])}

    found = measured(work)
    plan = BatchPlan(costs, batch, (17, 0))
    steps = [plan.rows(step) for step in range(int(found["steps"]))]
    padded = sum(int(costs[r].max()) * r.size for r in steps)
    return {**found, "padding": 1 - sum(int(costs[r].sum()) for r in steps) / padded}


def measure_mixture(folder: Path, rows: int) -> dict[str, float]:
    from coatkit.data.mixture import materialise
    from coatkit.data.sources import open_data
    from coatkit.spec_data import MixtureSpec

    os.environ["COATKIT_CACHE"] = tempfile.mkdtemp(dir=folder)
    shares = (0.4, 0.15, 0.15, 0.1, 0.05, 0.1, 0.05)
    categories = {
        name: {"share": share, "sources": [str(folder / f"{name}.jsonl")]}
        for name, share in zip(CATEGORIES, shares, strict=True)
    }
    spec = MixtureSpec.model_validate({"rows": rows, "seed": 17, "categories": categories})

    def work() -> dict[str, float]:
        assert materialise(spec).stat().st_size
        return {}

    found = measured(work)
    started = time.perf_counter()
    assert len(open_data(spec)) == rows
    return {**found, "reopen_seconds": time.perf_counter() - started}


MEASURES: dict[str, tuple[str, Callable[[Path, int], dict[str, float]]]] = {
    "open": ("open a JSONL manifest", measure_open),
    "read": ("20,000 rows in random order", measure_read),
    "plan_rows": ("batch plan, 16 rows a step", measure_plan_rows),
    "plan_tokens": ("batch plan, 16,000 tokens a step", measure_plan_tokens),
    "mixture": ("draw and write a 7-category mixture", measure_mixture),
}


def measured(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Seconds of one call, and by how many bytes it raised the process's peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "seconds": seconds, "bytes": 1024 * (peak - before)}


def run(sizes: list[int]) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {name: {} for name in MEASURES}
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_manifests(Path(folder), rows)
            for name in MEASURES:
                command = [sys.executable, __file__, "--measure", name, "--folder", folder, "--rows", str(rows)]
                runs = [json.loads(subprocess.check_output(command)) for _ in range(REPEATS)]
                median = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                results[name][str(rows)] = median
                print(f"{rows:>9,} rows  {MEASURES[name][0]:<38} {median['seconds']:8.3f} s", flush=True)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} virtual cores, Python {platform.python_version()}",
        "repeats": REPEATS,
        "results": results,
    }


def table(found: dict[str, Any]) -> str:
    """The table of docs/data.md."""
    results = found["results"]
    sizes = sorted({int(size) for sizes in results.values() for size in sizes})
    lines = [
        "| | " + " | ".join(f"{size:,} rows" for size in sizes) + " | memory at the most | growth |",
        "|---|" + "---|" * (len(sizes) + 2),
    ]
    for name, by_size in results.items():
        cells = [_seconds(by_size[str(size)]["seconds"]) for size in sizes]
        most, least = by_size[str(sizes[-1])], by_size[str(sizes[0])]
        grown = most["seconds"] / least["seconds"]
        memory = f"{most['bytes'] / 1e6:,.0f} MB"
        growth = f"x {grown:,.0f} for x {sizes[-1] // sizes[0]}"
        lines.append(f"| {MEASURES[name][0]} | {' | '.join(cells)} | {memory} | {growth} |")
    padding = {name: results[name][str(sizes[-1])]["padding"] for name in ("plan_rows", "plan_tokens")}
    lines += [
        "",
        f"Medians of {found['repeats']}, on {found['machine']}. Of a batch's tokens {padding['plan_tokens']:.1%} are"
        f" padding with a budget of tokens, {padding['plan_rows']:.0%} with a fixed number of rows. A mixture that"
        f" is there already opens in {_seconds(results['mixture'][str(sizes[-1])]['reopen_seconds'])}.",
    ]
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="rows; all three sizes when left out")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(MEASURES[given.measure][1](given.folder, given.rows[0])))
        return
    found = run(given.rows or list(SIZES))
    if given.rows is None:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        page = PAGE.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(table(found))


if __name__ == "__main__":
    main()
