"""Schedules of three stages: answers alone, then some experts, then all; what rests, what starts late, and resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coatkit import trainer
from coatkit.build import build
from coatkit.errors import RunError, SpecError

STEPS = (3, 2, 4)
ENDS = (3, 5, 9)
"""Optimizer steps done at the end of each stage."""
FILES = ("model.safetensors", "optimizer.safetensors")

SLOW = """
import torch
from coatkit import Expert, Features

class Slow(Expert):
    \"\"\"Mean of each 0.32 s, as one feature.\"\"\"
    sample_rate, frame_rate, dim = 16_000, 3.125, 1

    def encode(self, audio):
        frames = -(-audio.lengths // 5120)
        samples = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * 5120 - audio.samples.shape[1]))
        return Features(samples.unflatten(1, (-1, 5120)).abs().mean(-1, keepdim=True), frames, self.frame_rate)
"""


def prepare(project: Any, between: str = "reset") -> Any:
    """Warm-up without any expert, then `level`, then all three, `slow` for the first time and `audio` too.

    Each stage has its own rates, schedule and batch; the second its own rows.
    """
    (project.folder / "slow.py").write_text(SLOW)
    (project.folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in project.rows[:6]))
    project.spec["experts"]["slow"] = {"use": "./slow.py:Slow", "head": {"use": "linear"}}
    project.spec["backbone"]["lora"]["dropout"] = 0.1
    project.spec["head"]["dropout"] = 0.1
    project.spec["optimizer"] = {"between_stages": between, "weight_decay": 0.01}
    project.spec["checkpoint"] = {"every": 1, "keep": 100}
    project.spec["stages"] = [
        {
            "name": "warm-up",
            "steps": STEPS[0],
            "lr": {"default": 1e-3, "projector": 4e-3},
            "warmup_steps": 2,
            "batch": {"rows": 4},
        },
        {
            "name": "level",
            "steps": STEPS[1],
            "lr": {"default": 2e-3, "tokens": 6e-3},
            "batch": {"rows": 3},
            "weights": {"level": 2.0},
            "train": "clips.jsonl",
        },
        {
            "name": "all",
            "steps": STEPS[2],
            "lr": {"default": 5e-4, "heads": 1e-3, "heads.slow": 3e-3},
            "schedule": "linear",
            "batch": {"rows": 5},
            "weights": {"audio": 1.0, "level": 0.5, "slow": 0.25},
            "ce_weight": 0.5,
        },
    ]
    return project


@pytest.fixture(scope="module", params=["reset", "keep"])
def whole(request: pytest.FixtureRequest, new_project: Callable[[], Any]) -> Any:
    """A run in one go, with a checkpoint after every step; `.start` is what learns before the first."""
    project = prepare(new_project(), request.param)
    project.run = project.train("output=whole")
    model = build(project.load(), "cpu")
    project.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return project


def at(project: Any, step: int, file: str = FILES[0]) -> dict[str, torch.Tensor]:
    if step == 0:
        return dict(project.start)
    return load_file(project.run.folder / f"checkpoints/step-{step:08d}" / file)


def of(name: str) -> str:
    """The part a parameter belongs to, as `lr` names it; a head by its expert."""
    if name.startswith("heads."):
        return name.split(".")[1]
    return "tokens" if "thinking_rows" in name else "projector" if "projector" in name else "lora"


def test_each_stage_logs_its_own_terms_rates_and_rows(whole: Any) -> None:
    lines = whole.run.metrics
    assert [(m["stage"], m["stage_step"]) for m in lines] == [
        (name, i) for name, n in zip(("warm-up", "level", "all"), STEPS, strict=True) for i in range(1, n + 1)
    ]
    assert [m["rows"] for m in lines] == [4] * 3 + [3] * 2 + [5] * 4
    assert [m["lr"] for m in lines] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 1e-3, 2e-3, 2e-3, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4]
    )
    weights = [{"ce": 1.0}, {"ce": 1.0, "level.mse": 2.0}]
    weights.append({"ce": 0.5, "audio.mse": 1.0, "level.mse": 0.5, "slow.mse": 0.25})
    for line in lines:
        own = weights[("warm-up", "level", "all").index(line["stage"])]
        assert {name for name in line if "." in name or name == "ce"} == set(own)
        assert line["loss"] == pytest.approx(sum(w * line[name] for name, w in own.items()), rel=1e-6)
    # The second stage has six rows of its own, the others 20.
    assert [round(lines[end - 1]["epoch"], 3) for end in ENDS] == [0.6, 1.0, 1.0]


def test_a_head_moves_in_its_own_stages_alone(whole: Any) -> None:
    """Neither weight decay nor moments that were kept reach one that rests."""
    learns = [{"lora", "tokens", "projector"}, {"level"}, {"audio", "level", "slow"}]
    for stage, (begin, end) in enumerate(zip((0, *ENDS), ENDS, strict=False)):
        before, after = at(whole, begin), at(whole, end)
        assert set(before) == set(after)
        moved = {of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == learns[0] | learns[stage]


def test_steps_of_the_moments_are_those_since_each_began(whole: Any) -> None:
    kept = whole.spec["optimizer"]["between_stages"] == "keep"
    state = at(whole, ENDS[2] - 1, FILES[1])  # at the very end of a stage that resets there are none
    steps: dict[str, set[int]] = {}
    for name, value in state.items():
        if name.endswith("|step"):
            steps.setdefault(of(name), set()).add(int(value))
    shared = 8 if kept else 3
    assert steps == {
        "lora": {shared},
        "tokens": {shared},
        "projector": {shared},
        "level": {5 if kept else 3},
        "audio": {3},
        "slow": {3},
    }


def test_each_stages_rates_move_each_part(project: Any) -> None:
    """Adam's first step moves what has a gradient by its rate; each stage is one step with moments of its own."""
    prepare(project)
    project.spec["optimizer"]["weight_decay"] = 0.0
    for stage in project.spec["stages"]:
        stage.update(steps=1, warmup_steps=0)
    project.run = project.train()
    project.start = {
        n: p.detach().clone() for n, p in build(project.load(), "cpu").named_parameters() if p.requires_grad
    }
    rates = [
        {"lora": 1e-3, "tokens": 1e-3, "projector": 4e-3},
        {"lora": 2e-3, "tokens": 6e-3, "projector": 2e-3, "level": 2e-3},
        {"lora": 5e-4, "tokens": 5e-4, "projector": 5e-4, "level": 1e-3, "audio": 1e-3, "slow": 3e-3},
    ]
    for step, wanted in enumerate(rates):
        before, after = at(project, step), at(project, step + 1)
        moved: dict[str, float] = {}
        for name in before:
            part = of(name)
            moved[part] = max(moved.get(part, 0.0), float((after[name] - before[name]).abs().max()))
        assert {part: by for part, by in moved.items() if by} == {
            part: pytest.approx(rate, rel=2e-3) for part, rate in wanted.items()
        }


