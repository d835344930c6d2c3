"""The MERT expert's features: against transformers' own model, in batches, in time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HubertConfig, HubertModel

from coatkit import AssetError, AudioBatch, CoatkitError, Features
from coatkit_expert_mert import network
from coatkit_expert_mert.expert import Mert

ROUNDING = 1e-4
"""What a sum in another order changes in values of about 1: 2e-5 was seen on CPUs with other kernels."""

RATE = 24_000
POSITIONAL = "encoder.pos_conv_embed.conv."
SPELLINGS = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def loaded(**options: Any) -> Mert:
    expert = Mert(**options)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encode(expert: Mert, *sounds: np.ndarray) -> Features:
    with torch.no_grad():
        return expert.encode(AudioBatch.from_arrays(list(sounds), RATE))


@pytest.fixture(scope="module")
def stock() -> Any:
    """transformers' model of MERT's sizes, with no tensor left at a value that another could stand in for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = HubertModel(HubertConfig(attn_implementation="sdpa")).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn_like(value)
            elif "q_proj" in name or "k_proj" in name:
                value *= 3  # attention that chooses
    return model


@pytest.fixture(scope="module")
def folder(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the hub's layout: the older spelling of weight normalisation, its configuration with MERT's keys."""
    folder = tmp_path_factory.mktemp("MERT-v1-95M")
    tensors = dict(stock.state_dict())
    for old, new in SPELLINGS.items():
        tensors[POSITIONAL + old] = tensors.pop(POSITIONAL + new)
    torch.save(tensors, folder / "pytorch_model.bin")
    config = stock.config.to_dict() | {"model_type": "mert_model", "architectures": ["MERTModel"]}
    config |= {"feature_extractor_cqt": False, "deepnorm": False, "attention_relax": -1.0, "sample_rate": RATE}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": RATE}))
    return folder


@pytest.fixture(scope="module")
def average(folder: Path) -> Mert:
    return loaded(weights=str(folder), layers="average")


@pytest.fixture(scope="module")
def lowest(folder: Path) -> Mert:
    return loaded(weights=str(folder), layers=0)


def states(stock: Any, sound: np.ndarray) -> list[torch.Tensor]:
    """The stock model's 13 hidden states [L, 768] of one sound, scaled as transformers' feature extractor does it."""
    samples = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
    return [state[0] for state in stock(torch.from_numpy(samples)[None], output_hidden_states=True).hidden_states]


def expected(stock: Any, sound: np.ndarray, layers: Sequence[int]) -> torch.Tensor:
    """The mean of some of them, [L, 768]."""
    found = states(stock, sound)
    return torch.stack([found[i] for i in layers]).mean(0)


# --- against transformers


@pytest.mark.parametrize("layers", [0, 12, [3, 1], "average"])
def test_features_are_the_stock_models_hidden_states(stock: Any, folder: Path, layers: Any) -> None:
    expert = loaded(weights=str(folder / "pytorch_model.bin"), layers=layers)
    for sound in (noise(10_000), 0.5 + noise(4_321, seed=1), noise(400)):
        features = encode(expert, sound)
        wanted = expected(stock, sound, expert.layers)
        assert features.values.shape[1:] == wanted.shape
        torch.testing.assert_close(features.values[0], wanted, atol=ROUNDING, rtol=0)


def test_layers_differ(stock: Any) -> None:
    # Else the test above would pass with the wrong one.
    found = states(stock, noise(10_000))
    assert len(found) == 13
    for i, state in enumerate(found):
        for other in found[:i]:
            assert (state - other).abs().max() > 1e-2


def test_layers_above_the_highest_are_left_out(lowest: Mert, average: Mert) -> None:
    assert len(lowest.network.encoder.layers) == 0
    assert len(average.network.encoder.layers) == 12


def test_both_spellings_of_weight_normalisation_give_the_same(stock: Any, average: Mert, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)  # config.json, and model.safetensors in the newer spelling
    assert loaded(weights=str(tmp_path), layers="average").fingerprint() == average.fingerprint()


# --- batches


def test_padded_batch_equals_single_sounds(average: Mert) -> None:
    # Lengths of one group and of several, one under 400 samples, and one with several stretches of convolutions.
    sounds = [noise(n, seed=n) for n in (50_000, 9_000, 100, 49_000, 8_700, 1)]
    batch = AudioBatch.from_arrays(sounds, RATE)
    # What lies beyond a sound's end must not matter, whatever it is.
    for i, sound in enumerate(sounds):
        batch.samples[i, len(sound) :] = float("nan") if i % 2 else 1e3
    before = batch.samples.clone()
    with torch.no_grad():
        together = average.encode(batch)
    torch.testing.assert_close(batch.samples, before, rtol=0, atol=0, equal_nan=True)
    for i, sound in enumerate(sounds):
        alone = encode(average, sound)
        frames = int(alone.lengths[0])
        assert together.lengths[i] == frames
        torch.testing.assert_close(together.values[i, :frames], alone.values[0], atol=ROUNDING, rtol=0)
        assert not together.values[i, frames:].any()


def test_stretches_of_the_convolutions_leave_no_seam(stock: Any, lowest: Mert, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = noise(12_345)
    monkeypatch.setattr(network, "_FRAMES_AT_ONCE", {"cpu": 7, "other": 7})
    torch.testing.assert_close(encode(lowest, sound).values[0], expected(stock, sound, [0]), atol=ROUNDING, rtol=0)


def test_nearly_suppressed_sound_keeps_its_statistics(stock: Any, lowest: Mert) -> None:
    # A slow tone: the covariance of ten neighbouring samples is nearly singular, and filters that suppress the tone
    # divide by a variance of the size of float32's rounding.
    slow = (0.3 * np.sin(2 * np.pi * 20 * np.arange(12_000) / RATE)).astype(np.float32)
    for sound in (slow, 0.2 + 1e-4 * slow):
        wanted = expected(stock, sound, [0])
        found = encode(lowest, sound).values[0]
        assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-4


def test_autocast_and_reduced_precision_change_nothing(average: Mert) -> None:
    sound = noise(5_000)
    plain = encode(average, sound).values
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = encode(average, sound).values
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, reduced)


# --- time


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (399, 1), (400, 1), (719, 1), (720, 2), (2_400, 7), (24_000, 74)]
)
def test_lengths(average: Mert, samples: int, frames: int) -> None:
    features = encode(average, noise(samples))
    assert features.values.shape == (1, frames, 768)
    assert features.lengths.tolist() == [frames]
    assert features.values.isfinite().all()
    assert features.frame_rate == 75.0
    assert features.offset == 40 / RATE


@pytest.mark.parametrize("sample", [3_000, 12_000, 20_900])
def test_an_event_is_on_time(lowest: Mert, sample: int) -> None:
    # Hidden state 0 is still local enough: the frame that changes most is the one that the event falls into.
    quiet = noise(24_000)
    struck = quiet.copy()
    struck[sample - 20 : sample + 20] += noise(40, seed=7)
    values = encode(lowest, quiet, struck)
    changed = (values.values[0] - values.values[1]).norm(dim=1)
    start = values.offset + int(changed.argmax()) / values.frame_rate
    assert start - 0.5 / values.frame_rate <= sample / RATE <= start + 1.5 / values.frame_rate


def test_silence_is_finite_and_constant(average: Mert) -> None:
    values = encode(average, np.zeros(24_000, np.float32)).values
    assert values.isfinite().all()
    torch.testing.assert_close(values, encode(average, np.full(24_000, 0.5, np.float32)).values)


# --- refusals


def test_refuses_another_rate(average: Mert) -> None:
    with pytest.raises(CoatkitError, match="16000 Hz, expected 24000 Hz"):
        average.encode(AudioBatch.from_arrays([noise(500)], 16_000))


def test_use_before_load_is_refused() -> None:
    for use in (Mert().fingerprint, lambda: encode(Mert(), noise(500))):
        with pytest.raises(CoatkitError, match=r"load\(\) must be called"):
            use()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "hidden_size", 1024),
        ("config.json", "num_hidden_layers", 24),
        ("config.json", "do_stable_layer_norm", True),
        ("config.json", "feature_extractor_cqt", True),
        ("config.json", "deepnorm", True),
        ("config.json", "attention_relax", 32.0),
        ("config.json", "sample_rate", 16_000),
        ("config.json", "conv_stride", [5, 2, 2, 2, 2, 2, 1]),
        ("preprocessor_config.json", "sampling_rate", 16_000),
        ("preprocessor_config.json", "do_normalize", False),
    ],
)
def test_a_folder_of_another_model_is_refused(folder: Path, tmp_path: Path, file: str, key: str, value: Any) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = json.loads((tmp_path / file).read_text()) | {key: value}
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(AssetError) as caught:
        loaded(weights=str(tmp_path))
    assert str(tmp_path / file) in str(caught.value)
    assert f"{key} is {value!r}" in str(caught.value)
