"""coatkit's losses and gradients against the plain implementation's, on the same batch."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from coatkit.build import build
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch
from coatkit.model import CoatModel
from coatkit.thinking import IGNORE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WEIGHTS = {"audio": 0.7, "level": 1.3}


@pytest.fixture(scope="module")
def plain_code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain", BENCHMARKS / "plain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_of(model: CoatModel, batch: Any) -> torch.Tensor:
    """One step's loss as the trainer adds it up."""
    labels = batch.inputs.labels
    losses = model(batch, list(WEIGHTS))
    answers, thinking = int((labels[:, 1:] != IGNORE).sum()), int(batch.inputs.think_lengths.sum())
    means = {name: value / (answers if name == "ce" else thinking) for name, value in losses.sums.items()}
    return sum(({"ce": 1.0, **WEIGHTS}[name.partition(".")[0]] * value for name, value in means.items()), start=0.0)


@pytest.mark.parametrize("use", ["mini", "qwen2-audio"])
def test_losses_and_gradients_equal_the_plain_ones(project: Any, plain_code: ModuleType, stir: Any, use: str) -> None:
    project.spec["backbone"].update(use=use)
    project.spec["experts"]["audio"] = {"target": "tower"}
    loaded = project.load()
    model = stir(build(loaded, "cpu").eval())
    rows = JsonlRows(project.folder / "train.jsonl")[10:20]
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True)
    plain = plain_code.Plain(model, WEIGHTS).eval()

    ours = loss_of(model, batch)
    ours.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = plain(**plain_code.arguments_of(batch))
    out["loss"].backward()
    assert out["loss"].item() == pytest.approx(ours.item(), rel=1e-5)

    theirs = {
        name.replace("net.base_model.model.", "net.", 1): p.grad
        for name, p in plain.named_parameters()
        if p.grad is not None
    }
    rows_of = next(grad for name, grad in theirs.items() if "trainable_tokens_delta" in name)
    torch.testing.assert_close(mine.pop("net.thinking_rows.rows"), rows_of, rtol=1e-3, atol=1e-6)
    assert len(mine) > 8
    for name, gradient in mine.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
