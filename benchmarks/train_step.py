"""A pass over the same rows, four ways: the bare language model, coatkit with stored features, coatkit with experts
online, and the plain implementation on transformers' Trainer (benchmarks/plain.py).

    make bench-train                                        # both backbones, three repetitions; about an hour
    python benchmarks/train_step.py --backbone vocab152k --experts audio --repeats 1

Each arm runs in a process of its own and makes two passes, of which the second counts: what a process takes from the
system for the first time is not what a step of a long run costs. The arms take turns, so that what else the machine
does falls on all; the plain one, which takes longest, has one turn. Seconds are the process's processor time, on one
thread unless told otherwise. Results are ratios of medians, in benchmarks/results/train_step.json and the table of
docs/performance.md.
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
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/train_step.json"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- train step: written by `make bench-train` -->", "<!-- end of train step -->"
ALL = ("audio", "basic-pitch", "spidr", "panns", "emotion2vec", "mert")
CASES: dict[str, tuple[str, ...]] = {"mini": ALL, "vocab152k": ("audio",)}
"""Backbone to the experts that teach it here."""
ARMS = ("trunk", "stored", "online", "plain")
ROWS, PLAIN_ROWS, TOKENS = 16, 8, 4096


def write_rows(folder: Path) -> None:
    """Rows whose sounds last as in the paper's data: median 5 s, nine in ten under 15 s."""
    import soundfile

    random = np.random.default_rng(0)
    seconds = np.exp(random.normal(np.log(5.0), 0.857, ROWS)).clip(0.5, 30)
    (folder / "clips").mkdir()
    with (folder / "rows.jsonl").open("w") as stream:
        for i, length in enumerate(seconds):
            t = np.arange(round(length * 16_000)) / 16_000
            wave = random.standard_normal(t.size) * (0.1 + 0.1 * np.sin(2 * np.pi * 4 * t) ** 2)
            soundfile.write(folder / f"clips/{i}.flac", wave.astype(np.float32), 16_000)
            answer = " ".join(["a"] * int(random.integers(4, 20)))  # a word is a token, or two bytes
            talk = [
                {"role": "user", "content": "<audio>What is heard?"},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"id": str(i), "messages": talk, "audio": f"clips/{i}.flac"}) + "\n")


def spec_of(folder: Path, backbone: str, experts: tuple[str, ...], stored: bool, steps: int) -> Path:
    import yaml

    chosen: dict[str, Any] = {"use": "mini", "source": "wheels", "train": {"projector": "none"}}
    if backbone == "vocab152k":
        chosen = {"use": "qwen2-audio", "weights": str(large_vocabulary(folder))}
    settings: dict[str, Any] = {"audio": {"target": "tower"}, "basic-pitch": {"head": {"use": "linear"}}}
    teachers = {name: settings.get(name, {"weights": "random"}) for name in experts}
    spec = {
        "name": "bench",
        "seed": 1,
        "backbone": chosen,
        "experts": teachers,
        "data": {"train": "rows.jsonl", "max_seconds": 30},
        "stages": [
            {
                "name": "one",
                "steps": steps,
                "lr": 1e-4,
                "batch": {"tokens": TOKENS, "accumulate": ROWS},  # one row at a time: a CPU gains nothing from more
                "weights": dict.fromkeys(experts, 1.0),
            }
        ],
        "checkpoint": {"every": 100_000},
        "output": "run",
    }
    if stored:
        spec["cache"] = {
            "names": ["tower" if name == "audio" else name for name in experts],
            "dtype": "float16",
            "folder": "store",
        }
    path = folder / f"spec-{stored}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def large_vocabulary(folder: Path) -> Path:
    """A Qwen2-Audio of a few layers with the real one's vocabulary, saved as a model folder."""
    place = folder / "model"
    if not place.exists():
        import torch
        from coatkit_backbone_qwen2_audio.tiny import SPECIAL, tiny_processor
        from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

        from coatkit.backbones.tiny import AUDIO

        text = {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 512, "intermediate_size": 1408}
        text |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
        config = Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", **AUDIO},
            text_config=text,
            audio_token_index=SPECIAL.index("<|AUDIO|>"),
        )
        torch.manual_seed(0)
        Qwen2AudioForConditionalGeneration(config).save_pretrained(place)
        processor = tiny_processor()
        processor.save_pretrained(place)
    return place


