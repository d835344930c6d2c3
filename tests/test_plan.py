"""The plan: its rows, batches, memory and times, and what is printed; test_plan_backbones.py has the counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from coatkit.build import build
from coatkit.cli import cli
from coatkit.data.batches import BatchPlan
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch
from coatkit.errors import DataError, PluginError
from coatkit.plan import GPUS, Gpu, Plan, RowShape, make_plan

UNSIZED = """
from coatkit import Expert


class Late(Expert):
    frame_rate = 50.0

    def load(self, device, dtype):
        self.dim = 4

    def encode(self, audio):
        raise NotImplementedError
"""

HEADS = """
from torch import nn

from coatkit import Head


class Looks(Head):
    def __init__(self, hidden_size, dim):
        super().__init__()
        self.out = nn.Linear(hidden_size, dim)

    def forward(self, hidden, mask):
        return self.out(hidden) * float(mask.sum())


class LooksWhenMade(Head):
    def __init__(self, hidden_size, dim):
        super().__init__()
        self.out = nn.Linear(hidden_size, dim)
        self.scale = float(self.out.weight.std())

    def forward(self, hidden, mask):
        return self.out(hidden) * self.scale


class Broken(Head):
    def __init__(self, hidden_size, dim):
        raise RuntimeError("no such thing")

    def forward(self, hidden, mask):
        raise NotImplementedError
