"""Time to the first token with the thinking block and without it, by length of sound; and the memory of the prefill.

    make bench-prefill
    python benchmarks/prefill.py --repeats 3

The block is read in the same prefill as the prompt, so what it adds is prefill alone: the same number of tokens is
decoded with it and without. Both models take turns in one process; medians of ratios within a pair.
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
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/prefill.json"
SECONDS = (2, 5, 10, 30)
DECODED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--memory", nargs=2, metavar=("WITH|WITHOUT", "SECONDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(peak_of(load(given, given.memory[0]), float(given.memory[1])))
        return

    import torch

    from coatkit.memory import keep_freed_memory

    keep_freed_memory()
    models = {name: load(given, name) for name in ("with", "without")}
    results: dict[str, Any] = {}
    for seconds in SECONDS:
        inputs = {name: inputs_of(model, seconds) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        decoded: dict[str, int] = {}
        for turn in range(given.repeats + 1):
            for name, model in models.items():
                started = time.perf_counter()
                model.generate(inputs[name], max_new_tokens=1)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:  # the first of each warms up
                    times[name].append(time.perf_counter() - started)
        for name, model in models.items():
            decoded[name] = _decoded(model, inputs[name])
        ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
        tokens = {name: int(inputs[name].tokens["input_ids"].shape[1]) for name in models}
        results[str(seconds)] = {
            "prompt_tokens": tokens,
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "ratio": statistics.median(ratios),
            "decoded": decoded,
            "bytes": {name: memory_of(given, name, seconds) for name in models},
        }
        print(seconds, "s:", results[str(seconds)], flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} virtual cores, {torch.get_num_threads()} thread(s)"
    if torch.cuda.is_available():
        machine = f"{machine}, {torch.cuda.get_device_name()}"
    data = {"machine": machine, "backbone": given.backbone, "repeats": given.repeats, "results": results}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


def load(given: argparse.Namespace, name: str) -> Any:
    import coatkit

    thinking = coatkit.ThinkingSpec() if name == "with" else None
    return coatkit.load_backbone(given.backbone, thinking=thinking, weights=given.weights, device=None)


def inputs_of(model: Any, seconds: float) -> Any:
    from coatkit.data.rows import AudioRef, Message, Row
    from coatkit.protocols import AudioBatch

    wave = (0.1 * np.random.default_rng(0).standard_normal(round(seconds * 16_000))).astype(np.float32)
    row = Row("sound", (Message("user", "<audio>What is heard?"),), (AudioRef(Path("sound.wav")),))
    return model.preparer.prepare([row], AudioBatch.from_arrays([wave], 16_000), train=False)


def peak_of(model: Any, seconds: float) -> int:
    """Bytes that a prefill takes at its peak, above what the process had taken to load the model and hear 1 s."""
    model.generate(inputs_of(model, 1.0), max_new_tokens=1)
    inputs = inputs_of(model, seconds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # What loading took at its peak is free again: it is taken once more, so that the peak shows the prefill's own.
    held = _resident()
    filler = np.ones(max(0, 1024 * before - held), np.uint8)
    model.generate(inputs, max_new_tokens=1)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del filler  # held until here
    return 1024 * taken


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_of(given: argparse.Namespace, name: str, seconds: float) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--backbone", given.backbone, "--weights", given.weights]
    out = subprocess.check_output([*command, "--memory", name, str(seconds)], text=True, stderr=subprocess.DEVNULL)
    return int(out.splitlines()[-1])


def _decoded(model: Any, inputs: Any) -> int:
    """Tokens decoded when `DECODED` are asked for and the end may not come before."""
    seen = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        seen += 1

    hook = model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    model.generate(inputs, max_new_tokens=DECODED, min_new_tokens=DECODED)
    hook.remove()
    return seen


if __name__ == "__main__":
    main()
