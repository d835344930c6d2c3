"""Looking at each loss's own gradient: right numbers, and nothing of the training changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from coatkit.build import build
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch
from coatkit.errors import RunError
from coatkit.gradients import look, shared_parameters
from coatkit.thinking import IGNORE

WEIGHTS = {"ce": 1.0, "audio": 0.5, "level": 2.0}


def lines(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "gradients.jsonl").read_text().splitlines()]


@pytest.fixture
def model(project: Any, stir: Any) -> Any:
    return stir(build(project.load(), "cpu").train())


def batch_of(project: Any, model: Any, part: slice) -> Any:
    rows = JsonlRows(project.folder / "train.jsonl")[part]
    return load_batch(rows, model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)


def test_norms_and_cosines_are_those_of_separate_backward_passes(project: Any, model: Any) -> None:
    batch = batch_of(project, model, slice(8, 13))
    seen = look(model, batch, ["audio", "level"], WEIGHTS)
    assert seen["rows"] == batch.inputs.row_ids
    assert all(p.grad is None for p in model.parameters())
    answers, positions = int((batch.inputs.labels[:, 1:] != IGNORE).sum()), int(batch.inputs.think_lengths.sum())
    alone = {}
    for name, weight in WEIGHTS.items():
        model.zero_grad()
        term = "ce" if name == "ce" else f"{name}.mse"
        losses = model(batch, ["audio", "level"])
        (weight * losses.sums[term] / (answers if name == "ce" else positions)).backward()
        shared = shared_parameters(model)
        alone[name] = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in shared])
    assert set(seen["norms"]) == set(WEIGHTS)
    for name, gradient in alone.items():
        assert seen["norms"][name] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert set(seen["cosines"]) == {"ce|audio", "ce|level", "audio|level"}
    for pair, cosine in seen["cosines"].items():
        a, b = pair.split("|")
        assert cosine == pytest.approx(float(torch.cosine_similarity(alone[a], alone[b], dim=0)), abs=1e-4)


def test_opposed_teachers_are_seen(project: Any, model: Any) -> None:
    """Two heads alike whose losses are each other's negative pull in opposite directions."""
    batch = batch_of(project, model, slice(8, 11))
    expert = model.experts["level"]
    model._outside[1]["audio"] = expert
    model.heads["audio"] = model.heads["level"]
    same = look(model, batch, ["audio", "level"], WEIGHTS)["cosines"]["audio|level"]
    assert same == pytest.approx(1, abs=1e-5)
    opposed = look(model, batch, ["audio", "level"], {**WEIGHTS, "level": -1.0})["cosines"]["audio|level"]
    assert opposed == pytest.approx(-1, abs=1e-5)


def test_text_alone_has_only_the_answers_gradient(project: Any, model: Any) -> None:
    seen = look(model, batch_of(project, model, slice(16, 19)), ["audio", "level"], WEIGHTS)
    assert set(seen["norms"]) == {"ce"}
    assert seen["cosines"] == {}


def test_training_is_the_same_with_it_and_without(project: Any) -> None:
    project.spec["backbone"]["lora"]["dropout"] = 0.2  # draws random numbers in every pass
    without = project.train("output=without")
    looked = project.train("gradients_every=2", "output=looked")
    assert not (without.folder / "gradients.jsonl").exists()
    ours, theirs = looked.tensors(), without.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    found = lines(looked)
    assert [line["step"] for line in found] == [1, 3, 5]
    assert [line["stage"] for line in found] == ["one", "one", "two"]
    assert set(found[0]["norms"]) == {"ce", "audio"}
    assert set(found[2]["norms"]) == {"ce", "audio", "level"}


def test_lines_of_steps_made_again_are_dropped(project: Any) -> None:
    project.spec["checkpoint"]["every"] = 2
    run = project.train("gradients_every=1")
    before = lines(run)
    for folder in run.checkpoints[-2:]:
        (folder / "state.json").unlink()
    again = project.train("gradients_every=1", resume=True)
    assert [line["step"] for line in lines(again)] == [1, 2, 3, 4, 5, 6]
    assert lines(again) == before


def test_sharded_parameters_are_refused(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coatkit import trainer

    class Sharding(trainer.Team):
        def __init__(self) -> None:
            super().__init__()
            self.shards = True

    monkeypatch.setattr(trainer, "Team", Sharding)
    with pytest.raises(RunError, match="gradients_every: losses cannot be told apart where parameters are sharded"):
        project.train("gradients_every=1")