"""


@pytest.fixture
def project(project: Any) -> Any:
    """Four rows of one sound each, all of 8 s, so that nothing is padded."""
    project.rows.clear()
    for i in range(4):
        project.add_clip(f"even{i}", torch.randn(8 * 16_000, generator=torch.Generator().manual_seed(i)).numpy() / 10)
    for stage in project.spec["stages"]:
        stage["batch"] = {"rows": 4}
    project.spec["stages"][1]["weights"] = {"audio": 1.0, "level": 1.0}
    return project


def uneven(project: Any, count: int = 24) -> None:
    """Rows whose sounds are up to 3 s long."""
    project.rows.clear()
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        seconds = 0.25 + 2.75 * float(torch.rand((), generator=generator))
        project.add_clip(f"un{i}", torch.randn(round(seconds * 16_000), generator=generator).numpy() / 10)


def only(project: Any, stage: int, count: int) -> None:
    """Give a stage a file of its own, with rows of text alone."""
    talk = [{"role": "user", "content": "How many? " * 40}, {"role": "assistant", "content": "Many. " * 40}]
    lines = [json.dumps({"id": f"only{i}", "messages": talk}) + "\n" for i in range(count)]
    (project.folder / f"stage{stage}.jsonl").write_text("".join(lines))
    project.spec["stages"][stage]["train"] = f"stage{stage}.jsonl"


# Rows, stage by stage


def test_rows_are_those_of_the_data(project: Any) -> None:
    plan = make_plan(project.load())
    assert plan.rows == 4  # both stages draw from the same
    assert plan.hours == pytest.approx(4 * 8 / 3600)
    for stage in plan.stages:
        assert stage.rows == 4
        assert stage.hours == plan.hours
        assert 402 < stage.tokens_per_row == stage.longest_row < 480
        assert stage.passes == 3  # 3 steps of 4 rows
    assert plan.store == {"level": pytest.approx(4 * 8 * 25 * 2 * 2)}
    assert plan.notes == [
        "expert level: its operations are not counted, for nothing declares them",
        "experts level: memory of their weights is not counted, for its size is not known",
    ]


@pytest.mark.parametrize("stage", [0, 1])
def test_each_stage_is_planned_over_its_own_rows(project: Any, stage: int) -> None:
    only(project, stage, 10)
    plan = make_plan(project.load())
    own, other = plan.stages[stage], plan.stages[1 - stage]
    assert (own.rows, other.rows, plan.rows) == (10, 4, 14)
    assert (own.hours, other.hours) == (0, pytest.approx(32 / 3600))
    assert plan.hours == other.hours
    assert own.passes == pytest.approx(3 * 4 / 10)
    assert other.passes == 3
    assert own.tokens_per_row == pytest.approx((40 * 10 + 40 * 6) / 4 + 24)
    assert other.longest_row < 480
    # `level` teaches in the second stage, and needs the features of that one's sounds.
    assert plan.store["level"] == (0 if stage == 1 else pytest.approx(4 * 8 * 25 * 2 * 2))


def test_a_sound_that_comes_twice_is_stored_once(project: Any) -> None:
    for row in list(project.rows):
        project.add_row(**{**row, "id": f"{row['id']}-again"})
    part = {**project.rows[0], "id": "part", "start": 1.0, "end": 3.0}
    project.add_row(**part)
    plan = make_plan(project.load())
    assert plan.rows == 9
    assert plan.hours == pytest.approx((8 * 8 + 2) / 3600)
    assert plan.store["level"] == pytest.approx((4 * 8 + 2) * 25 * 2 * 2)
    eight = make_plan(project.load("cache.dtype=int8"))
    assert eight.store["level"] == pytest.approx((4 * 8 + 2) * 25 * (2 + 4))


def test_rows_that_training_would_not_take_are_passed_over(project: Any) -> None:
    project.add_clip("long", torch.randn(20 * 16_000).numpy() / 10)
    (project.folder / "clips/even0.wav").write_bytes(b"no sound")
    plan = make_plan(project.load("data.max_seconds=10"))
    assert (plan.rows, plan.stages[0].longest_row) == (3, plan.stages[0].tokens_per_row)
    del project.rows[0]
    with pytest.raises(DataError, match=r"no row can be used.*first: .*even1.*data.max_seconds \(1 s\)"):
        make_plan(project.load("data.max_seconds=1"))


def test_a_stages_filter_is_kept_to(project: Any) -> None:
    project.add_clip("short", torch.randn(2 * 16_000).numpy() / 10)
    path = "train.jsonl"
    project.spec["stages"][0]["train"] = {"path": path, "filter": {"max_seconds": 4}}
    one, two = make_plan(project.load()).stages
    assert (one.rows, two.rows) == (1, 5)
    assert one.longest_row < 200 < two.longest_row
    project.spec["stages"][0]["train"] = {"path": path, "filter": {"max_seconds": 1}}
    with pytest.raises(DataError, match=r"no row can be used.*train\.jsonl:1: the filter does not take it"):
        make_plan(project.load())


def test_a_mixture_is_planned_as_it_is_drawn(project: Any) -> None:
    only(project, 1, 10)
    del project.spec["stages"][1]["train"]
    shares = {"heard": ("train.jsonl", 1), "text": ("stage1.jsonl", 3)}
    categories = {name: {"share": share, "sources": [path]} for name, (path, share) in shares.items()}
    project.spec["data"] = {"mixture": {"rows": 40, "categories": categories}}
    plan = make_plan(project.load())
    assert [stage.rows for stage in plan.stages] == [40, 40]
    assert plan.rows == 40
    assert plan.hours == pytest.approx(10 * 8 / 3600)
    assert plan.store["level"] == pytest.approx(4 * 8 * 25 * 2 * 2)  # ten rows of four sounds


def test_a_step_has_no_more_rows_than_there_are(project: Any) -> None:
    plan = make_plan(project.load("stages.0.batch.rows=100"))
    assert plan.stages[0].rows_per_step == 4
    assert plan.stages[0].passes == 3


@pytest.mark.parametrize("batch", [{"rows": 4}, {"tokens": 600}, {"rows": 8, "accumulate": 2}])
def test_steps_are_cut_and_padded_as_in_training(project: Any, batch: dict[str, int]) -> None:
    uneven(project)
    for stage in project.spec["stages"]:
        stage["batch"] = batch
    loaded = project.load()
    plan = make_plan(loaded, devices=2)
    rows = JsonlRows(project.folder / "train.jsonl")[:]
    seconds = [Path(str(row.audios[0].path)).stat().st_size / 2 / 16_000 for row in rows]
    costs = torch.tensor([round(50 * s) + 2 + 8 + 24 for s in seconds]).numpy()
    for index, stage in enumerate(plan.stages):
        real = BatchPlan(costs, loaded.spec.stages[index].batch, (11, index))
        steps = 0
        while real.epoch_of(steps) < 1:
            steps += 1
        taken = [real.rows(step) for step in range(steps)]
        assert stage.rows_per_step == pytest.approx(sum(map(len, taken)) / steps, rel=0.1)
        padded = 0.0
        for step in taken:
            for rank in range(2):
                share = step[rank::2]
                cut = batch.get("accumulate", 1)
                parts = [share[i * len(share) // cut : (i + 1) * len(share) // cut] for i in range(cut)]
                padded += sum(len(part) * costs[part].max() for part in parts if len(part))
        assert stage.padded_tokens_per_step == pytest.approx(padded / steps, rel=0.05)
        assert stage.padded_tokens_per_step > stage.tokens_per_step


def test_half_the_thinking_costs_less(project: Any) -> None:
    whole, half = (make_plan(project.load(f"thinking.tokens_per_audio_token={r}")).stages[0] for r in (1, 0.5))
    assert whole.tokens_per_row - half.tokens_per_row == pytest.approx(100)
    assert half.work["language model"].total < whole.work["language model"].total


# Memory


def memory(plan: Plan, way: str = "ddp") -> Any:
    return plan.memory(way)[1]


def test_a_budget_of_tokens_is_what_memory_holds(project: Any) -> None:
    """Kept activations grow with the budget, not with one row's tokens."""

    def kept(**batch: int) -> float:
        for stage in project.spec["stages"]:
            stage["batch"] = batch
        return float(memory(make_plan(project.load())).activations)

    row = make_plan(project.load()).stages[0].longest_row
    one, two, four = kept(rows=1), kept(rows=2), kept(rows=4)
    assert 3.8 * one < four <= 4 * one
    assert kept(tokens=int(4.5 * row)) == four
    assert kept(tokens=10) == one  # a row longer than the budget is a step of its own
    assert kept(tokens=int(4.5 * row), accumulate=2) == two


