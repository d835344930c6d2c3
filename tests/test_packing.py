"""Rows end to end in one sequence: the same losses and gradients as padded, where a backbone says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from coatkit.build import build
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import Step, each_tensor, load_batch
from coatkit.errors import RunError
from coatkit.packing import packed
from coatkit.thinking import IGNORE

PACKING = ["mini", "audio-flamingo-3", "qwen2-audio"]


@pytest.fixture
def learnt(project: Any, stir: Any) -> Callable[..., Any]:
    """The model of a backbone, its adapters stirred."""

    def made(use: str, std: float = 0.05) -> Any:
        project.spec["backbone"].update(use=use)
        return stir(build(project.load(), "cpu").eval(), std)

    return made


def gradients(model: Any, batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = model(batch, ["audio", "level"])
    sum(losses.sums.values()).backward()
    return (
        {name: value.detach() for name, value in losses.sums.items()},
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("use", PACKING)
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(project: Any, use: str, learnt: Any) -> None:
    model = learnt(use)
    rows = JsonlRows(project.write().parent / "train.jsonl")[10:20]
    batch = load_batch(rows, model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
    real = int(batch.inputs.tokens["attention_mask"].sum())
    sums, grads = gradients(model, batch)
    batch.inputs = packed(batch.inputs)
    assert batch.inputs.tokens["input_ids"].shape == (1, real)
    packed_sums, packed_grads = gradients(model, batch)
    assert set(sums) == {"ce", "audio.mse", "level.mse"}
    for name, value in sums.items():
        torch.testing.assert_close(packed_sums[name], value, rtol=1e-5, atol=1e-5)
    assert len(grads) > 8
    for name, gradient in grads.items():
        torch.testing.assert_close(
            packed_grads[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_labels_and_places_are_those_of_the_rows(project: Any) -> None:
    model = build(project.load(), "cpu")
    rows = JsonlRows(project.folder / "train.jsonl")[13:18]
    inputs = load_batch(rows, model.backbone.preparer, (), 120.0, train=True).inputs
    one = packed(inputs)
    ids, labels = one.tokens["input_ids"][0], one.labels[0]  # type: ignore[index]
    mask = inputs.tokens["attention_mask"].bool()
    assert ids.tolist() == inputs.tokens["input_ids"][mask].tolist()
    assert labels[labels != IGNORE].tolist() == inputs.labels[inputs.labels != IGNORE].tolist()  # type: ignore[index]
    assert one.row_ids == inputs.row_ids
    tokens = model.backbone.preparer.tokens
    for sound in range(len(inputs.audio_row)):
        places = one.think_index[sound, : int(one.think_lengths[sound])]
        assert set(ids[places].tolist()) == {tokens.think}
        places = one.audio_index[sound, : int(one.audio_lengths[sound])]
        assert set(ids[places].tolist()) == {model.backbone.preparer.audio_token}
    starts = (one.tokens["position_ids"][0] == 0).nonzero().flatten()
    assert len(starts) == len(rows)
    assert (labels[starts] == IGNORE).all()


def test_a_run_that_packs_learns_what_one_that_pads_learns(project: Any) -> None:
    padded = project.train("output=padded")
    project.spec["stages"][0]["batch"] = project.spec["stages"][1]["batch"] = {"rows": 5, "pack": True}
    run = project.train("output=packed")
    for one, other in zip(padded.metrics, run.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_a_backbone_that_cannot_says_why(project: Any) -> None:
    project.spec["backbone"].update(use="qwen2.5-omni")
    project.spec["stages"][0]["batch"] = {"rows": 5, "pack": True}
    with pytest.raises(RunError, match=r"stage 'one': batch\.pack: rows of qwen2\.5-omni cannot be packed: .*attend"):
        project.train()


def test_a_later_stage_that_cannot_pack_is_found_before_the_first(project: Any) -> None:
    project.spec["backbone"].update(use="qwen2.5-omni")
    project.spec["stages"][1]["batch"] = {"rows": 5, "pack": True}
    with pytest.raises(RunError, match=r"stage 'two': batch\.pack"):
        project.train()
    assert not (project.folder / "run").exists()


def test_omni_would_indeed_be_wrong(project: Any, learnt: Any) -> None:
    """If this fails, transformers has mended it, and `cannot_pack` can go."""
    model = learnt("qwen2.5-omni", 0.3)
    rows = JsonlRows(project.write().parent / "train.jsonl")[10:16]
    batch = load_batch(rows, model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
    sums, _ = gradients(model, batch)
    batch.inputs = packed(batch.inputs)
    wrong, _ = gradients(model, batch)
    assert abs(float(wrong["ce"] - sums["ce"])) > 1e-3 * float(sums["ce"])


def test_every_tensor_of_a_step_is_reached(project: Any) -> None:
    """As pinning memory does, which needs a GPU."""
    model = build(project.load(), "cpu")
    rows = JsonlRows(project.folder / "train.jsonl")[:3]
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True)
    seen: list[torch.Tensor] = []

    def see(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor.clone()

    step = Step([batch, None], ["bad"], ["a"], "", 0.5)
    copy = each_tensor(step, see)
    assert (copy.bad, copy.row_ids, copy.epoch, copy.batches[1]) == (["bad"], ["a"], 0.5, None)
    inputs = copy.batches[0].inputs
    held = [v for v in vars(inputs).values() if isinstance(v, torch.Tensor)] + list(inputs.tokens.values())
    held += [t for audio in copy.batches[0].audio.values() for t in (audio.samples, audio.lengths)]
    assert len(held) == len(seen) > 10
    assert torch.equal(inputs.tokens["input_ids"], batch.inputs.tokens["input_ids"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_a_pinned_step_is_pinned(project: Any) -> None:
    model = build(project.load(), "cpu")
    rows = JsonlRows(project.folder / "train.jsonl")[:3]
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True)
    step = Step([batch]).pin_memory()
    assert step.batches[0].inputs.tokens["input_ids"].is_pinned()  # type: ignore[union-attr]