@pytest.mark.parametrize("step", [2, 3, 4, 5, 6, 8])
def test_resuming_on_either_side_of_every_change_equals_in_one_go(whole: Any, step: int) -> None:
    """Inside and at the end of the first two stages; after the first and before the last step of the third."""
    folder: Path = whole.folder / f"cut-{step}"
    shutil.copytree(whole.run.folder, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]))
    torch.manual_seed(step)  # another process would have another random state
    run = whole.train(f"output={folder}", resume=True)
    assert run.result.finished
    for other in range(step, ENDS[2] + 1):
        for file in FILES:
            path = f"checkpoints/step-{other:08d}/{file}"
            ours, theirs = load_file(folder / path), load_file(whole.run.folder / path)
            assert set(ours) == set(theirs)
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    drop = {"seconds"}
    assert [{k: v for k, v in m.items() if k not in drop} for m in run.metrics] == [
        {k: v for k, v in m.items() if k not in drop} for m in whole.run.metrics
    ]


def test_a_later_stage_is_looked_at_before_the_first_step(project: Any) -> None:
    prepare(project)
    with pytest.raises(SpecError, match=r"stages\.2\.lr\.adapters: no part of this name"):
        project.train("stages.2.lr={default: 1.0e-3, adapters: 1.0e-3}")
    with pytest.raises(SpecError, match="'warm-up' is taken by an earlier stage"):
        project.train("stages.2.name=warm-up")
    with pytest.raises(SpecError, match=r"stages.*weights.*slower"):
        project.train("stages.2.weights={slower: 1.0}")
    assert not (project.folder / "run").exists()


def test_another_third_stage_is_not_gone_on_with(project: Any) -> None:
    prepare(project)
    run = project.train()
    for path in run.checkpoints[4:]:
        shutil.rmtree(path)
    with pytest.raises(RunError, match=r"changed since: .*stages\.2\.weights\.slow"):
        project.train("stages.2.weights.slow=0.5", resume=True)


