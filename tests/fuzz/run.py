"""`make fuzz`: spoiled inputs of every kind; prints how many were tried, accepted and refused, and that none crashed.

python tests/fuzz/run.py [AREA ...] [--cases 4000] [--seed 0] [--keep FOLDER] [--write docs/reliability.md]

Each area runs in a process of its own, whose address space is limited (harness.MEMORY) and each case's time
(harness.SECONDS); a watchdog outside of Python ends one that hangs in C. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

AREAS = {  # area: (module:function, share of --cases, what is spoiled)
    "specs": ("specs:specs", 1.0, "specs, `--set`, `extends` (all specs of examples/)"),
    "suites": ("specs:suites", 0.5, "suites and studies"),
    "rows": ("manifests:rows", 1.0, "rows: JSONL (coatkit, ms-swift, sharegpt, NeMo, lhotse), gzip, lists"),
    "tables": ("manifests:tables", 0.3, "Parquet and Arrow tables, folders of `datasets`, mixtures and their sidecars"),
    "sounds": ("sounds:sounds", 0.3, "WAV, FLAC, MP3, OGG, Opus, AIFF, AU, CAF, RF64, M4A; slices and cells"),
    "runs": ("runs:records", 0.15, "run folders: spec.yaml, run.json, metrics, gradients, results"),
    "checkpoints": (
        "runs:checkpoints",
        0.15,
        "checkpoints: safetensors and state.json; asked, continued from, exported",
    ),
    "stores": ("stores:stores", 0.25, "feature stores: shards, index, about.json"),
    "evals": ("stores:evals", 0.25, "evaluations: predictions, results, records"),
    "locks": ("stores:locks", 0.1, "assets.lock"),
    "plugins": ("installs:plugins", 0.05, "plugins: entry points, manifests, what they raise and print"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", default=list(AREAS), help=", ".join(AREAS))
    parser.add_argument("--cases", type=int, default=4000, help="cases of the largest areas; the others have a share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to leave the files of cases that crashed")
    parser.add_argument("--write", type=Path, help="page whose table of figures is made anew")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [area for area in given.areas if area not in AREAS]:
        parser.error(f"there is no area {unknown[0]}; there are {', '.join(AREAS)}")
    if given.here:
        _in_this_process(given.areas[0], given.cases, given.seed, given.keep)
        return 0
    found = {area: _apart(area, given.cases, given.seed, given.keep) for area in given.areas}
    lines = table(found)
    print("\n".join(lines))
    if given.write is not None:
        _write(given.write, [*lines, "", _conditions(given.cases, given.seed)])
    return 1 if any(result["crashed"] for result in found.values()) else 0


def _in_this_process(area: str, cases: int, seed: int, keep: Path | None) -> None:
    import harness

    place, share, _ = AREAS[area]
    module, _, name = place.partition(":")
    count = max(1, round(cases * share))
    with tempfile.TemporaryDirectory(prefix="coatkit-fuzz-") as folder:
        os.environ["COATKIT_CACHE"] = f"{folder}/cache"
        inputs = Path(folder, "inputs")
        inputs.mkdir()
        os.chdir(inputs)
        cases_of = getattr(__import__(module), name)(inputs, random.Random(f"{seed} {area}"))
        first = next(cases_of)  # what has to be made before, and imported, is not counted
        with harness.limited() as grown:
            begun = time.monotonic()
            tally = harness.run(_watched(chain([first], cases_of)), inputs, count, keep)
            result = {
                "tried": tally.tried,
                "accepted": tally.accepted,
                "refused": tally.refused,
                "crashed": tally.crashed,
                "peak_mb": round(grown() / 1e6),
                "seconds": round(time.monotonic() - begun),
            }
    print(json.dumps(result))


def _watched(cases):  # type: ignore[no-untyped-def]
    import harness

    # A hang in C is ended from outside of Python, and says where it was.
    for name, act in cases:
        faulthandler.dump_traceback_later(3 * harness.SECONDS, exit=True)
        yield name, act
    faulthandler.cancel_dump_traceback_later()


def _apart(area: str, cases: int, seed: int, keep: Path | None) -> dict[str, object]:
    words = [sys.executable, __file__, area, "--here", "--cases", str(cases), "--seed", str(seed)]
    words += ["--keep", str(keep / area)] if keep else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=env)
    try:
        result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = {"tried": 0, "accepted": 0, "refused": 0, "peak_mb": 0, "seconds": 0}
        result["crashed"] = [("the process", f"ended with code {done.returncode}\n{done.stderr[-3000:]}")]
    for name, said in result["crashed"]:  # type: ignore[attr-defined]
        print(f"CRASHED {area}: {name}: {said}", file=sys.stderr)
    print(f"{area}: {result['tried']} tried, {result['seconds']} s", file=sys.stderr)
    return result


def table(found: dict[str, dict[str, object]]) -> list[str]:
    lines = [
        "| what was spoiled | tried | accepted | refused | crashed | peak memory added |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total = dict.fromkeys(("tried", "accepted", "refused", "crashed"), 0)
    for area, result in found.items():
        counts = {**result, "crashed": len(result["crashed"])}  # type: ignore[arg-type]
        for key in total:
            total[key] += counts[key]  # type: ignore[operator]
        shown = " | ".join(f"{counts[key]:,}" for key in total)
        lines.append(f"| {AREAS[area][2]} | {shown} | {result['peak_mb']} MB |")
    return [*lines, f"| all | {' | '.join(f'{count:,}' for count in total.values())} | |"]


def _conditions(cases: int, seed: int) -> str:
    import harness

    return (
        f'`make fuzz FUZZ="--cases {cases} --seed {seed}"`: at most {harness.SECONDS} s for a case, and'
        f" {harness.MEMORY >> 30} GiB of address space beyond the imports for an area."
    )


def _write(page: Path, lines: list[str]) -> None:
    begin, end = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{page}: has no {begin} ... {end}")
    page.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
