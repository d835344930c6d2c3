"""The crash matrix: `python tests/crash/matrix.py FOLDER [--kills N] [--seed S] [--write docs/reliability.md]`.

Kills trainers of one and of two processes, and writers of the feature store, of mixtures and of exports; after every
kill all names are looked at, and after the last the result is compared with that of a run nobody killed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import Project
from harness import Counted, die_in, differing, half_written, moments_of_training, run_one, run_two

EVERY = 2


@dataclass
class Figures:
    kills: Counter[str] = field(default_factory=Counter)
    series: Counter[str] = field(default_factory=Counter)
    equal: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    problems: list[str] = field(default_factory=list)


def project_in(folder: Path) -> Project:
    project = Project(folder)
    project.spec["backbone"]["lora"]["dropout"] = 0.1
    project.spec["head"]["dropout"] = 0.1
    project.spec["optimizer"] = {"between_stages": "keep", "weight_decay": 0.01}
    project.spec["checkpoint"] = {"every": EVERY, "keep": 2}
    for stage in project.spec["stages"]:
        stage.update(steps=6, schedule="cosine", warmup_steps=1)
    project.write()
    return project


def steps_written(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().split("\n")) - 1 if file.exists() else 0


def newest(run: Path) -> int:
    found = [int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if (p / "state.json").is_file()]
    return max(found, default=0)


def training(folder: Path, processes: int, kills: int, draw: random.Random, figures: Figures) -> None:
    """Runs that are killed, resumed, killed ..., until there were so many kills."""
    from coatkit.spec_file import load_spec
    from coatkit.trainer import train

    project = project_in(folder)
    name = f"training, {processes} process" + ("es" if processes > 1 else "")

    def attempt(output: str, arm: Callable[[], Any] | None) -> int:
        def work() -> None:
            torch.set_num_threads(1)
            train(load_spec(project.folder / "spec.yaml", [f"output={output}"]), resume=True)

        return run_one(work, arm) if processes == 1 else run_two(work, arm, draw.randrange(2))

    assert attempt("whole", None) == 0, Path(os.environ["CRASH_LOG"]).read_text()
    done = series = 0
    while done < kills:
        output, here, quiet = f"killed-{series}", 0, 0
        series += 1
        while True:
            kind, arm = moments_of_training(random.Random(draw.random()))
            code = attempt(output, arm if done < kills and here < 12 and quiet < 3 else None)
            run = project.folder / output
            if code == 0:
                break
            if code == 1:
                log = Path(os.environ["CRASH_LOG"])
                figures.problems.append(f"{name}: {kind}: an error: {log.read_text()[-600:]}")
                log.write_text("")
                quiet += 1
                if quiet > 3:
                    break
                continue
            done, here = done + 1, here + 1
            figures.kills[f"{name}: {kind}"] += 1
            figures.lost = max(figures.lost, steps_written(run) - newest(run))
            figures.problems += [f"{name}: {kind}: {wrong}" for wrong in half_written(run)]
        figures.series[name] += 1
        wrong = differing(run, project.folder / "whole")
        figures.equal[name] += not wrong
        figures.problems += [f"{name}: differs: {w}" for w in wrong[:5]]
        print(f"{name}: {done} kills, {figures.equal[name]} of {figures.series[name]} runs equal", flush=True)


def writing(
    name: str,
    work: Callable[[Path], None],
    seen: Callable[[Path], Any],
    folder: Path,
    kills: int,
    draw: random.Random,
    figures: Figures,
    span: float,
) -> None:
    """A writer that is killed and started again, in a fresh folder each time it comes to its end."""
    folder.mkdir()
    (folder / "whole").mkdir()
    assert run_one(lambda: work(folder / "whole")) == 0, Path(os.environ["CRASH_LOG"]).read_text()
    expected, done, series = seen(folder / "whole"), 0, 0
    while done < kills:
        root = folder / f"killed-{series}"
        root.mkdir()
        series += 1
        here = 0
        while True:
            kind = draw.choice(["replace", "fsync", "rename", "any time", "any time"])
            nth, after, delay = draw.randint(1, 12), draw.random() < 0.5, draw.uniform(0, span)

            def arm(kind: str = kind, nth: int = nth, after: bool = after, delay: float = delay) -> None:
                die_in(delay) if kind == "any time" else Counted(os, kind, nth, after=after)

            code = run_one(partial(work, root), arm if done < kills and here < 12 else None)
            if code == 0:
                break
            if code == 1:
                figures.problems.append(f"{name}: {Path(os.environ['CRASH_LOG']).read_text()[-600:]}")
                return
            done, here = done + 1, here + 1
            figures.kills[f"{name}: {kind}"] += 1
            figures.problems += [f"{name}: {kind}: {wrong}" for wrong in half_written(root)]
        figures.series[name] += 1
        if seen(root) == expected:
            figures.equal[name] += 1
        else:
            figures.problems.append(f"{name}: what was written differs")
    print(f"{name}: {done} kills, {figures.equal[name]} of {figures.series[name]} equal", flush=True)


def store(root: Path) -> None:
    from coatkit import store as module

    module.SHARD_BYTES = 4096
    about = module.About("test", {"fingerprint": "x"}, "float32")
    generator = torch.Generator().manual_seed(1)
    with module.StoreWriter(about, root / "store") as writer:
        for i in range(40):
            values = torch.rand(16, 16, generator=generator)
            writer.add(f"{i:032x}", values)


def store_seen(root: Path) -> Any:
    from coatkit.store import Store, verify

    folder = next((root / "store").iterdir())
    assert [reason for _, reason in verify(folder) if reason] == []
    opened = Store(folder)
    assert not opened.damaged
    return {key: opened.frames(key).numpy().tobytes() for key in sorted(opened.keys())}  # type: ignore[union-attr]


def mixture(project: Project) -> Callable[[Path], None]:
    def work(root: Path) -> None:
        from coatkit.data.mixture import mix
        from coatkit.spec_data import MixtureSpec

        sources = [str(project.folder / "train.jsonl")]
        data = {"rows": 3000, "seed": 1, "categories": {"a": {"share": 1.0, "sources": sources}}}
        mix(MixtureSpec.model_validate(data), root / "mix.parquet")

    return work


def mixture_seen(root: Path) -> Any:
    from coatkit.data.mixture import MixtureRows

    return MixtureRows(root / "mix.parquet").fingerprint()


def exporting(run: Path) -> Callable[[Path], None]:
    def work(root: Path) -> None:
        from coatkit.export.write import export

        torch.set_num_threads(1)
        if not (root / "model").exists():
            export(run, root / "model", merge=True)

    return work


def export_seen(root: Path) -> Any:
    files = sorted(p for p in (root / "model").rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json"))
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(figures: Figures, seed: int) -> str:
    lines = ["| what was killed, and when | kills |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in sorted(figures.kills.items())]
    lines += [f"| **all** | **{sum(figures.kills.values())}** |", ""]
    lines += [f"- {name}: {figures.equal[name]} of {n} equal to the bit" for name, n in figures.series.items()]
    lines += [f"- steps to be made again after a kill, at most: {figures.lost} (a checkpoint every {EVERY} steps)"]
    lines += [f"- files half-written under their final names, errors, differences: {len(figures.problems)}"]
    lines += ["", f"`make test-crash`, all parts in one go, seed {seed}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--kills", type=int, default=110, help="of trainers and writers, together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a part's name: one, two, store, mixture or export")
    parser.add_argument("--write", type=Path, help="page whose table is to be replaced")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    os.environ |= {"COATKIT_CACHE": str(folder / "cache"), "CRASH_LOG": str(folder / "log"), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    import coatkit.export.write
    import coatkit.trainer  # noqa: F401  (what every child needs, once)

    figures, draw, n = Figures(), random.Random(chosen.seed), chosen.kills
    parts: dict[str, Callable[[], None]] = {
        "one": lambda: training(folder / "one", 1, round(n * 0.42), draw, figures),
        "two": lambda: training(folder / "two", 2, round(n * 0.26), draw, figures),
        "store": lambda: writing("feature store", store, store_seen, folder / "s", round(n * 0.12), draw, figures, 0.1),
        "mixture": lambda: writing(
            "mixture", mixture(project_in(folder / "p")), mixture_seen, folder / "m", round(n * 0.1), draw, figures, 0.3
        ),
        "export": lambda: export_part(folder, round(n * 0.1), draw, figures),
    }
    for name, part in parts.items():
        if chosen.only in ("", name):
            part()
    print(table(figures, chosen.seed))
    for problem in figures.problems:
        print("PROBLEM", problem)
    if chosen.write:
        text = chosen.write.read_text()
        head, _, rest = text.partition("<!-- crashes -->\n")
        _, _, tail = rest.partition("<!-- /crashes -->")
        chosen.write.write_text(f"{head}<!-- crashes -->\n{table(figures, chosen.seed)}\n<!-- /crashes -->{tail}")
    sys.exit(bool(figures.problems))


def export_part(folder: Path, kills: int, draw: random.Random, figures: Figures) -> None:
    from coatkit.spec_file import load_spec
    from coatkit.trainer import train

    project = project_in(folder / "e")
    assert run_one(lambda: train(load_spec(project.folder / "spec.yaml"))) == 0
    writing("export", exporting(project.folder / "run"), export_seen, folder / "x", kills, draw, figures, 1.5)


if __name__ == "__main__":
    main()
