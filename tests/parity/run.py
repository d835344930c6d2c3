"""Compare an expert with the upstream package it stands for; see README.md for the two environments.

    python run.py dump NAME FOLDER           # upstream's environment: make weights, run upstream, store what it gives
    python run.py compare NAME FOLDER        # coatkit's environment: run ours on the same sounds and weights, compare
    python run.py table FOLDER PAGE          # put the table of every comparison in FOLDER into a Markdown page
    python run.py serve SIDE NAME FOLDER     # for benchmarks/experts.py: time `upstream` or `ours` on request

NAME is a module of this folder. It gives PACKAGES, RATE, LIMITS, NOTE and two functions, `upstream(folder, extras)` and
`ours(folder, extras)`; each gives a function from sounds [N] to named arrays [L, d] for each sound. `compare` exits
with 1 when a difference is over its limit.

A difference is relative: the norm of (ours - upstream's) over the norm of upstream's, of the worst frame.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

Encode = Callable[[list[np.ndarray]], list[dict[str, np.ndarray] | None]]
HERE = Path(__file__).resolve().parent
CLIPS = HERE.parents[1] / "examples/quickstart/audio"
BEGIN, END = "<!-- parity: written by `make parity` -->", "<!-- end of parity -->"


def module(name: str) -> ModuleType:
    """The module of one expert, under a name that cannot hide the upstream package of the same name."""
    # The folder of this script is on the path, and holds files named as upstream packages are.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]
    spec = importlib.util.spec_from_file_location(f"parity_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def sounds(rate: int) -> dict[str, np.ndarray]:
    """Seeded and real sounds at `rate` Hz, float32 [N], two of them short."""
    import soundfile
    from scipy.signal import resample_poly

    random = np.random.default_rng(0)
    t = np.arange(2 * rate) / rate
    chord = sum(0.1 * np.sin(2 * np.pi * f * k * t) / k for f in (220.0, 277.18, 329.63) for k in (1, 2, 3, 4))
    t = np.arange(7 * rate) / rate
    sweep = 0.3 * np.sin(2 * np.pi * (110 * t + 90 * t**2)) * (0.55 + 0.45 * np.sin(2 * np.pi * 0.7 * t))
    found = {
        "noise 3 s": 0.1 * random.standard_normal(3 * rate),
        "chord 2 s": chord,
        "sweep 7 s": sweep + 0.003 * random.standard_normal(t.size),
        "noise 12 s": 0.1 * random.standard_normal(12 * rate),
        "click 0.1 s": np.eye(1, rate // 10, rate // 40)[0],
        "silence 2 s": np.zeros(2 * rate),
    }
    for label, pattern in (("speech", "esp_en*"), ("music", "note_*")):
        path = sorted(CLIPS.glob(pattern))[0]
        samples, native = soundfile.read(path, dtype="float64")
        divisor = int(np.gcd(rate, native))
        samples = resample_poly(samples, rate // divisor, native // divisor)
        found[f"{label} {samples.size / rate:.1f} s"] = samples
    return {name: np.asarray(samples, dtype=np.float32) for name, samples in found.items()}


def versions(packages: list[str]) -> str:
    return ", ".join([*(f"{p} {version(p)}" for p in packages), f"Python {platform.python_version()}"])


def dump(name: str, folder: Path) -> int:
    """Upstream's arrays for every sound."""
    folder.mkdir(parents=True, exist_ok=True)
    parity = module(name)
    heard = sounds(parity.RATE)
    made = parity.upstream(folder, True)(list(heard.values()))
    stored = {"versions": np.array(versions(parity.PACKAGES))}
    for (label, samples), arrays in zip(heard.items(), made, strict=True):
        stored[f"{label}|samples"] = samples
        for key, array in (arrays or {}).items():
            stored[f"{label}|{key}"] = np.asarray(array, dtype=np.float32)
    np.savez(folder / "upstream.npz", **stored)
    print(f"{name}: upstream ran on {len(heard)} sounds ({stored['versions']})")
    return 0


