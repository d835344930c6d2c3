"""The plan's counts against a real step's, for every backbone in its tiny size, over rows of unlike lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coatkit.build import build
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import Batch, load_batch
from coatkit.model import CoatModel
from coatkit.plan import Plan, RowShape, make_plan

BACKBONES = ("mini", "qwen2-audio", "qwen2.5-omni", "audio-flamingo-3")
EVERYTHING = {"lm": "full", "projector": "full", "tower": "full", "tokens": "all"}
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-full-checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True, "train": EVERYTHING},
    "full": {"train": {"lm": "full"}},
    "lm-none": {"train": {"lm": "none"}},
    "projector-full": {"train": {"projector": "full"}},
    "projector-none": {"train": {"projector": "none"}},
    "tower-full": {"train": {"tower": "full", "projector": "none"}},
    "lora-everywhere": {"train": {"lm": "lora", "projector": "lora", "tower": "lora"}},
    "everything": {"train": EVERYTHING},
    "lora-alone": {"train": {"projector": "none", "tokens": "none"}},
    "projector-alone": {"train": {"lm": "none", "tokens": "none", "projector": "full"}},
    "heads-alone": {"train": {"lm": "none", "tokens": "none", "projector": "none"}},
}


@pytest.fixture
def project(project: Any) -> Any:
    """Three sounds, in whole blocks of 2 s (the convolutions of one backbone pad to them), and a row of text alone."""
    project.rows.clear()
    for seconds in (8, 4, 2):
        noise = torch.randn(seconds * 16_000, generator=torch.Generator().manual_seed(seconds)).numpy() / 10
        project.add_clip(f"noise{seconds}", noise, answer="x" * 3 * seconds)
    talk = [("user", "How many?"), ("assistant", "Two hundred and one.")]
    project.add_row(id="text", messages=[{"role": role, "content": text} for role, text in talk])
    for stage in project.spec["stages"]:
        stage["batch"] = {"rows": 4}
    return project


def shapes(batch: Batch) -> list[RowShape]:
    """The rows as they came out of the preparer, their tokens counted."""
    inputs = batch.inputs
    assert inputs.labels is not None
    found = []
    for row in range(len(inputs.row_ids)):
        mine = [a for a, owner in enumerate(inputs.audio_row.tolist()) if owner == row]
        heard = sum(int(inputs.audio_lengths[a]) for a in mine)
        block = sum(int(inputs.think_lengths[a]) + (2 if inputs.think_lengths[a] else 0) for a in mine)
        text = int(inputs.tokens["attention_mask"][row].sum()) - heard - block
        answer = int((inputs.labels[row] != -100).sum())
        found.append(RowShape(tuple(int(inputs.audio_lengths[a]) / 25 for a in mine), text, answer))
    return found


def both(project: Any) -> tuple[Plan, CoatModel, Batch]:
    """The plan, the loaded model, and the four rows as one batch for it."""
    loaded = project.load()
    model = build(loaded, "cpu").train()
    batch = load_batch(
        JsonlRows(project.folder / "train.jsonl")[:], model.backbone.preparer, {8_000}, 120.0, train=True
    )
    return make_plan(loaded, row=shapes(batch)), model, batch


def counted(model: CoatModel, batch: Batch, active: list[str]) -> int:
    # torch's counter knows attention as it is planned; the fused kernel's backward computes the scores once more.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model(batch, active)
        sum(losses.sums.values(), torch.zeros(())).backward()
    return int(counter.get_total_flops())


def frozen(backbone: Any) -> dict[str, int]:
    """Parameters of the loaded model that do not learn, by part."""

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters() if not p.requires_grad)

    inside = any(module is backbone.projector for module in backbone.tower.modules())
    rows = backbone.thinking_rows.rows
    found = {
        "projector": count(backbone.projector),
        "tower": count(backbone.tower) - (count(backbone.projector) if inside else 0),
        "tokens": 0 if rows.requires_grad else rows.numel(),
    }
    found["lm"] = count(backbone.model) - sum(found.values())
    return {part: number for part, number in found.items() if number}


@pytest.mark.parametrize("use", BACKBONES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_counts_are_those_of_a_real_step(project: Any, use: str, change: dict[str, Any]) -> None:
    project.spec["backbone"].update(use=use, **change)
    plan, model, batch = both(project)
    assert plan.trainable == {part: sum(p.numel() for p in found) for part, found in model.parts().items()}
    assert plan.frozen == frozen(model.backbone)
    for stage, active in zip(plan.stages, (["audio"], ["audio", "level"]), strict=True):
        assert stage.padded_tokens_per_step == batch.inputs.tokens["input_ids"].numel()
        assert stage.tokens_per_step == int(batch.inputs.tokens["attention_mask"].sum())
        assert stage.flops_per_step == pytest.approx(counted(model, batch, active), rel=0.01)


@pytest.mark.parametrize("use", BACKBONES)
def test_without_thinking(project: Any, use: str) -> None:
    project.spec["backbone"]["use"] = use
    project.spec["thinking"] = "off"
    plan, model, batch = both(project)
    assert plan.trainable == {part: sum(p.numel() for p in found) for part, found in model.parts().items()}
    assert plan.frozen == frozen(model.backbone)
    assert plan.stages[0].flops_per_step == pytest.approx(counted(model, batch, []), rel=0.01)
