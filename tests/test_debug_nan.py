"""`coatkit train --debug-nan`: the place where a step that was left out is first not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from coatkit.cli import cli
from coatkit.debug_nan import not_finite, replay
from coatkit.errors import RunError

EXPERTS = """
import torch
from torch import nn
from coatkit import Expert, Features, Head


class Poison(Expert):
    sample_rate, frame_rate, dim = 16_000, 25.0, 1

    def encode(self, audio):  # alignment by time mixes frames, and makes NaN of infinite ones
        frames = -(-audio.lengths // 640)
        values = torch.zeros(len(audio), int(frames.max()), 1)
        values[audio.samples.abs().amax(1) > 0.99] = torch.inf
        return Features(values, frames, self.frame_rate)


class Root(Poison):
    def encode(self, audio):
        frames = -(-audio.lengths // 640)
        return Features(torch.zeros(len(audio), int(frames.max()), 1), frames, self.frame_rate)

    def loss(self, predicted, target, mask):
        # The gradient of a square root is infinite at 0, and times 0 it is NaN.
        return {"root": (0.0 * predicted[mask]).sqrt().mean()}


class Overflow(Head):
    def __init__(self, hidden_size, dim):
        super().__init__()
        self.out = nn.Linear(hidden_size, dim)

    def forward(self, hidden, mask):
        return self.out(hidden).exp() * 1e38 * 1e38
"""


def spoiled(project: Any, steps: int = 3, rows: int = 7, every: int = 1, **experts: Any) -> Any:
    (project.folder / "spoiled.py").write_text(EXPERTS)
    project.add_clip("loud", np.r_[np.zeros(3000), 1.0, np.zeros(3000)])
    project.spec["experts"] |= {name: {"use": f"./spoiled.py:{use}", **more} for name, (use, more) in experts.items()}
    project.spec["optimizer"] = {"max_skipped": 100}
    project.spec["checkpoint"] = {"every": every, "keep": 100}
    weights = {"audio": 1.0} | dict.fromkeys(experts, 1.0)
    project.spec["stages"] = [{"name": "one", "steps": steps, "lr": 1e-3, "batch": {"rows": rows}, "weights": weights}]
    return project


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_experts_target_is_named_with_its_row(project: Any) -> None:
    spoiled(project, poison=("Poison", {}))
    run = project.train()
    before = files(run.folder)
    spec = project.folder / "spec.yaml"
    result = CliRunner().invoke(cli, ["train", str(spec), "--debug-nan"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    step = json.loads((run.folder / "skipped.jsonl").read_text().splitlines()[-1])["step"]
    assert lines[0].startswith(f"step {step} (stage 'one', its step {step}): ")
    assert lines[1].startswith("weights: as then")
    assert lines[2].startswith("expert 'poison': its target is not finite for rows loud: ")
    assert " NaN of " in lines[2]
    assert lines[3] == "loss poison.mse: nan"
    assert len(lines) == 4
    assert files(run.folder) == before
    again = CliRunner().invoke(cli, ["train", str(spec), "--set", f"output={project.folder / 'again'}"])
    assert "skipped (NaN, Inf or no usable row); see " in again.stderr
    assert f"  where a NaN begins: coatkit train {spec} --debug-nan\n" in again.stderr


def test_a_gradient_is_named_with_its_operation(project: Any) -> None:
    spoiled(project, root=("Root", {}))
    assert project.train().result.position.skipped == 3
    lines = replay(project.load())
    (found,) = lines[2:]
    assert found.startswith("gradient of root.root: not finite in ")
    assert "the first operation on the way back that gives NaN is MulBackward0" in found
    assert " NaN" in found


def test_a_module_is_named(project: Any) -> None:
    spoiled(project, over=("Root", {"head": {"use": "./spoiled.py:Overflow"}}))
    project.train()
    lines = replay(project.load())
    assert any(line.startswith("module heads.over (Overflow): ") and "what goes in is finite" in line for line in lines)


def test_other_weights_are_told(project: Any) -> None:
    spoiled(project, steps=6, every=4, poison=("Poison", {}))
    run = project.train()
    steps = [json.loads(line)["step"] for line in (run.folder / "skipped.jsonl").read_text().splitlines()]
    said = replay(project.load())[1]
    last = steps[-1]
    between = last - 1 - (4 if last > 4 else 0)
    assert between > 0
    assert f"; {between} steps of learning lie between" in said


def test_where_all_is_finite_now_it_is_said(project: Any) -> None:
    spoiled(project, poison=("Poison", {}))
    project.train()
    text = (project.folder / "spoiled.py").read_text()
    (project.folder / "spoiled.py").write_text(text.replace("torch.inf", "1.0"))
    assert replay(project.load())[2].startswith("all is finite here")


def test_a_run_without_nan_has_nothing_to_look_at(project: Any) -> None:
    spoiled(project, rows=5)
    project.train()
    with pytest.raises(RunError, match="no step of this run gave NaN or Inf"):
        replay(project.load())


def test_other_rows_are_refused(project: Any) -> None:
    spoiled(project, poison=("Poison", {}))
    run = project.train()
    line = json.loads((run.folder / "skipped.jsonl").read_text().splitlines()[-1])
    (run.folder / "skipped.jsonl").write_text(json.dumps(line | {"rows": ["gone", "loud"]}) + "\n")
    with pytest.raises(RunError, match="was made of rows gone, loud, and would now be of"):
        replay(project.load())


def test_without_a_run_it_is_an_error(project: Any) -> None:
    with pytest.raises(RunError):
        replay(project.load())


def test_not_finite_counts() -> None:
    assert not_finite(torch.tensor([1.0, 2.0])) == ""
    assert not_finite(torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])) == "1 NaN and 2 infinite of 4 values"
    assert not_finite(torch.tensor([1])) == ""
