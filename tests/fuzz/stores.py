"""Spoiled feature stores, evaluations and lock files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mutate
from harness import Case, shell
from runs import spoiled


def stores(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Shards, index and about.json: opened, every sound read, verified, added to."""
    import torch

    from coatkit.store import About, Store, StoreWriter, verify

    def values(seed: int) -> torch.Tensor:
        return torch.randn(1 + seed % 9, 4, generator=torch.Generator().manual_seed(seed))

    whole: dict[str, Path] = {}
    for dtype in ("float32", "float16", "int8"):
        about = About("./mine.py:Mine", {"fingerprint": "abc", "rate": 25.0, "dim": 4}, dtype)  # type: ignore[arg-type]
        for start in (0, 5):
            with StoreWriter(about, folder / "whole") as writer:
                for seed in range(start, start + 5):
                    writer.add(f"{seed:032x}", values(seed))
        whole[dtype] = writer.folder

    def read(place: Path) -> None:
        store = Store(place)
        for key in sorted(store.keys()):
            found = store.frames(key)
            assert found is not None
            assert found.ndim == 2, found.shape
        list(verify(place))

    def add(place: Path) -> None:
        with StoreWriter(About.read(whole[place.name]), place.parent) as writer:
            writer.add(f"{99:032x}", values(99))
        read(writer.folder)

    for number in range(1, 1 << 30):
        source = whole[draw.choice(list(whole))]
        place = folder / "spoiled" / source.name
        shutil.rmtree(place.parent, ignore_errors=True)
        shutil.copytree(source, place)
        whole[place.name] = source
        path = draw.choice(sorted(p for p in place.iterdir() if p.suffix in (".safetensors", ".npy", ".json")))
        path.write_bytes(mutate.raw(draw, path.read_bytes()) if path.suffix == ".npy" else spoiled(draw, path))
        act = draw.choice((read, read, add))
        yield f"{act.__name__} {path.name} {number}", lambda act=act, place=place: act(place)
        del whole[place.name]


def _evaluation(to: Path, seed: int) -> None:
    """An evaluation as `coatkit eval` leaves it: three tasks scored from answers given here."""
    from coatkit.evaluation.metrics import METRICS
    from coatkit.evaluation.predictions import Predictions
    from coatkit.evaluation.results import answers_of

    tasks = {"exact": "exact", "wer": "wer", "choice": "choice"}
    said, draw = [], random.Random(seed)
    for task in tasks:
        for i in range(6):
            right = draw.choice(("rain", "wind"))
            line: dict[str, Any] = {"task": task, "index": i, "id": f"r{i}", "references": ["rain"], "answer": right}
            said.append(line | ({"choices": ["rain", "wind"]} if task == "choice" else {}))
    for task, metric in tasks.items():
        mine = [line for line in said if line["task"] == task]
        scored = METRICS[metric](answers_of(mine), "en")
        for line, score in zip(mine, scored.rows.tolist(), strict=True):
            line["score"] = score
    identity = {"model": "a run", "tasks": {t: {"data": "0" * 64} for t in tasks}}
    scoring = {t: {"metric": m, "language": "en"} for t, m in tasks.items()}
    results = {
        "tasks": {t: {"metric": m, "score": 50.0, "low": 0.0, "high": 100.0, "rows": 6} for t, m in tasks.items()}
    }
    with Predictions(to, identity) as kept:
        kept.finish(said, results, scoring)


def evals(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Answers, records and results: compared with whole ones, opened to go on."""
    from coatkit.evaluation.predictions import Predictions

    _evaluation(folder / "whole", 1)
    _evaluation(folder / "other", 2)
    identity = json.loads((folder / "whole/eval.json").read_text())["identity"]

    def reopen() -> None:
        with Predictions(folder / "spoiled", identity) as kept:
            kept.keep([])

    yield "as it is", lambda: shell("compare", folder / "whole", folder / "other")
    for number in range(1, 1 << 30):
        shutil.rmtree(folder / "spoiled", ignore_errors=True)
        shutil.copytree(folder / "whole", folder / "spoiled")
        path = folder / "spoiled" / draw.choice(("eval.json", "predictions.jsonl", "predictions.jsonl", "results.json"))
        path.write_bytes(spoiled(draw, path))
        pair = [folder / "spoiled", folder / draw.choice(("whole", "other"))]
        draw.shuffle(pair)
        more = ["--json"] if draw.random() < 0.3 else []
        if draw.random() < 0.8:
            yield f"compare {path.name} {number}", lambda pair=pair, more=more: shell("compare", *pair, *more)
        else:
            yield f"reopen {path.name} {number}", reopen


def locks(folder: Path, draw: random.Random) -> Iterator[Case]:
    """assets.lock in the cache, and one of the user's: a file that is there is verified and pinned again."""
    from coatkit.assets import asset_path, cache_dir, fetch, require
    from coatkit.manifest import Asset

    asset = Asset("weights.bin", "https://127.0.0.1:9/weights.bin", size=7)
    path = asset_path("fuzzed", asset)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    fetch("fuzzed", asset)
    lock = cache_dir() / "assets.lock"
    whole = json.loads(lock.read_text())
    for number in range(1, 1 << 30):
        own = folder / "own.lock"
        changed = mutate.dumps(mutate.value(draw, whole)).encode("utf-8", "surrogatepass")
        content = changed if draw.random() < 0.7 else mutate.raw(draw, json.dumps(whole).encode())
        lock.write_bytes(content if draw.random() < 0.7 else json.dumps(whole).encode())
        own.write_bytes(content)
        act = draw.choice(
            (
                lambda: require("fuzzed", asset),
                lambda: fetch("fuzzed", asset),
                partial(fetch, "fuzzed", asset, lock=own),
            )
        )
        path.write_bytes(b"weights")
        yield f"lock {number}", act