def test_the_longest_rows_may_come_together(project: Any) -> None:
    """Rows of unlike length, 4 at once: what counts is four of the longest."""
    uneven(project)
    plan = make_plan(project.load())
    project.rows[:] = [row for row in project.rows if row["id"] == longest(project)] * 4
    assert memory(plan).activations == pytest.approx(memory(make_plan(project.load())).activations)


def longest(project: Any) -> str:
    return max(project.rows, key=lambda row: (project.folder / row["audio"]).stat().st_size)["id"]


@pytest.mark.parametrize("heavy", [0, 1])
def test_the_stage_that_needs_most_is_the_one_that_counts(project: Any, heavy: int) -> None:
    project.spec["stages"][1 - heavy]["batch"] = {"rows": 1}
    project.spec["stages"][0]["weights"] = {"audio": 1.0, "level": 1.0}
    plan = make_plan(project.load())
    stage, found = plan.memory("ddp")
    assert stage.name == ("one", "two")[heavy]
    assert found.total > plan.stages[1 - heavy].memory["ddp"].total


def test_inactive_heads_have_no_moments(project: Any) -> None:
    one, two = make_plan(project.load()).stages
    parts = make_plan(project.load()).trainable
    level = parts["heads.level"]
    backbone = sum(number for part, number in parts.items() if not part.startswith("heads."))
    assert one.memory["ddp"].optimizer == 8 * (backbone + parts["heads.audio"])
    assert two.memory["ddp"].optimizer - one.memory["ddp"].optimizer == 8 * level
    assert two.memory["ddp"].gradients - one.memory["ddp"].gradients == 4 * level
    assert two.memory["ddp"].weights == one.memory["ddp"].weights


@pytest.mark.parametrize("lm", ["lora", "full", "none"])
@pytest.mark.parametrize("projector", ["lora", "full", "none"])
@pytest.mark.parametrize("tower", ["lora", "full", "none"])
def test_memory_follows_what_learns(project: Any, lm: str, projector: str, tower: str) -> None:
    train = {"lm": lm, "projector": projector, "tower": tower}
    project.spec["backbone"]["train"] = train
    plan = make_plan(project.load())
    found = memory(plan)
    learnt = {"lora" if (part, how) == ("lm", "lora") else part for part, how in train.items() if how != "none"}
    assert set(plan.trainable) == {"tokens", "heads.audio", "heads.level", *learnt}
    assert found.optimizer == 2 * found.gradients == 8 * sum(plan.trainable.values())
    work = plan.stages[0].work
    assert bool(work["audio tower"].backward) == ((tower, projector) != ("none", "none"))
    # The output matrix learns with the whole language model.
    assert work["output logits"].backward == work["output logits"].forward * (2 if lm == "full" else 1)


def test_a_tower_that_learns_keeps_its_activations(project: Any) -> None:
    kept = [memory(make_plan(project.load(f"backbone.train.tower={how}"))).activations for how in ("none", "lora")]
    assert kept[0] < kept[1]


