"""The built-in heads, and how they are started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coatkit.build import build, load_head
from coatkit.errors import PluginError
from coatkit.heads import LinearHead, TransformerHead
from coatkit.plugins import registry
from coatkit.protocols import Head

HIDDEN, DIM = 32, 5
Make = Callable[[], Head]
HEADS: dict[str, Make] = {
    "linear": lambda: LinearHead(HIDDEN, DIM),
    "transformer": lambda: TransformerHead(HIDDEN, DIM, heads=4),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def states(*lengths: int, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Random states [A, L, HIDDEN] of sounds of these lengths, and their mask."""
    hidden = torch.randn(len(lengths), max(lengths), HIDDEN, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(mask[..., None], hidden, padding), mask


@every_head
def test_one_feature_for_each_position(make: Make) -> None:
    assert make()(*states(7, 3, 1)).shape == (3, 7, DIM)


@every_head
@every_mode
def test_padding_does_not_leak_in(make: Make, training: bool) -> None:
    head = make().train(training)
    hidden, mask = states(9, 4, 1, padding=1e3)
    with torch.set_grad_enabled(training):  # without gradient torch takes another, fused path
        together = head(hidden, mask)
        for i, length in enumerate((9, 4, 1)):
            alone = head(hidden[i : i + 1, :length], mask[i : i + 1, :length])
            torch.testing.assert_close(together[i, :length], alone[0], rtol=1e-4, atol=1e-5)


@every_head
def test_padding_gets_no_gradient(make: Make) -> None:
    hidden, mask = states(6, 2)
    hidden.requires_grad_(True)
    make()(hidden, mask)[mask].square().sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[~mask] == 0).all()
    assert (hidden.grad[mask].abs().sum(-1) > 0).all()


@every_head
@every_mode
def test_a_sound_without_thinking_positions_is_harmless(make: Make, training: bool) -> None:
    head = make().train(training)
    hidden, mask = states(4, 4)
    mask[1] = False
    out = head(hidden, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1], head(hidden[:1], mask[:1]), rtol=1e-4, atol=1e-5)


def test_only_the_transformer_lets_positions_see_one_another() -> None:
    hidden, mask = states(6)
    changed = hidden.clone()
    changed[0, 2, 0] += 1.0  # of one channel: what all share, a LayerNorm takes away but for its rounding
    linear, transformer = (HEADS[name]() for name in ("linear", "transformer"))
    differs = (linear(hidden, mask) != linear(changed, mask)).any(-1)[0]
    assert differs.tolist() == [False, False, True, False, False, False]
    assert (transformer(hidden, mask) != transformer(changed, mask)).any(-1).all()


def test_transformer_has_one_block_and_one_linear_map() -> None:
    head = TransformerHead(HIDDEN, DIM, heads=4, feedforward=2.0)
    shapes = {name: tuple(value.shape) for name, value in head.named_parameters() if value.ndim == 2}
    assert shapes == {
        "block.self_attn.in_proj_weight": (3 * HIDDEN, HIDDEN),
        "block.self_attn.out_proj.weight": (HIDDEN, HIDDEN),
        "block.linear1.weight": (2 * HIDDEN, HIDDEN),
        "block.linear2.weight": (HIDDEN, 2 * HIDDEN),
        "out.weight": (DIM, HIDDEN),
    }


def head_of(seed: int, name: str, **options: Any) -> Head:
    component = registry().resolve("head", "transformer", Path.cwd())
    return load_head(component, options, HIDDEN, DIM, seed, name)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(PluginError, match=r"transformer: .*'heads: 5' does not divide the backbone's width 32"):
        head_of(0, "a", heads=5)


def same(one: Head, other: Head) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_start_follows_seed_and_name_only() -> None:
    first = head_of(3, "a")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(first, head_of(3, "a"))
    assert torch.equal(before, torch.get_rng_state())
    assert not same(first, head_of(3, "b"))
    assert not same(first, head_of(4, "a"))


def test_another_expert_changes_no_start(project: Any) -> None:
    both = build(project.load(), "cpu")
    del project.spec["experts"]["audio"]
    for stage in project.spec["stages"]:
        stage["weights"] = {"level": 1.0}
    one = build(project.load(), "cpu")
    kept = {name: value for name, value in both.state_dict().items() if not name.startswith("heads.audio")}
    assert set(kept) == set(one.state_dict())
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in kept.items())
    assert any("lora_A" in name for name in kept)