def arm(name: str, backbone: str, experts: tuple[str, ...], folder: Path) -> dict[str, float]:
    """One pass over the rows; seconds, and bytes of memory at the peak above what the loaded model takes."""
    import torch

    from coatkit.build import build
    from coatkit.data.batches import BatchPlan
    from coatkit.data.rows import JsonlRows
    from coatkit.data.scan import scan
    from coatkit.memory import keep_freed_memory
    from coatkit.spec import BatchSpec
    from coatkit.spec_file import load_spec

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stored = name == "stored"
    loaded = load_spec(spec_of(folder, backbone, experts, stored, steps=1))
    rows = JsonlRows(folder / "rows.jsonl")
    if name in ("stored", "online"):
        from coatkit import trainer

        preparer = build(loaded, "cpu").backbone.preparer  # counts the steps of one pass
        costs = scan(rows, preparer, loaded.spec.data, 1.0).costs
        plan = BatchPlan(costs, BatchSpec(tokens=TOKENS), (1, 0))
        steps = next(step for step in range(1, 10_000) if plan.epoch_of(step) >= 2)
        loaded = load_spec(
            spec_of(folder, backbone, experts, stored, steps), [f"output={tempfile.mkdtemp(dir=folder)}/run"]
        )
        keep_freed_memory()  # as `coatkit train` does
        ends: list[tuple[float, float]] = []
        log = trainer.Journal.log

        def clocked(journal: Any, position: Any, stage: str, numbers: dict[str, float], *rest: Any) -> Any:
            ends.append((numbers["epoch"], time.process_time()))
            return log(journal, position, stage, numbers, *rest)

        trainer.Journal.log = clocked
        before = _peak()
        trainer.train(loaded)
        half = max(end for epoch, end in ends if epoch < 1 + 1e-9)
        return {"seconds": ends[-1][1] - half, "bytes": _peak() - before}
    model = build(loaded, "cpu").train()
    if name == "trunk":
        keep_freed_memory()
        return trunk(model, list(rows))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plain
    from transformers import TrainerCallback

    before = _peak()
    steps = ROWS // PLAIN_ROWS
    made = plain.trainer(
        plain.Plain(model, dict.fromkeys(experts, 1.0)), list(rows), PLAIN_ROWS, 2 * steps, folder / "plain"
    )
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.process_time())

    made.add_callback(Clock())
    made.train()
    return {"seconds": ends[-1] - ends[steps - 1], "bytes": _peak() - before}


def trunk(model: Any, rows: list[Any]) -> dict[str, float]:
    """The language model alone, forward and backward, on as many tokens as each row has; nothing is padded."""
    import torch

    from coatkit.data.steps import load_batch

    backbone = model.backbone
    counts = [
        int(load_batch([row], backbone.preparer, (), 120.0, train=True).inputs.tokens["attention_mask"].sum())
        for row in rows
    ]
    before = _peak()
    for number, count in enumerate([*counts, *counts]):
        if number == len(counts):  # the second pass begins
            started = time.process_time()
        embeds = torch.randn(1, count, backbone.hidden_size)
        hidden = backbone.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        hidden.float().mean().backward()
    return {"seconds": time.process_time() - started, "bytes": _peak() - before, "tokens": sum(counts)}


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(cases: dict[str, tuple[str, ...]], repeats: int, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
    results: dict[str, Any] = {}
    for backbone, experts in cases.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_rows(folder)
            spec = spec_of(folder, backbone, experts, stored=True, steps=1)
            command = [sys.executable, "-m", "coatkit", "cache", str(spec), "--yes"]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
            for turn in range(repeats):
                for name in ARMS if turn == 0 else ARMS[:-1]:
                    command = [sys.executable, __file__, "--arm", name, "--folder", place]
                    command += ["--backbone", backbone, "--experts", *experts]
                    out = subprocess.check_output(command, env=environment, text=True, stderr=subprocess.DEVNULL)
                    found[name].append(json.loads(out.splitlines()[-1]))
                    print(backbone, turn, name, found[name][-1], flush=True)
        median = {
            name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
        }
        results[backbone] = {"experts": list(experts), "median": median, "runs": found}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} virtual cores, {threads} thread(s)",
        "rows": ROWS,
        "repeats": repeats,
        "results": results,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| backbone | experts | stored / trunk | online / trunk | plain / stored | plain / online"
        " | memory stored / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for backbone, case in found["results"].items():
        seconds = {name: values["seconds"] for name, values in case["median"].items()}
        memory = {name: values["bytes"] for name, values in case["median"].items()}
        cells = [
            f"{seconds['stored'] / seconds['trunk']:.2f}",
            f"{seconds['online'] / seconds['trunk']:.2f}",
            f"{seconds['plain'] / seconds['stored']:.1f}",
            f"{seconds['plain'] / seconds['online']:.1f}",
            f"{memory['stored'] / memory['plain']:.2f}",
        ]
        lines.append(f"| {backbone} | {', '.join(case['experts'])} | {' | '.join(cells)} |")
    tokens = {b: int(case["median"]["trunk"]["tokens"]) for b, case in found["results"].items()}
    said = ", ".join(f"{count:,} tokens ({name})" for name, count in tokens.items())
    lines += [
        "",
        f"The second pass over {found['rows']} rows, {said}; processor time, medians of {found['repeats']}, the plain"
        f" way once; {found['machine']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=CASES, help="one backbone; both when left out")
    parser.add_argument("--experts", nargs="*", help="experts that teach")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the results and the table of the docs")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(arm(given.arm, given.backbone, tuple(given.experts), given.folder)))
        return
    cases = {name: experts for name, experts in CASES.items() if given.backbone in (None, name)}
    if given.experts is not None:
        cases = {name: tuple(given.experts) for name in cases}
    found = run(cases, given.repeats, given.threads)
    print(table(found))
    if given.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        page = PAGE.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