def test_sharding_and_checkpointing_save_memory(project: Any) -> None:
    plan = make_plan(project.load(), devices=4)
    repeated, sharded = memory(plan, "ddp"), memory(plan, "fsdp")
    assert sharded.optimizer == pytest.approx(repeated.optimizer / 4)
    assert sharded.weights >= repeated.weights / 4  # and what is in no unit stays whole
    assert sharded.gradients < repeated.gradients
    assert sharded.activations == repeated.activations
    alone = make_plan(project.load())
    assert set(alone.stages[0].memory) == {"ddp"}
    assert memory(alone).gradients == repeated.gradients / 2  # nothing to exchange
    assert memory(alone).activations == pytest.approx(4 * repeated.activations, rel=0.05)
    recomputed = make_plan(project.load("backbone.gradient_checkpointing=true"))
    assert memory(recomputed).activations < memory(alone).activations


def test_bfloat16_halves_the_frozen_weights(project: Any) -> None:
    full, half = (memory(make_plan(project.load(f"backbone.dtype={d}"))).weights for d in ("float32", "bfloat16"))
    plan = make_plan(project.load())
    assert full - half == pytest.approx(2 * sum(plan.frozen.values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lm", ["lora", "full"])
def test_activations_are_those_a_real_step_keeps(project: Any, dtype: str, lm: str) -> None:
    """What autograd holds between forward and backward, each storage once, without the weights themselves."""
    project.spec["backbone"].update(dtype=dtype, train={"lm": lm})
    loaded = project.load()
    model = build(loaded, "cpu").train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = JsonlRows(project.folder / "train.jsonl")[:]
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(batch, ["audio", "level"])
    plan = make_plan(loaded)
    found = memory(plan)
    assert losses.sums["ce"].requires_grad
    assert sum(held.values()) == pytest.approx(found.activations + found.logits / 3, rel=0.15)


def test_quantised_layers_are_as_small_as_they_are(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatkit.backbones.options.find_spec", lambda name: name)  # as if it were installed
    whole = memory(make_plan(project.load())).weights
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # of two layers
    for mode, each in (("nf4", 0.5 + 1 / 64), ("int8", 1.0)):
        quantised = memory(make_plan(project.load(f"backbone.quantize={mode}"))).weights
        assert whole - quantised == pytest.approx(linear * (4 - each))


# Time


def test_time_is_operations_over_what_the_gpus_do(project: Any) -> None:
    gpu = GPUS["a100"]
    plan = make_plan(project.load(), devices=2)
    total = sum(stage.flops_per_step * stage.steps for stage in plan.stages)
    assert plan.seconds(gpu, 0.5) == pytest.approx(total / gpu.single)  # the tiny backbone computes in float32
    project.spec["experts"]["spidr"] = {"weights": "random"}
    project.spec["stages"][1]["weights"]["spidr"] = 1.0
    half = make_plan(project.load("backbone.dtype=bfloat16"), devices=2)
    total = sum(stage.flops_per_step * stage.steps for stage in half.stages)
    exact = sum(s.steps * w.total for s in half.stages for n, w in s.work.items() if n.startswith("expert"))
    assert 0 < exact < total
    assert half.seconds(gpu, 0.5) == pytest.approx(exact / gpu.single + (total - exact) / gpu.half)


# What cannot be counted is said


def test_an_expert_whose_width_is_known_only_when_loaded(project: Any) -> None:
    (project.folder / "late.py").write_text(UNSIZED)
    project.spec["experts"]["late"] = {"use": "./late.py:Late"}
    project.spec["stages"][1]["weights"]["late"] = 1.0
    plan = make_plan(project.load())
    said = [note for note in plan.notes if note.startswith("expert late: neither it, nor its head")]
    assert len(said) == 1
    assert "its width is known only after loading" in said[0]
    assert "heads.late" not in plan.trainable
    assert "heads.level" in plan.trainable
    assert set(plan.stages[1].work) >= {"head audio", "head level"}
    result = CliRunner().invoke(cli, ["plan", str(project.write())])
    assert result.exit_code == 0, result.output
    assert said[0] in result.output


def test_a_head_that_looks_at_values_is_named_and_the_rest_is_planned(project: Any) -> None:
    (project.folder / "heads.py").write_text(HEADS)
    project.spec["experts"]["level"]["head"] = {"use": "./heads.py:Looks"}
    plan = make_plan(project.load())
    said = [note for note in plan.notes if note.startswith("head level (./heads.py:Looks): its operations")]
    assert len(said) == 1, plan.notes
    assert "meta" in said[0]
    assert plan.trainable["heads.level"] == 64 * 2 + 2
    assert "head audio" in plan.stages[1].work
    assert "head level" not in plan.stages[1].work


def test_a_head_may_look_at_values_while_it_is_made(project: Any) -> None:
    (project.folder / "heads.py").write_text(HEADS)
    project.spec["experts"]["level"]["head"] = {"use": "./heads.py:LooksWhenMade"}
    plan = make_plan(project.load())
    positions = 4 * 8 * 25
    # In the second stage; its input was made by what learns, so it has both ways back.
    assert plan.stages[1].work["head level"].forward == pytest.approx(2 * 64 * 2 * positions)
    assert plan.stages[1].work["head level"].backward == pytest.approx(4 * 64 * 2 * positions)


def test_a_head_that_cannot_be_made_is_an_error(project: Any) -> None:
    (project.folder / "heads.py").write_text(HEADS)
    project.spec["experts"]["level"]["head"] = {"use": "./heads.py:Broken"}
    with pytest.raises(PluginError, match=r"\./heads\.py:Broken: cannot be made .*no such thing"):
        make_plan(project.load())


# The command


def test_the_command_prints_it(project: Any) -> None:
    spec = str(project.write())
    result = CliRunner().invoke(cli, ["plan", spec, "--gpu", "a100", "--gpu", "h200", "--devices", "2"])
    assert result.exit_code == 0, result.output
    for text in (
        "backbone: mini (coatkit-backbone-mini ",
        "head of audio, level: transformer (coatkit ",
        "  heads.level ",
        "stage one: 3 steps of 4 rows; experts: audio 1\n",
        "stage two: 3 steps of 4 rows; experts: audio 1, level 1\n",
        "    language model ",
        "memory of each of 2 devices with ddp: about ",
        "memory of each of 2 devices with fsdp: about ",
        "  2 x a100: ",
        "  2 x h200: ",
        "not in these numbers: expert level: its operations",
    ):
        assert text in result.output, text
    one = CliRunner().invoke(cli, ["plan", spec, "--devices", "2", "--parallel", "fsdp"]).output
    assert "with fsdp" in one
    assert "with ddp" not in one
    data = json.loads(CliRunner().invoke(cli, ["plan", spec, "--json"]).output)
    assert data["stages"][1]["name"] == "two"
    assert data["stages"][1]["flops_per_step"] > 0
    assert data["stages"][1]["memory"]["ddp"]["total"] > 0
    assert set(data["days"]) == {"h100"}


def test_too_much_memory_is_said_with_what_would_help(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "tiny", Gpu(1e12, 1e12, 2e6))
    words = ["plan", str(project.write()), "--gpu", "tiny"]
    said = CliRunner().invoke(cli, words).output
    assert "MORE than the 2.0 MB of a tiny: try more devices" in said
    assert "gradient_checkpointing" in said
    again = CliRunner().invoke(cli, [*words, "--set", "backbone.gradient_checkpointing=true"]).output
    assert "MORE than" in again
    assert "gradient_checkpointing" not in again


def test_rows_may_be_given_where_there_is_no_data(project: Any) -> None:
    spec = project.write()
    (project.folder / "train.jsonl").unlink()
    result = CliRunner().invoke(cli, ["plan", str(spec), "--seconds", "8"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(cli, ["plan", str(spec)]).exit_code != 0


def test_described_rows_are_passed_over_once_in_each_stage(project: Any) -> None:
    project.spec["stages"][0]["batch"] = {"tokens": 1000}
    plan = make_plan(project.load(), row=RowShape((8.0,), 60, 30))
    assert [stage.rows_per_step for stage in plan.stages] == [2, 4]  # 462 tokens each
    assert [stage.passes for stage in plan.stages] == [1, 1]
    assert plan.rows == 3 * 4  # of one source the larger
    assert plan.store["level"] == pytest.approx(3 * 4 * 8 * 25 * 2 * 2)


def test_an_unknown_gpu_is_told_what_is_known(project: Any) -> None:
    result = CliRunner().invoke(cli, ["plan", str(project.write()), "--gpu", "abacus"])
    assert "known:\n" in str(result.exception)
    said = CliRunner().invoke(cli, ["plan", str(project.write()), "--gpu", "list"]).output
    assert "h100: 989 TFLOP/s in bfloat16, 67 in float32, 80.0 GB" in said


def test_the_page_shows_what_the_command_prints() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs/scaling.md").read_text()
    found = re.search(r"```sh\ncoatkit (plan [^\n]*)\n```\n\nprints[^\n]*\n\n```\n(.*?)```", page, re.DOTALL)
    assert found is not None
    words = [str(root / word) if word.endswith(".yaml") else word for word in found[1].split()]
    assert CliRunner().invoke(cli, words).output == found[2]
