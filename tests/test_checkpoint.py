"""Checkpoints: whole or not there, exact to the bit, and never loaded into a model they do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coatkit import checkpoint
from coatkit.checkpoint import Position
from coatkit.errors import RunError

CPU = torch.device("cpu")
NAMES = frozenset({"body.weight", "tokens"})


class Model(nn.Module):
    """A frozen part, two that learn, and two heads."""

    def __init__(self, seed: int = 0, width: int = 4, heads: tuple[str, ...] = ("audio", "pitch")) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.body = nn.Linear(4, width, bias=False)
            self.tokens = nn.Parameter(torch.randn(3, 4).bfloat16())
            self.heads = nn.ModuleDict({name: nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2)) for name in heads})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.frozen(x)) + self.tokens.float().sum()
        return sum((head(hidden).square().sum() for head in self.heads.values()), torch.zeros(()))


def names_of(model: Model) -> frozenset[str]:
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


def save(folder: Path, model: Model, step: int, moments: checkpoint.Moments | None = None, keep: int = 9) -> Path:
    tensors = checkpoint.learned(model, names_of(model))
    return checkpoint.save(folder, tensors, moments or {}, [checkpoint.random_state(CPU)], Position(step=step), keep)


def same_bits(a: nn.Module, b: nn.Module, names: set[str]) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return all(torch.equal(one[n].view(torch.uint8), two[n].view(torch.uint8)) for n in names if one[n].dim())


def test_who_may_read_a_new_file_may_read_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    folder = save(tmp_path, Model(), 1)
    assert {file.name: file.stat().st_mode for file in folder.iterdir() if file.stat().st_mode != usual} == {}


def test_everything_that_learns_comes_back_to_the_bit_and_nothing_else(tmp_path: Path) -> None:
    source, target = Model(seed=1), Model(seed=2)
    for _ in range(3):
        source(torch.randn(8, 4))  # moves the heads' running statistics, which are no parameters
    frozen = target.frozen.weight.clone()
    path = save(tmp_path, source, 3)
    checkpoint.load_model(path, target, names_of(target))
    kept = {n for n in source.state_dict() if not n.startswith("frozen.")}
    assert same_bits(source, target, kept)
    assert target.heads["audio"][1].num_batches_tracked == 3
    assert torch.equal(target.frozen.weight, frozen)
    assert not any(n.startswith("frozen.") for n in load_file(path / "model.safetensors"))


def test_a_checkpoint_holds_safetensors_and_json_alone(tmp_path: Path) -> None:
    path = save(tmp_path, Model(), 12)
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    state = json.loads((path / "state.json").read_text())
    assert state == {"format": 2, "step": 12, "stage": 0, "stage_step": 0, "skipped": 0}


def test_the_position_comes_back(tmp_path: Path) -> None:
    position = Position(step=120, stage=1, stage_step=60, skipped=2)
    path = checkpoint.save(tmp_path, checkpoint.learned(Model(), NAMES), {}, [], position, keep=1)
    assert checkpoint.load_position(path) == position


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ('{"format": 1, "step": 1, "stage": 0, "stage_step": 0, "skipped": 0}', "format 1, but this coatkit reads"),
        ('{"step": 1}', "state.json: damaged"),
        ('{"format": 2, "steps": 1}', "state.json: damaged"),
        ("{", "state.json: damaged"),
        ("[]", "state.json: damaged"),
        ("3", "state.json: damaged"),
    ],
)
def test_a_damaged_or_foreign_position_is_refused(tmp_path: Path, state: str, said: str) -> None:
    path = save(tmp_path, Model(), 1)
    (path / "state.json").write_text(state)
    with pytest.raises(RunError, match="step-00000001") as caught:
        checkpoint.load_position(path)
    assert said in str(caught.value)


# Half-written ones


class Killed(BaseException):
    """As by kill -9: nothing gets to clean up."""


def breaks(monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    module, name = {"save_file": (checkpoint, "save_file"), "sync": (checkpoint, "sync")}.get(
        place, (checkpoint.os, "replace")
    )
    original: Callable[..., Any] = getattr(module, name)
    calls = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, broken)


@pytest.mark.parametrize(
    ("place", "call"), [("save_file", 1), ("save_file", 2), ("sync", 1), ("sync", 4), ("replace", 1)]
)
def test_a_crash_while_saving_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int
) -> None:
    before = save(tmp_path, Model(seed=1), 10)
    with monkeypatch.context() as broken:
        breaks(broken, place, call)
        with pytest.raises(Killed):
            save(tmp_path, Model(seed=2), 20)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000010"]
    assert checkpoint.complete(tmp_path) == [before]
    restored = Model(seed=3)
    checkpoint.load_model(before, restored, names_of(restored))
    assert torch.equal(restored.body.weight, Model(seed=1).body.weight)
    # What the crash left is no obstacle.
    after = save(tmp_path, Model(seed=2), 20, keep=1)
    assert checkpoint.complete(tmp_path) == [after]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000020"]


def test_what_an_earlier_crash_left_gets_into_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.partial").mkdir()
    (tmp_path / ".step-00000005.partial" / "junk").write_text("half")
    path = save(tmp_path, Model(), 5)
    assert not (path / "junk").exists()
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = checkpoint.sync, checkpoint.os.replace
    monkeypatch.setattr(checkpoint, "sync", lambda p: (events.append(p.name), sync(p)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    save(tmp_path, Model(), 1)
    before = events[: events.index("rename")]
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(before)
    assert events[-1] == tmp_path.name


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, Model(), step, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000100", "step-00001000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_a_step_again_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, Model(seed=1), 5)
    assert save(tmp_path, Model(seed=2), 5) == path
    loaded = Model(seed=3)
    checkpoint.load_model(path, loaded, names_of(loaded))
    assert torch.equal(loaded.body.weight, Model(seed=1).body.weight)


# Ones that do not fit


@pytest.mark.parametrize(
    ("saved", "loading", "said"),
    [
        ({"heads": ("audio",)}, {}, "missing heads.pitch.0.weight"),
        ({}, {"heads": ("audio",)}, "unexpected heads.pitch.0.weight"),
        ({"width": 8}, {}, "body.weight is (8, 4), the model's is (4, 4)"),
    ],
)
def test_a_model_that_does_not_fit_is_told_and_left_alone(
    tmp_path: Path, saved: dict[str, Any], loading: dict[str, Any], said: str
) -> None:
    path = save(tmp_path, Model(seed=1, **saved), 1)
    target = Model(seed=2, **loading)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(RunError, match="does not fit this model") as caught:
        checkpoint.load_model(path, target, names_of(target))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    path = save(tmp_path, Model(heads=()), 1)
    with pytest.raises(RunError, match=r"; and 9 more$"):
        checkpoint.load_model(path, Model(), names_of(Model()))


def test_heads_may_be_left_aside_for_answering(tmp_path: Path) -> None:
    path = save(tmp_path, Model(seed=1), 1)
    target = Model(seed=2, heads=())
    checkpoint.load_model(path, target, names_of(target), ignore="heads.")
    assert torch.equal(target.body.weight, Model(seed=1).body.weight)


@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_tensor_file_is_named(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, Model(), 1)
    for name in ("model.safetensors", "optimizer.safetensors"):
        content = (path / name).read_bytes()
        if damage == "gone":
            (path / name).unlink()
        else:
            (path / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"noise" * 100)
    with pytest.raises(RunError, match=r"model\.safetensors: cannot be read"):
        checkpoint.load_model(path, Model(), names_of(Model()))
    with pytest.raises(RunError, match=r"optimizer\.safetensors: cannot be read"):
        checkpoint.load_moments(path)


# Moments and random numbers


def learner(model: Model) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return torch.optim.AdamW(named.values(), lr=0.1), named


def learn(model: Model, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(8, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_learning_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    torch.manual_seed(5)
    straight = Model()
    optimizer, named = learner(straight)
    learn(straight, optimizer, 3)
    path = save(tmp_path, straight, 3, checkpoint.optimizer_moments(optimizer, named))
    learn(straight, optimizer, 3)

    torch.manual_seed(99)
    resumed = Model(seed=9)
    resumed.frozen.load_state_dict(straight.frozen.state_dict())
    again, renamed = learner(resumed)
    checkpoint.load_model(path, resumed, names_of(resumed))
    moments, random = checkpoint.load_moments(path)
    checkpoint.set_moments(again, renamed, moments)
    checkpoint.restore_random(random[0], CPU)
    learn(resumed, again, 3)
    assert same_bits(straight, resumed, set(straight.state_dict()))


def test_parameters_that_never_learned_have_no_moments() -> None:
    model = Model()
    optimizer, named = learner(model)
    model.body.weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert set(checkpoint.optimizer_moments(optimizer, named)) == {"body.weight"}


def test_moments_of_parameters_that_no_longer_learn_are_left_aside(tmp_path: Path) -> None:
    model = Model()
    optimizer, named = learner(model)
    learn(model, optimizer, 1)
    moments = checkpoint.optimizer_moments(optimizer, named)
    other = torch.optim.AdamW([model.body.weight])
    checkpoint.set_moments(other, {"body.weight": model.body.weight}, moments)
    assert len(other.state) == 1


def test_moments_given_to_an_optimizer_are_handed_over() -> None:
    """The optimizer gets copies of its own, and what it took is kept nowhere else."""
    model = Model()
    optimizer, named = learner(model)
    learn(model, optimizer, 1)
    moments = checkpoint.optimizer_moments(optimizer, named)
    moments["asleep"] = {"exp_avg": torch.ones(2)}
    held = moments["body.weight"]["exp_avg"]
    before = held.clone()
    fresh, named = learner(model)
    checkpoint.set_moments(fresh, named, moments)
    assert set(moments) == {"asleep"}
    learn(model, fresh, 1)
    assert not torch.equal(fresh.state[model.body.weight]["exp_avg"], before)
    assert torch.equal(held, before)


def test_a_process_that_does_not_write_keeps_nothing() -> None:
    model = Model()
    optimizer, named = learner(model)
    learn(model, optimizer, 1)
    moments = checkpoint.optimizer_moments(optimizer, named)
    assert set(checkpoint.gathered(moments)) == set(moments) == set(named)
    assert checkpoint.gathered(moments, keep=False) == {}
    assert checkpoint.learned(model, names_of(model), keep=False) == {}