def test_an_expert_that_no_stage_has_yet_is_calibrated_in_its_first(project: Any) -> None:
    prepare(project)
    project.spec["calibrate"] = {"rows": 4}
    run = project.train()
    losses = yaml.safe_load((run.folder / "spec.yaml").read_text())["calibrate"]["losses"]
    assert set(losses) == {"level", "audio", "slow"}
    last = run.metrics[-1]
    weights = {"ce": 0.5, "audio.mse": 1.0, "level.mse": 0.5, "slow.mse": 0.25}
    scaled = sum(w * last[name] / losses.get(name.partition(".")[0], 1.0) for name, w in weights.items())
    assert last["loss"] == pytest.approx(scaled, rel=1e-6)


# Parts that rest


def resting(project: Any, between: str = "reset") -> Any:
    """Projector and heads alone; all but the projector; a head alone; everything."""
    prepare(project, between)
    first, second, _ = project.spec["stages"]
    project.spec["stages"] = [
        {**first, "name": "align", "weights": {"level": 1.0}, "lr": {"default": 0, "projector": 1e-3, "heads": 1e-3}},
        {**second, "name": "adapt", "lr": {"default": 1e-3, "projector": 0}},
        {**first, "name": "heads", "weights": {"level": 1.0}, "lr": {"default": 0, "heads.level": 1e-3}},
        {**second, "name": "everything", "lr": 1e-3},
    ]
    return project


@pytest.mark.parametrize("between", ["reset", "keep"])
def test_a_part_at_a_rate_of_0_rests(project: Any, between: str) -> None:
    resting(project, between)
    project.run = project.train("gradients_every=1")
    project.start = {
        n: p.detach().clone() for n, p in build(project.load(), "cpu").named_parameters() if p.requires_grad
    }
    ends = (3, 5, 8, 10)
    learns = [{"projector", "level"}, {"lora", "tokens", "level"}, {"level"}, {"lora", "tokens", "projector", "level"}]
    for begin, end, wanted in zip((0, *ends), ends, learns, strict=False):
        before, after = at(project, begin), at(project, end)
        assert set(before) == set(after) == set(project.start)
        assert {of(name) for name in before if not torch.equal(before[name], after[name])} == wanted
    assert {m["lr"] for m in project.run.metrics if m["stage"] == "align"} == {0.0}
    steps: dict[str, set[int]] = {}
    for name, value in at(project, 9, FILES[1]).items():
        if name.endswith("|step"):
            steps.setdefault(of(name), set()).add(int(value))
    kept = between == "keep"
    assert steps == {"lora": {3 if kept else 1}, "tokens": {3 if kept else 1}, "projector": {4 if kept else 1},
                     "level": {9 if kept else 1}}  # fmt: skip
    seen = [json.loads(line) for line in (project.run.folder / "gradients.jsonl").read_text().splitlines()]
    assert [set(line["norms"]) for line in seen] == [{"ce", "level"}] * 5 + [set()] * 3 + [{"ce", "level"}] * 2


@pytest.mark.parametrize("between", ["reset", "keep"])
def test_a_run_with_parts_at_rest_resumes_to_the_bit(project: Any, between: str) -> None:
    resting(project, between)
    project.run = project.train("output=whole")
    for step in (3, 4, 6, 8):
        folder = project.folder / f"cut-{step}"
        shutil.copytree(project.run.folder, folder)
        for path in (folder / "checkpoints").iterdir():
            if int(path.name.partition("-")[2]) > step:
                shutil.rmtree(path)
        assert project.train(f"output={folder}", resume=True).result.finished
        for file in FILES:
            last = "checkpoints/step-00000010/" + file
            ours, theirs = load_file(folder / last), load_file(project.run.folder / last)
            assert set(ours) == set(theirs)
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_nothing_that_learns_is_refused(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(project)
    with pytest.raises(SpecError, match=r"stages\.1\.lr: every rate is 0, so nothing would learn"):
        project.load("stages.1.lr=0")
    with pytest.raises(RunError, match=r"stage 'warm-up': nothing learns; check .* its lr"):
        project.train("stages.0.lr={default: 0, heads: 1.0e-3}")  # no expert teaches there

    class Sharding(trainer.Team):
        def __init__(self) -> None:
            super().__init__()
            self.shards = True

    monkeypatch.setattr(trainer, "Team", Sharding)
    with pytest.raises(RunError, match=r"stage 'level': lr: no part can rest \(rate 0\) where parameters are sharded"):
        project.train("stages.1.lr={default: 1.0e-3, projector: 0}")
    assert not (project.folder / "run").exists()