def compare(name: str, folder: Path) -> int:
    """Print the largest differences and keep them in `FOLDER/result.json`; 1 if one is over its limit, else 0."""
    import torch

    parity = module(name)
    upstream = np.load(folder / "upstream.npz")
    labels = [key.removesuffix("|samples") for key in upstream.files if key.endswith("|samples")]
    made = parity.ours(folder, True)([upstream[f"{label}|samples"] for label in labels])
    worst: dict[str, dict[str, float | str]] = {}
    refused, failed = [], False
    for label, ours in zip(labels, made, strict=True):
        assert ours is not None
        assert all(np.isfinite(array).all() for array in ours.values()), f"{name}: not finite on {label}"
        if f"{label}|features" not in upstream.files:
            refused.append(label)
            continue
        for key, limit in parity.LIMITS.items():
            a, b = np.asarray(ours[key], dtype=np.float64), upstream[f"{label}|{key}"].astype(np.float64)
            if a.shape != b.shape:
                print(f"{name}: {key} of {label}: ours {a.shape}, upstream's {b.shape}")
                failed = True
                continue
            a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
            # A frame of zeros has no relative difference; the array's own size stands in.
            size = np.maximum(np.linalg.norm(b, axis=1), 1e-6 * np.linalg.norm(b) + 1e-12)
            relative = float((np.linalg.norm(a - b, axis=1) / size).max())
            absolute = float(np.abs(a - b).max())
            print(f"{name:12} {label:14} {key:12} {a.shape!s:14} relative {relative:.1e}  absolute {absolute:.1e}")
            failed |= not relative <= limit
            if relative > float(worst.get(key, {}).get("relative", -1.0)):
                worst[key] = {"relative": relative, "absolute": absolute, "limit": limit, "sound": label}
    result = {
        "name": name.replace("_", "-"),
        "upstream": str(upstream["versions"]),
        "ours": versions(["torch", "numpy"] if name == "basic_pitch" else ["torch", "transformers", "numpy"]),
        "arrays": worst,
        "sounds": len(labels),
        "refused": refused,
        "note": parity.NOTE,
        "threads": torch.get_num_threads(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}: {'OVER THE LIMIT' if failed else 'within its limits'}")
    return int(failed)


def table(folder: Path, page: Path) -> int:
    """Write the results into the page, between its two marks."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    lines = ["| expert | array | relative | absolute | limit | on | upstream |", "|---|---|---|---|---|---|---|"]
    for result in results:
        for key, row in result["arrays"].items():
            lines.append(
                f"| {result['name']} | {key} | {row['relative']:.1e} | {row['absolute']:.1e} | {row['limit']:.0e}"
                f" | {row['sound']} | {result['upstream']} |"
            )
    lines.append("")
    for result in results:
        told = [result["note"]] if result["note"] else []
        if result["refused"]:
            told.append(f"Upstream cannot take {', '.join(result['refused'])}; ours gives finite features there.")
        lines += [f"- {result['name']}: {' '.join(told)}"] if told else []
    sizes = sorted({result["sounds"] for result in results})
    lines += ["", f"Over {' or '.join(map(str, sizes))} sounds each. Ours: {results[-1]['ours']}."]
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
    return 0


def serve(side: str, name: str, folder: Path) -> int:
    """Read a line with the path of an .npz of sounds, run on them, answer with the seconds it took; until the end."""
    parity = module(name)
    encode: Encode = getattr(parity, side)(folder, False)
    print("ready", flush=True)
    for line in sys.stdin:
        stored = np.load(line.strip())
        heard = [stored[key] for key in stored.files]
        start = time.perf_counter()
        encode(heard)
        print(f"seconds {time.perf_counter() - start:.6f}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("dump", "compare"):
        one = modes.add_parser(mode)
        one.add_argument("name")
        one.add_argument("folder", type=Path)
    one = modes.add_parser("table")
    one.add_argument("folder", type=Path)
    one.add_argument("page", type=Path)
    one = modes.add_parser("serve")
    one.add_argument("side", choices=("upstream", "ours"))
    one.add_argument("name")
    one.add_argument("folder", type=Path)
    given = vars(parser.parse_args())
    return {"dump": dump, "compare": compare, "table": table, "serve": serve}[given.pop("mode")](**given)


if __name__ == "__main__":
    sys.exit(main())
