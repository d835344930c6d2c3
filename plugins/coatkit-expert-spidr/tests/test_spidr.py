"""The SpidR expert's features: against transformers' own model, in batches, in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Data2VecAudioConfig, Data2VecAudioModel

from coatkit import AudioBatch, CoatkitError, Features
from coatkit_expert_spidr import network
from coatkit_expert_spidr.expert import Spidr

ROUNDING = 1e-4
"""What a sum in another order changes in values of about 1: 2e-5 was seen on CPUs with other kernels."""

RATE = 16_000


def loaded(**options: Any) -> Spidr:
    expert = Spidr(**options)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encode(expert: Spidr, *sounds: np.ndarray) -> Features:
    with torch.no_grad():
        return expert.encode(AudioBatch.from_arrays(list(sounds), RATE))


@pytest.fixture(scope="module")
def stock() -> Any:
    """transformers' model of SpidR's sizes, with no tensor left at a value that another could stand in for, but no bias
    in queries, keys and values, as SpidR has none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = Data2VecAudioConfig(
            conv_bias=False, num_conv_pos_embeddings=5, conv_pos_kernel_size=19, num_conv_pos_embedding_groups=16
        )
        model = Data2VecAudioModel(config).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if value.ndim == 1 and not any(f"{part}_proj.bias" in name for part in "qkv"):
                value += 0.2 * torch.randn_like(value)
            elif "q_proj" in name or "k_proj" in name:
                value *= 3  # attention that chooses
    return model


