"""`backbone.compile`: the same losses and gradients, and a checkpoint that either kind of run reads."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from coatkit.build import build
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


def test_compiled_layers_give_the_same_losses_and_gradients(project: Any, stir: Any) -> None:
    found = []
    for compiled in (False, True):
        project.spec["backbone"]["compile"] = compiled
        model = stir(build(project.load(), "cpu").train())
        rows = JsonlRows(project.folder / "train.jsonl")
        for part in (slice(8, 12), slice(2, 5), slice(14, 18)):  # of unlike shapes
            batch = load_batch(rows[part], model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
            losses = model(batch, ["audio", "level"])
            sum(losses.sums.values()).backward()
            found.append({name: value.detach() for name, value in losses.sums.items()})
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, compiled = found[:4], found[4:]
    assert len(plain[-1]) > 8
    for one, other in zip(plain, compiled, strict=True):
        assert set(one) == set(other)
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5)


def test_a_compiled_run_resumes_without_it(project: Any) -> None:
    run = project.train("backbone.compile=true", "stages.0.steps=1", "stages.1.steps=1")
    names = set(run.tensors())
    assert names == set(project.train("stages.0.steps=1", "stages.1.steps=1", "output=plain").tensors())
    assert not any("_orig_mod" in name for name in names)
