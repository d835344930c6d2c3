"""Spoiled specs, suites and studies, made from every real one in examples/; and specs that extend one another."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mutate
import yaml
from harness import Case, as_a_shell, shell

EXAMPLES = Path(__file__).parents[2] / "examples"


def _copied(folder: Path) -> list[Path]:
    """examples/ without runs; gives its YAML files."""
    for path in sorted(EXAMPLES.rglob("*")):
        inside = path.relative_to(EXAMPLES)
        if path.is_file() and "runs" not in inside.parts and path.stat().st_size < 1 << 20:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / inside)
    return sorted(p.relative_to(folder) for kind in ("*.yaml", "*.yml") for p in folder.rglob(kind))


def _kind(text: str) -> str:
    keys = yaml.safe_load(text)
    return "study" if "suite" in keys else "suite" if "tasks" in keys else "spec"


def _spoiled(draw: random.Random, text: str) -> bytes:
    if draw.random() < 0.55:
        text = mutate.text(draw, text)
    elif draw.random() < 0.9:
        changed = mutate.value(draw, yaml.safe_load(text))
        flow: Any = draw.choice((None, True, False))
        text = yaml.safe_dump(changed, allow_unicode=draw.random() < 0.5, sort_keys=False, default_flow_style=flow)
        text = text.replace(mutate.DEEP, "[" * 1000 + "]" * 1000)
    else:
        return mutate.raw(draw, text.encode())
    return text.encode("utf-8", "surrogatepass" if draw.random() < 0.3 else "replace")


def specs(folder: Path, draw: random.Random) -> Iterator[Case]:
    """`coatkit check` of specs."""
    real = {p: (folder / p).read_text() for p in _copied(folder)}
    bases = {p: text for p, text in real.items() if _kind(text) == "spec"}
    sound = []
    for path in bases:  # those whose files are here are checked unspoiled as well
        yield f"{path} as it is", lambda path=path: (shell("check", folder / path), sound.append(path))
    bases = {p: bases[p] for p in sound} if sound else bases
    for number in range(1, 1 << 30):
        path = draw.choice(list(bases))
        target = folder / path.with_name(f"fuzzed{path.suffix}")
        target.write_bytes(_spoiled(draw, bases[path]))
        yield f"{path} {number}", lambda target=target: shell("check", target)
        if number % 200 == 0:  # what a shell sees is what is judged here
            yield f"in a shell {number}", lambda target=target: as_a_shell("check", target)
        if number % 25 == 0:
            yield f"--set {number}", partial(shell, "check", folder / path, *_overrides(draw, bases[path]))
        if number % 50 == 0:
            yield f"extends {number}", partial(shell, "check", _ring(folder / path.parent, draw, bases[path]))


def _overrides(draw: random.Random, text: str) -> list[str]:
    there = mutate.places(yaml.safe_load(text))[1:]
    said = []
    for _ in range(draw.randrange(1, 4)):
        key = ".".join(map(str, draw.choice(there))) + draw.choice(
            ("", "", ".x", ".0", ".", "..a", ".-1", ".99999999999")
        )
        said += ["--set", f"{key}={draw.choice(mutate.WORDS)}".replace("\0", "\\0").encode("utf-8", "replace").decode()]
    return said


def _ring(folder: Path, draw: random.Random, text: str) -> Path:
    """Specs that extend one another: in a ring, in a long chain, through links, a folder, or a spoiled one."""
    for old in folder.glob("ring*.yaml"):
        old.unlink()
    length = draw.choice((1, 2, 3, 40, 300))
    for i in range(length):
        following = (i + 1) % length if draw.random() < 0.7 else i + 1
        words = f"extends: ring{following}.yaml\noutput: out{i}\n"
        (folder / f"ring{i}.yaml").write_text(words)
    end = folder / f"ring{length}.yaml"
    if draw.random() < 0.5:
        end.write_bytes(_spoiled(draw, text))
    elif draw.random() < 0.5:
        end.symlink_to(draw.choice(("ring0.yaml", end.name, ".", "/dev/null")))
    return folder / "ring0.yaml"


def suites(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Suites and studies: what `coatkit eval` reads first, and `coatkit ablate --dry-run`."""
    from coatkit.evaluation.suite import read_suite

    real = {p: (folder / p).read_text() for p in _copied(folder)}
    judged = "judge: {model: judge-1, base_url: https://127.0.0.1/v1}\ntasks:\n" + "".join(
        f"  - {{name: t{i}, data: heldout.jsonl, metric: {metric}, max_new_tokens: 8}}\n"
        for i, metric in enumerate(("judge", "exact", "wer", "f1", "bleu"))
    )
    bases = {p: text for p, text in real.items() if _kind(text) != "spec"} | {Path("quickstart/judged.yml"): judged}
    for path, text in bases.items():
        if _kind(text) == "study":
            yield f"{path} as it is", lambda path=path: shell("ablate", folder / path, "--dry-run")
    for number in range(1, 1 << 30):
        path = draw.choice(list(bases))
        target = folder / path.with_name(f"fuzzed{path.suffix}")
        target.write_bytes(_spoiled(draw, bases[path]))
        if _kind(bases[path]) == "study":
            yield f"{path} {number}", lambda target=target: shell("ablate", target, "--dry-run")
        else:
            yield f"{path} {number}", lambda target=target: read_suite(target)
