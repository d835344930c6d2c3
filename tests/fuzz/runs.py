"""Spoiled run folders and checkpoints of a real run of the tiny backbone: reported on, compared, asked, continued."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mutate
import yaml
from harness import Case, shell

ALIASES = b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (b, b, b"*%c, " % a * 9) for a, b in pairwise(b"abcdefghijkl"))
"""Lists of lists that stand for 9 to the eleventh values."""


def _conftest() -> Any:
    """The folder that tests train: tests/conftest.py's Project."""
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("coatkit_tests_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trained(folder: Path) -> Path:
    """A spec whose run of two steps, with two checkpoints, lies beside it; nothing is cached between cases."""
    import torch

    torch.set_num_threads(1)
    project = _conftest().Project(folder)
    project.rows = project.rows[:6]
    project.spec["stages"] = [{**project.spec["stages"][1], "steps": 2, "batch": {"rows": 2}}]
    project.spec["checkpoint"] = {"every": 1, "keep": 5}
    project.spec["gradients_every"] = 1
    results = {"metric": "choice", "score": 62.5, "low": 50.0, "high": 75.0, "rows": 8, "details": {}}
    run = project.train().folder
    (run / "eval/heldout").mkdir(parents=True)
    (run / "eval/heldout/results.json").write_text(json.dumps({"tasks": {"kind": results, "note": results}}))
    return folder / "spec.yaml"


def spoiled(draw: random.Random, path: Path) -> bytes:
    """What is in a file of JSON, JSON lines, YAML or safetensors, spoiled."""
    content = path.read_bytes()
    if draw.random() < 0.3:
        return mutate.raw(draw, content)
    if path.suffix == ".safetensors":
        return _tensors(draw, content)
    if path.suffix == ".yaml":
        if draw.random() < 0.1:
            return content + draw.choice((b"endless: &a [*a]\n", b"name: &a {b: *a}\n", ALIASES))
        if draw.random() < 0.4:
            return mutate.text(draw, content.decode()).encode("utf-8", "replace")
        return yaml.safe_dump(mutate.value(draw, yaml.safe_load(content))).encode("utf-8", "surrogatepass")
    if path.suffix == ".jsonl":
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = mutate.dumps(mutate.value(draw, json.loads(lines[at])))
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    return mutate.dumps(mutate.value(draw, json.loads(content))).encode("utf-8", "surrogatepass")


def _tensors(draw: random.Random, content: bytes) -> bytes:
    """A header that lies: other shapes, types, places, names; or a size that is not the header's."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    edit = draw.randrange(5)
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    if edit == 0:
        header = mutate.value(draw, header)
    elif edit == 1:
        header[name]["dtype"] = draw.choice(("F16", "BF16", "I64", "BOOL", "F64", "U8", "X", "F8_E4M3", None))
    elif edit == 2:
        header[name]["shape"] = draw.choice(
            ([], [0], [-1], [2**63], [2**32, 2**32], header[name]["shape"][::-1], [1.5])
        )
    elif edit == 3:
        header[name]["data_offsets"] = draw.choice(
            ([0, 0], [-8, 0], [0, 2**62], [8, 4], [0], [len(data), len(data) + 4])
        )
    elif draw.random() < 0.5:
        header[draw.choice(("extra", "", "../x", "heads.none.w"))] = header.pop(name)
    else:
        data = mutate.raw(draw, data)
    text = mutate.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _cases(folder: Path, draw: random.Random, files: list[str], acts: list[str], one: int = 1) -> Iterator[Case]:
    spec = trained(folder / "good")
    good = spec.parent / "run"
    for number in range(1, 1 << 30):
        run = spec.parent / "run"
        act, name = draw.choice(acts), draw.choice(files)
        aside = folder / "whole"
        if not aside.exists():
            shutil.copytree(good, aside)
        shutil.rmtree(run)
        shutil.copytree(aside, run)
        if act == "continue":  # from the first of two steps, which the spoiled checkpoint is then of
            shutil.rmtree(run / "checkpoints/step-00000002")
        path = run / name
        if not path.exists():
            path = next(run.glob("checkpoints/*/" + path.name), path)
        if draw.random() < 0.06:
            path.unlink()
            if (instead := draw.random()) < 0.4:
                path.mkdir()
            elif instead < 0.6:
                os.mkfifo(path)  # nobody writes into it
        else:
            path.write_bytes(spoiled(draw, path))
        words: list[Any]
        if act == "continue":
            words = ["train", spec, "--resume"]
        elif act == "report":
            words = ["report", run, "--out", folder / "report.html"]
        elif act == "export":
            shutil.rmtree(folder / "exported", ignore_errors=True)
            words = ["export", run, "--to", folder / "exported"]
        else:
            words = ["ask", run, spec.parent / "clips/r00.wav", "What is heard?", "--max-new-tokens", "2"]
        yield f"{act} {name} {number}", lambda words=words: shell(*words)


def records(folder: Path, draw: random.Random) -> Iterator[Case]:
    """spec.yaml, run.json and lines of a run."""
    files = ["spec.yaml", "run.json", "metrics.jsonl", "gradients.jsonl", "eval/heldout/results.json"]
    return _cases(folder, draw, files, ["report", "report", "report", "ask", "continue"])


def checkpoints(folder: Path, draw: random.Random) -> Iterator[Case]:
    """model.safetensors, optimizer.safetensors and state.json of the newest checkpoint."""
    newest = "checkpoints/step-00000002"
    files = [f"{newest}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    return _cases(folder, draw, files, ["ask", "continue", "continue", "export"])
