"""How the projector starts."""

from __future__ import annotations

import torch
from torch import nn

from coatkit_backbone_mini.projector import initial_projector


def test_same_weights_every_time_and_global_generator_untouched() -> None:
    rows = torch.randn(50, 16)
    before = torch.get_rng_state()
    first, second = initial_projector(8, rows), initial_projector(8, rows)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "linear_1.weight": (16, 8),
        "linear_1.bias": (16,),
        "linear_2.weight": (16, 16),
        "linear_2.bias": (16,),
    }


def test_output_is_centred_on_the_text_and_as_wide() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 0.1 * torch.randn(1000, 576, generator=generator) + 0.05
    state = initial_projector(384, rows)
    audio = 1.17 * torch.randn(1000, 384, generator=generator)
    hidden = nn.functional.gelu(audio @ state["linear_1.weight"].T + state["linear_1.bias"])
    out = hidden @ state["linear_2.weight"].T + state["linear_2.bias"]
    assert 0.8 < out.std(0).mean() / rows.std(0).mean() < 1.25
    assert (out.mean(0) - rows.mean(0)).abs().mean() < 0.03
