"""How the projector starts."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3MultiModalProjector

from coatkit import AssetError, PluginError, load_backbone
from coatkit_backbone_mini.options import Options
from coatkit_backbone_mini.projector import ALIGNED, ALIGNED_SHA256, initial_projector, start_projector
from coatkit_backbone_mini.sizes import real_config


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


# The one that ships


@pytest.fixture
def projector() -> nn.Module:
    """A projector in its real size, with weights that no file has."""
    module = AudioFlamingo3MultiModalProjector(real_config())
    assert isinstance(module, nn.Module)
    return module


def start(module: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    start_projector(module, Options.model_validate(options))
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_shipped_file_is_the_one_its_card_describes() -> None:
    digest = hashlib.sha256(ALIGNED.read_bytes()).hexdigest()
    assert digest == ALIGNED_SHA256
    assert digest in ALIGNED.with_suffix(".md").read_text(encoding="utf-8")
    state = load_file(ALIGNED)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert all(torch.isfinite(value).all() for value in state.values())
    assert ALIGNED.stat().st_size < 1_200_000


def test_the_default_weights_start_aligned(projector: nn.Module) -> None:
    shipped = load_file(ALIGNED)
    for name, value in start(projector).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, shipped[name].float())


def test_a_random_start_is_kept_and_announced(projector: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        after = start(projector, projector="random")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "RANDOM PROJECTOR" in caplog.text


@pytest.mark.parametrize("weights", ["random", "some/folder"])
def test_other_weights_keep_their_own_projector(
    projector: nn.Module, weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    after = start(projector, weights=weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not caplog.text


def test_a_file_of_ones_own_is_read(projector: nn.Module, tmp_path: Path) -> None:
    state = {name: torch.randn_like(value) for name, value in projector.state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors")
    for name, value in start(projector, projector=str(tmp_path / "mine.safetensors")).items():
        assert torch.equal(value, state[name])


def test_a_file_that_does_not_fit_is_refused(projector: nn.Module, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    for make in (
        lambda: save_file({"linear_1.weight": torch.zeros(3, 3)}, wrong),
        lambda: wrong.write_bytes(b"not tensors"),
        lambda: wrong.unlink(),
    ):
        make()
        with pytest.raises(AssetError, match=r"(?s)wrong\.safetensors cannot be used.*\n.*Give `aligned`"):
            start(projector, projector=str(wrong))


def test_a_run_is_tied_to_the_projector_it_does_not_train(cache: Path, tmp_path: Path) -> None:
    plain: Any = load_backbone("mini", weights="random", device="cpu")
    state = {name: value.detach().clone() for name, value in plain.projector.state_dict().items()}
    prints = []
    for number in range(2):
        state["linear_2.weight"] += 1
        file = tmp_path / f"{number}.safetensors"
        save_file(state, file)
        options: Any = {"weights": "random", "projector": str(file), "train": {"projector": "none"}}
        backbone: Any = load_backbone("mini", device="cpu", **options)
        prints.append(backbone.fingerprint())
    assert prints[0] != prints[1]
    with pytest.raises(PluginError, match="export the whole model with --merge"):
        backbone.save_adapter(tmp_path)
