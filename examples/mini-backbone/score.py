"""Score a run's closed questions by log-probability: which option's first token is likeliest to begin the answer.

    python score.py RUN --data data
    python score.py RUN --data data --limit 100

Unlike greedy answers, this asks only what the model has heard, not whether it keeps to the options. Each task is asked
again with the sounds exchanged between its rows: what is left then is guessed without hearing. Prints a line for each
task, in percent: right answers with a 95 % bootstrap interval, with exchanged sounds, by always giving the commonest
right answer, and by chance. `coatkit eval RUN --data data/suite.yml` scores the answers in words.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from align import SETS

import coatkit
from coatkit import JsonlRows, Row

HERE = Path(__file__).parent
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--limit", type=int, help="rows of each task, drawn at random; all unless given")
    parser.add_argument("--step", type=int, help="checkpoint; the last unless given")
    parser.add_argument("--untrained", action="store_true", help="the model as it was before this run")
    arguments = parser.parse_args()
    model = coatkit.load(arguments.run, trained=not arguments.untrained, step=arguments.step, device="cpu")
    by_task: dict[str, list[Row]] = {}
    for row in JsonlRows(arguments.data / "heldout.jsonl"):
        by_task.setdefault(row.labels["task"], []).append(row)
    found = {}
    print(f"{'task':12}{'rows':>6}{'right':>8}{'95 % interval':>16}{'exchanged':>11}{'commonest':>11}{'chance':>8}")
    for task, options in SETS.items():
        rows = by_task.get(task, [])
        if arguments.limit and len(rows) > arguments.limit:
            rows = random.Random(task).sample(rows, arguments.limit)
        if rows:
            found[task] = score(model, rows, options)
            r = found[task]
            interval = f"{r['low']:.1f} to {r['high']:.1f}"
            print(
                f"{task:12}{r['rows']:6}{r['right']:8.1f}{interval:>16}{r['exchanged']:11.1f}"
                f"{r['commonest']:11.1f}{r['chance']:8.1f}",
                flush=True,
            )
    (arguments.run / "score.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def score(model: Any, rows: list[Row], options: tuple[str, ...]) -> dict[str, float]:
    """Percentages for one task."""
    truth = [row.messages[-1].content for row in rows]
    # Every sound goes to the next row in a random order: no row keeps its own.
    order = random.Random(0).sample(range(len(rows)), len(rows))
    exchanged = list(rows)
    for at, to in zip(order, order[1:] + order[:1], strict=True):
        exchanged[at] = replace(rows[at], audios=rows[to].audios)
    right = numpy.array([said == told for said, told in zip(choose(model, rows, options), truth, strict=True)])
    deaf = [said == told for said, told in zip(choose(model, exchanged, options), truth, strict=True)]
    draws = numpy.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    low, high = numpy.quantile(right[draws].mean(1), [0.025, 0.975])
    parts = {
        "right": right.mean(),
        "low": low,
        "high": high,
        "exchanged": sum(deaf) / len(rows),
        "commonest": Counter(truth).most_common(1)[0][1] / len(rows),
        "chance": 1 / len(options),
    }
    return {"rows": len(rows), **{name: round(100 * float(value), 1) for name, value in parts.items()}}


def choose(model: Any, rows: list[Row], options: tuple[str, ...]) -> list[str]:
    """The likeliest option of each row."""
    tokenizer = model.backbone.preparer.tokenizer
    first = [tokenizer.encode(option, add_special_tokens=False)[0] for option in options]
    if len(set(first)) < len(first):
        raise ValueError(f"two of {options} begin with one token")
    output = model.backbone.stock.get_output_embeddings()
    order = sorted(range(len(rows)), key=lambda i: rows[i].audios[0].end or 0)
    found: dict[int, str] = {}
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        asked = [replace(rows[i], messages=rows[i].messages[:-1]) for i in chosen]
        with torch.no_grad():
            logits = output(model.backbone.forward(model.prepare(asked)).last)[:, first]
        found.update(zip(chosen, (options[n] for n in logits.argmax(-1).tolist()), strict=True))
    return [found[i] for i in range(len(rows))]


if __name__ == "__main__":
    main()
