"""Throughput of each expert against the upstream package's own call on the same clips, as ratios from one run.

    make bench-experts                       # every expert; needs `make parity` before
    python benchmarks/experts.py panns spidr # some

Each side runs in its own environment as a server with one thread; the clips go to one, then to the other, several
times over, so that what else the machine does falls on both. The ratio is upstream's median time over ours: above 1,
ours is faster. Results go to benchmarks/results/experts.json and into the table of docs/experts.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "tests/parity/run.py"
NAMES = ("basic_pitch", "emotion2vec", "mert", "panns", "spidr")
RATES = {"basic_pitch": 22_050, "emotion2vec": 16_000, "mert": 24_000, "panns": 32_000, "spidr": 16_000}
RESULTS = ROOT / "benchmarks/results/experts.json"
PAGE = ROOT / "docs/experts.md"
BEGIN, END = "<!-- throughput: written by `make bench-experts` -->", "<!-- end of throughput -->"


def durations() -> dict[str, list[float]]:
    """Seconds of the clips of each batch: equal ones, and ones spread as speech corpora are."""
    spread = np.exp(np.random.default_rng(0).normal(np.log(5.0), 0.7, size=8)).clip(0.5, 30.0)
    return {"equal": [10.0] * 4, "mixed": [round(float(s), 2) for s in spread]}


def clips(seconds: list[float], rate: int) -> list[np.ndarray]:
    """Noise with a syllable-like swell, float32 [N] at `rate` Hz."""
    random = np.random.default_rng(1)
    made = []
    for length in seconds:
        t = np.arange(round(length * rate)) / rate
        noise = random.standard_normal(t.size) * (0.1 + 0.1 * np.sin(2 * np.pi * 4 * t) ** 2)
        made.append(noise.astype(np.float32))
    return made


class Side:
    """One expert, upstream's or ours, waiting in its own environment."""

    def __init__(self, python: Path, side: str, name: str, folder: Path) -> None:
        command = [str(python), str(HARNESS), "serve", side, name, str(folder)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **threads})
        self._until("ready")

    def _until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise SystemExit(f"{' '.join(self.process.args)} ended without an answer")  # type: ignore[arg-type]

    def run(self, path: Path) -> float:
        """Seconds for the clips in the file."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return float(self._until("seconds"))

    def close(self) -> None:
        self.process.communicate(timeout=60)


def measure(name: str, folder: Path, repetitions: int) -> dict[str, object]:
    """Median times of both sides for each kind of batch."""
    upstream = Side(ROOT / ".parity/bin/python", "upstream", name, folder)
    ours = Side(Path(sys.executable), "ours", name, folder)
    result: dict[str, object] = {}
    for kind, seconds in durations().items():
        path = folder / f"clips-{kind}.npz"
        np.savez(path, *clips(seconds, RATES[name]))
        for side in (upstream, ours):
            side.run(path)  # the first call allocates
        times = [(upstream.run(path), ours.run(path)) for _ in range(repetitions)]
        theirs, our = (statistics.median(column) for column in zip(*times, strict=True))
        pairs = sorted(a / b for a, b in times)
        result[kind] = {
            "ratio": theirs / our,
            "ratio_low": pairs[0],
            "ratio_high": pairs[-1],
            "seconds_of_sound": sum(seconds),
            "our_seconds_per_second": our / sum(seconds),
        }
        print(f"{name:12} {kind:6} {theirs / our:.2f} x  ({pairs[0]:.2f} to {pairs[-1]:.2f})", flush=True)
    upstream.close()
    ours.close()
    return result


def table(results: dict[str, dict[str, dict[str, float]]], page: Path) -> None:
    """Write the ratios into the page, between its two marks."""
    lines = ["| expert | equal lengths | mixed lengths | our cost |", "|---|---|---|---|"]
    for name, kinds in sorted(results.items()):
        cells = [f"{k['ratio']:.2f} x ({k['ratio_low']:.2f} to {k['ratio_high']:.2f})" for k in kinds.values()]
        cost = kinds["equal"]["our_seconds_per_second"]
        lines.append(f"| {name.replace('_', '-')} | {' | '.join(cells)} | {cost:.3f} s per s |")
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], default=[])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() and args.names else {"experts": {}}
    for name in args.names or NAMES:
        folder = ROOT / ".parity/work" / name
        if not (folder / "result.json").exists():
            raise SystemExit(f"{name}: run `make parity` first; it makes the environment and the weights")
        stored["experts"][name] = measure(name, folder, args.repetitions)
    stored["machine"] = (
        f"{platform.machine()}, {os.cpu_count()} virtual cores, one thread each, torch {version('torch')}"
    )
    stored["batches"] = durations()
    RESULTS.write_text(json.dumps(stored, indent=2) + "\n")
    table(stored["experts"], PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
