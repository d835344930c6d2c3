"""The plan: what it counts is what training does, on real classes in tiny sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coatkit.build import build
from coatkit.cli import cli
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch
from coatkit.plan import RowShape, make_plan


@pytest.fixture
def project(project: Any) -> Any:
    """Rows of one sound each, all of one length, so that nothing is padded."""
    project.rows.clear()
    for i in range(4):
        project.add_clip(f"even{i}", torch.randn(8 * 16_000, generator=torch.Generator().manual_seed(i)).numpy() / 10)
    for stage in project.spec["stages"]:
        stage["batch"] = {"rows": 4}
    project.spec["stages"][1]["weights"] = {"audio": 1.0, "level": 1.0}
    return project


@pytest.mark.parametrize("change", [{}, {"train": {"lm": "full"}}, {"train": {"projector": "none"}}])
def test_operations_and_parameters_are_those_of_a_real_step(project: Any, change: dict[str, Any]) -> None:
    project.spec["backbone"].update(change)
    loaded = project.load()
    model = build(loaded, "cpu").train()
    rows = JsonlRows(project.folder / "train.jsonl")[:]
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True)
    assert batch.inputs.labels is not None
    width = batch.inputs.tokens["input_ids"].shape[1]
    answer = int((batch.inputs.labels != -100).sum()) / 4
    text = width - 2 * 200 - 2
    plan = make_plan(loaded, row=RowShape((8.0,), text, answer))

    assert plan.trainable == {part: sum(p.numel() for p in ps) for part, ps in model.parts().items()}
    frozen = sum(p.numel() for p in model.backbone.model.parameters() if not p.requires_grad)
    assert plan.frozen == frozen

    def counted(active: list[str]) -> int:
        # torch's counter knows attention as it is planned; the fused kernel's backward computes the scores once more.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            losses = model(batch, active)
            sum(losses.sums.values(), torch.zeros(())).backward()
        return int(counter.get_total_flops())

    one, two = plan.stages
    assert one.tokens_per_step == pytest.approx(4 * width)
    assert one.flops_per_step == pytest.approx(counted(["audio"]), rel=0.02)
    assert two.flops_per_step == pytest.approx(counted(["audio", "level"]), rel=0.02)


def test_rows_are_those_of_the_data(project: Any) -> None:
    plan = make_plan(project.load())
    assert plan.rows == 4
    assert plan.hours == pytest.approx(4 * 8 / 3600)
    assert 402 < plan.tokens_per_row < 480
    assert plan.store == {"level": pytest.approx(4 * 8 * 50 * 2 * 2)}
    assert plan.uncounted == ["level"]


def test_half_the_thinking_costs_less(project: Any) -> None:
    whole = make_plan(project.load())
    half = make_plan(project.load("thinking.tokens_per_audio_token=0.5"))
    assert whole.tokens_per_row - half.tokens_per_row == pytest.approx(100)
    assert half.stages[0].work["language model"].total < whole.stages[0].work["language model"].total


def test_sharding_and_checkpointing_save_memory(project: Any) -> None:
    repeated = make_plan(project.load(), devices=4).memory
    sharded = make_plan(project.load(), devices=4, shard=True).memory
    assert sharded["optimizer"] == pytest.approx(repeated["optimizer"] / 4)
    assert sharded["weights"] >= repeated["weights"] / 4  # and what is in no unit stays whole
    assert sharded["activations"] == repeated["activations"]
    recomputed = make_plan(project.load("backbone.gradient_checkpointing=true"), devices=4).memory
    assert recomputed["activations"] < repeated["activations"]


def test_bfloat16_halves_the_frozen_weights(project: Any) -> None:
    full, half = (make_plan(project.load(f"backbone.dtype={d}")).memory["weights"] for d in ("float32", "bfloat16"))
    plan = make_plan(project.load())
    assert full - half == pytest.approx(2 * plan.frozen)


def test_time_is_operations_over_what_the_gpus_do(project: Any) -> None:
    plan = make_plan(project.load())
    total = sum(stage.flops_per_step * stage.steps for stage in plan.stages)
    assert plan.seconds(1e12, 2, 0.5) == pytest.approx(total / 1e12)


def test_the_command_prints_it(project: Any) -> None:
    spec = str(project.write())
    result = CliRunner().invoke(cli, ["plan", spec, "--gpu", "a100", "--devices", "2"])
    assert result.exit_code == 0, result.output
    for text in ("learns ", "stage one: 3 steps of 4 rows", "language model:", "not counted", "2 x a100 at 40%"):
        assert text in result.output
    data = json.loads(CliRunner().invoke(cli, ["plan", spec, "--json"]).output)
    assert data["stages"][1]["name"] == "two"
    assert data["gpu"] == "h100"


def test_rows_may_be_given_where_there_is_no_data(project: Any) -> None:
    spec = project.write()
    (project.folder / "train.jsonl").unlink()
    result = CliRunner().invoke(cli, ["plan", str(spec), "--seconds", "8"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(cli, ["plan", str(spec)]).exit_code != 0


def test_an_unknown_gpu_is_told_what_is_known(project: Any) -> None:
    result = CliRunner().invoke(cli, ["plan", str(project.write()), "--gpu", "abacus"])
    assert "known:\n" in str(result.exception)
    assert "h100: 989 TFLOP/s" in CliRunner().invoke(cli, ["plan", str(project.write()), "--gpu", "list"]).output
