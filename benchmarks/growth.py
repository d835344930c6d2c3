"""How a training step grows: with tokens, with rows, with experts, with the length of the manifest.

    make bench-growth
    python benchmarks/growth.py --repeats 5

Processor time of one thread for forward and backward on the default backbone (for the manifest: for finding and reading
a step's rows), medians in one process whose memory has settled. Only the growth is of interest: each line is relative
to its first entry, beside what linear growth would be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/growth.json"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- growth: written by `make bench-growth` -->", "<!-- end of growth -->"
SECONDS = (2, 4, 8, 16, 30)
ROWS = (1, 2, 4, 8)
EXPERTS = (0, 1, 2, 4, 8)
MANIFEST = (16_000, 160_000, 1_600_000)


def project(folder: Path, experts: int) -> Path:
    """A spec whose experts cost nothing: constant features, so that what grows is heads and losses."""
    import yaml

    (folder / "still.py").write_text(
        "import torch\nfrom coatkit import Expert, Features\n\n\nclass Still(Expert):\n"
        "    frame_rate, dim = 50.0, 768\n\n    def encode(self, audio):\n"
        "        frames = -(-audio.lengths // 320)\n"
        "        return Features(torch.zeros(len(audio), int(frames.max()), 768), frames, 50.0)\n"
    )
    spec = {
        "name": "growth",
        "backbone": {"use": "mini", "source": "wheels"},
        "experts": {f"e{i}": {"use": "./still.py:Still"} for i in range(experts)},
        "data": {"train": "none.jsonl"},
        "stages": [{"name": "one", "steps": 1, "lr": 1e-4, "weights": {f"e{i}": 1.0 for i in range(experts)}}],
        "output": "run",
    }
    (folder / "none.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    path = folder / f"spec-{experts}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def batch_of(model: Any, seconds: float, rows: int) -> Any:
    from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row
    from coatkit.data.steps import load_batch

    wave = (0.1 * np.random.default_rng(0).standard_normal(round(seconds * 16_000))).astype(np.float32)
    talk = (Message("user", AUDIO_TAG + "What is heard?"), Message("assistant", "A short answer of a few words."))
    made = [Row(str(i), talk, (AudioRef(Path(str(i)), samples=(wave, 16_000)),)) for i in range(rows)]
    return load_batch(made, model.backbone.preparer, {16_000}, 60.0, train=True)


def step(model: Any, batch: Any) -> Callable[[], None]:
    def run() -> None:
        losses = model(batch, list(model.experts))
        sum(losses.sums.values()).backward()
        model.zero_grad(set_to_none=True)

    return run


def median_cost(work: Callable[[], None], repeats: int) -> float:
    work()
    costs = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        costs.append(time.process_time() - started)
    return statistics.median(costs)


def manifests(folder: Path, repeats: int) -> dict[str, float]:
    """Finding and reading the rows of a step, of manifests that are open already."""
    from coatkit.data.batches import BatchPlan
    from coatkit.data.rows import JsonlRows
    from coatkit.spec import BatchSpec

    found = {}
    for count in MANIFEST:
        path = folder / f"{count}.jsonl"
        with path.open("w") as stream:
            for i in range(count):
                talk = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "An answer."}]
                stream.write(json.dumps({"id": str(i), "messages": talk}) + "\n")
        rows = JsonlRows(path)
        plan = BatchPlan(np.random.default_rng(0).integers(20, 900, count), BatchSpec(rows=16), (1, 0))
        at = iter(range(1, 1_000_000, 97))

        def read(plan: BatchPlan = plan, rows: JsonlRows = rows, at: Any = at) -> None:
            for _ in range(50):
                [rows[int(i)] for i in plan.rows(next(at) % (len(rows) // 16))]

        found[str(count)] = median_cost(read, repeats)
        path.unlink()
    return found


def measure(repeats: int) -> dict[str, dict[str, float]]:
    import torch

    from coatkit.build import build
    from coatkit.memory import keep_freed_memory
    from coatkit.spec_file import load_spec

    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found: dict[str, dict[str, float]] = {"experts": {}}
        for count in EXPERTS:
            model = build(load_spec(project(folder, count)), "cpu").train()
            found["experts"][str(count)] = median_cost(step(model, batch_of(model, 5, 1)), repeats)
            if count == 1:
                for seconds in SECONDS:
                    batch = batch_of(model, seconds, 1)
                    tokens = str(batch.inputs.tokens["input_ids"].shape[1])
                    found.setdefault("tokens", {})[tokens] = median_cost(step(model, batch), repeats)
                for rows in ROWS:
                    cost = median_cost(step(model, batch_of(model, 5, rows)), repeats)
                    found.setdefault("rows of 5 s", {})[str(rows)] = cost
            print(found, flush=True)
        found["rows in the manifest"] = manifests(folder, repeats)
    return found


def table(data: dict[str, Any]) -> str:
    lines = ["| what grows | from, to | linear | seen |", "|---|---|---|---|"]
    for name, costs in data["results"].items():
        (first, least), *_, (last, most) = costs.items()
        linear = "-" if first == "0" else f"{int(last) / int(first):.1f} x"
        steps = ", ".join(f"{int(key):,}: {cost / least:.2f}" for key, cost in costs.items())
        lines.append(f"| {name} | {int(first):,}, {int(last):,} | {linear} | {most / least:.2f} x ({steps}) |")
    return "\n".join([*lines, "", f"Medians of {data['repeats']}, processor time of one thread; {data['machine']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} virtual cores"
    data = {"machine": machine, "repeats": given.repeats, "results": measure(given.repeats)}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    print(table(data))
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(data)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