@pytest.fixture(scope="module")
def checkpoint(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model in upstream's layout, beside what upstream's training keeps there too."""
    theirs = {}
    state = stock.state_dict()
    for name in (n for n in state if n.startswith("feature_")):
        theirs[name] = state[name]
    for i in range(5):
        for kind in ("weight", "bias"):
            ours = state[f"encoder.pos_conv_embed.layers.{i}.conv.{kind}"]
            theirs[f"student.pos_conv_embed.convs.{i}.{kind}"] = ours
    for kind in ("weight", "bias"):
        theirs[f"student.layer_norm.{kind}"] = state[f"encoder.layer_norm.{kind}"]
        for i in range(12):
            for part in (
                "layer_norm",
                "final_layer_norm",
                "feed_forward.intermediate_dense",
                "feed_forward.output_dense",
            ):
                theirs[f"student.layers.{i}.{part}.{kind}"] = state[f"encoder.layers.{i}.{part}.{kind}"]
            theirs[f"student.layers.{i}.attention.proj.{kind}"] = state[f"encoder.layers.{i}.attention.out_proj.{kind}"]
    for i in range(12):
        fused = [state[f"encoder.layers.{i}.attention.{part}_proj.weight"] for part in "qkv"]
        theirs[f"student.layers.{i}.attention.qkv.weight"] = torch.cat(fused)
    theirs["mask_embedding"] = torch.rand(768)
    theirs["current_step"] = torch.ones(1, dtype=torch.int64)
    theirs["teacher.layer_norm.bias"] = torch.rand(768)
    theirs["heads.0.0.bias"] = torch.rand(256)
    theirs["codebooks.0.counts"] = torch.rand(256)
    path: Path = tmp_path_factory.mktemp("spidr") / "spidr_base.pt"
    torch.save({"model": theirs, "optimizer": {}, "scheduler": {}, "scaler": {}, "step": torch.ones(1)}, path)
    return str(path)


@pytest.fixture(scope="module")
def expert(checkpoint: str) -> Spidr:
    return loaded(weights=checkpoint)


@pytest.fixture(scope="module")
def lowest(checkpoint: str) -> Spidr:
    return loaded(weights=checkpoint, layer=1)


def expected(stock: Any, sound: np.ndarray) -> list[torch.Tensor]:
    """The stock model's outputs [L, 768] of its layers for one sound, scaled as upstream's data set does it."""
    samples = torch.nn.functional.layer_norm(torch.from_numpy(sound), sound.shape)
    found = stock(samples[None], output_hidden_states=True)
    states = [state[0] for state in found.hidden_states[1:]]
    assert torch.equal(states[-1], found.last_hidden_state[0])
    return states


# --- against transformers


def test_features_are_the_stock_models(stock: Any, expert: Spidr, checkpoint: str) -> None:
    middle = loaded(weights=checkpoint, layer=6)
    # The faint one shows the epsilon of the scaling, which the norms of the convolutions hide else.
    for sound in (noise(22_000), 0.5 + noise(4_321, seed=1), 1e-4 * noise(3_000, seed=2), noise(400)):
        states = expected(stock, sound)
        for one, wanted in ((expert, states[11]), (middle, states[5])):
            values = encode(one, sound).values[0]
            assert values.shape == wanted.shape
            torch.testing.assert_close(values, wanted, atol=ROUNDING, rtol=0)


def test_layers_and_tensors_differ(stock: Any) -> None:
    # Else the test above would pass with the wrong one.
    states = expected(stock, noise(10_000))
    assert len(states) == 12
    for i, state in enumerate(states):
        assert all((state - other).abs().max() > 1e-2 for other in states[:i])
    attention = stock.encoder.layers[11].attention
    query, key = attention.q_proj.weight.clone(), attention.k_proj.weight.clone()
    try:
        attention.q_proj.weight.copy_(key)
        attention.k_proj.weight.copy_(query)
        swapped = expected(stock, noise(10_000))[11]
    finally:
        attention.q_proj.weight.copy_(query)
        attention.k_proj.weight.copy_(key)
    assert (swapped - states[11]).abs().max() > 1e-2


def test_layers_above_the_chosen_one_are_left_out(lowest: Spidr, expert: Spidr) -> None:
    assert len(lowest.network.encoder.layers) == 1
    assert len(expert.network.encoder.layers) == 12


# --- batches


def test_padded_batch_equals_single_sounds(expert: Spidr) -> None:
    # Lengths of one group and of several, two under 400 samples, and some with several stretches of convolutions.
    sounds = [noise(n, seed=n) for n in (25_000, 9_000, 100, 24_500, 8_700, 1)]
    batch = AudioBatch.from_arrays(sounds, RATE)
    # What lies beyond a sound's end must not matter, whatever it is.
    for i, sound in enumerate(sounds):
        batch.samples[i, len(sound) :] = float("nan") if i % 2 else 1e3
    before = batch.samples.clone()
    with torch.no_grad():
        together = expert.encode(batch)
    torch.testing.assert_close(batch.samples, before, rtol=0, atol=0, equal_nan=True)
    for i, sound in enumerate(sounds):
        alone = encode(expert, sound)
        frames = int(alone.lengths[0])
        assert together.lengths[i] == frames
        torch.testing.assert_close(together.values[i, :frames], alone.values[0], atol=ROUNDING, rtol=0)
        assert not together.values[i, frames:].any()


def test_network_itself_is_exact_with_much_padding(expert: Spidr) -> None:
    # `encode` groups sounds of like length; this is what a GPU's larger groups rest on.
    sounds = [torch.from_numpy(noise(n, seed=n)) for n in (16_000, 4_000, 400)]
    lengths = torch.tensor([len(sound) for sound in sounds])
    with torch.no_grad():
        values, counts = network.features(
            expert.network, torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True), lengths
        )
        assert counts.tolist() == [49, 12, 1]
        for row, sound, count in zip(values, sounds, counts.tolist(), strict=True):
            alone, _ = network.features(expert.network, sound[None], torch.tensor([len(sound)]))
            torch.testing.assert_close(row[:count], alone[0], atol=ROUNDING, rtol=0)


def test_stretches_of_the_convolutions_leave_no_seam(
    stock: Any, lowest: Spidr, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = noise(12_345)
    monkeypatch.setattr(network, "_FRAMES_AT_ONCE", {"cpu": 7, "other": 7})
    torch.testing.assert_close(encode(lowest, sound).values[0], expected(stock, sound)[0], atol=ROUNDING, rtol=0)


def test_autocast_and_reduced_precision_change_nothing(expert: Spidr) -> None:
    sound = noise(5_000)
    plain = encode(expert, sound).values
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = encode(expert, sound).values
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, reduced)


# --- time


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (399, 1), (400, 1), (719, 1), (720, 2), (1_600, 4), (16_000, 49)]
)
def test_lengths(lowest: Spidr, samples: int, frames: int) -> None:
    features = encode(lowest, noise(samples))
    assert features.values.shape == (1, frames, 768)
    assert features.lengths.tolist() == [frames]
    assert features.values.isfinite().all()
    assert features.frame_rate == 50.0
    assert features.offset == 40 / RATE


@pytest.mark.parametrize("sample", [2_000, 8_000, 14_100])
def test_an_event_is_on_time(lowest: Spidr, sample: int) -> None:
    # Layer 1 is still local enough: the frame that changes most is the one that the event falls into.
    quiet = noise(16_000)
    struck = quiet.copy()
    struck[sample - 20 : sample + 20] += noise(40, seed=7)
    features = encode(lowest, quiet, struck)
    changed = (features.values[0] - features.values[1]).norm(dim=1)
    start = features.offset + int(changed.argmax()) / features.frame_rate
    assert start - 0.5 / features.frame_rate <= sample / RATE <= start + 1.5 / features.frame_rate


def test_silence_is_finite_and_as_any_constant(lowest: Spidr) -> None:
    values = encode(lowest, np.zeros(8_000, np.float32)).values
    assert values.isfinite().all()
    torch.testing.assert_close(values, encode(lowest, np.full(8_000, 0.5, np.float32)).values)


# --- refusals


def test_refuses_another_rate(lowest: Spidr) -> None:
    with pytest.raises(CoatkitError, match="24000 Hz, expected 16000 Hz"):
        lowest.encode(AudioBatch.from_arrays([noise(500)], 24_000))


def test_use_before_load_is_refused() -> None:
    for use in (Spidr().fingerprint, lambda: encode(Spidr(), noise(500))):
        with pytest.raises(CoatkitError, match=r"load\(\) must be called"):
            use()
