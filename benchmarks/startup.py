"""How long commands take to start, against an interpreter that imports what they cannot do without.

    make bench-startup
    python benchmarks/startup.py

Each pair takes turns in one run; medians. `coatkit train` to its first step is given in seconds beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/startup.json"
SPEC = ROOT / "examples/quickstart/spec.yaml"
PAIRS = {
    "coatkit --help": (["-m", "coatkit", "--help"], ["-c", "import click"], "python -c 'import click'"),
    "coatkit check SPEC": (
        ["-m", "coatkit", "check", str(SPEC)],
        ["-c", "import pydantic, yaml"],
        "python -c 'import pydantic, yaml'",
    ),
    "coatkit plugins": (
        ["-m", "coatkit", "plugins"],
        ["-c", "import pydantic, yaml"],
        "python -c 'import pydantic, yaml'",
    ),
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_step() -> float:
    """Seconds from the command to the first step's line of metrics, on the tiny random backbone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "coatkit", "train", str(SPEC), "--set", f"output={folder}/run"]
        command += ["--set", "backbone.weights=random", "--set", "head.heads=4"]
        command += ["--set", "stages.0.steps=1", "--set", "stages.0.warmup_steps=0"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = Path(folder) / "run/metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit("training ended without a step")
            time.sleep(0.02)
        taken = time.perf_counter() - started
        process.kill()
        process.wait()
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    results = {}
    for name, (ours, bare, said) in PAIRS.items():
        times = [(seconds(ours), seconds(bare)) for _ in range(given.repeats)]
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        results[name] = {"seconds": mine, "against": said, "against_seconds": theirs, "ratio": mine / theirs}
        print(f"{name:<22} {mine:6.3f} s   {mine / theirs:5.2f} x {said} ({theirs:.3f} s)")
    taken = statistics.median(first_step() for _ in range(3))
    print(f"coatkit train, to the first step (tiny backbone): {taken:.1f} s")
    machine = f"{platform.machine()}, {os.cpu_count()} virtual cores, Python {platform.python_version()}"
    data = {"machine": machine, "repeats": given.repeats, "results": results, "train_first_step_seconds": taken}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
