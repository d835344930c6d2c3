"""The emotion2vec expert's features: against stored upstream values, in batches, in time."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from coatkit import AudioBatch, CoatkitError, Features
from coatkit_expert_emotion2vec import coatkit_manifests, network
from coatkit_expert_emotion2vec.expert import Emotion2vec
from coatkit_expert_emotion2vec.loading import name_as_upstream

ROUNDING = 1e-4
"""What a sum in another order changes in values of about 1: 2e-5 was seen on CPUs with other kernels."""

RATE = 16_000
TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools/store_upstream.py"))
WIDTH = TOOL["WIDTH"]


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encode(expert: Emotion2vec, *sounds: np.ndarray) -> Features:
    with torch.no_grad():
        return expert.encode(AudioBatch.from_arrays(list(sounds), RATE))


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Emotion2vec:
    """The base model at a quarter of its width, from a checkpoint as upstream's training leaves it."""
    size = network.Size(WIDTH, network.SIZES["base"].heads)
    with torch.device("meta"):
        empty = network.Network(size)
    name_as_upstream(empty)
    shapes = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    tensors = {name: torch.from_numpy(TOOL["draw"](name, shape)) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("emotion2vec") / "emotion2vec_base.pt"
    torch.save({"args": None, "cfg": {"model": {}}, "model": tensors, "extra_state": {"epoch": 1}}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(network.SIZES, "base", size)
        expert = Emotion2vec(weights=str(path))
        expert.load(torch.device("cpu"), torch.bfloat16)
    return expert


# --- against upstream


def test_features_are_upstreams(expert: Emotion2vec) -> None:
    upstream = np.load(Path(__file__).with_name("upstream.npz"))
    drawn = TOOL["draw"]("norm1.weight", (16,))
    np.testing.assert_array_equal(drawn, upstream["drawn"], err_msg="numpy draws other weights than were stored")
    np.testing.assert_array_equal(TOOL["sound"]()[:16], upstream["samples"], err_msg="numpy draws another sound")
    features = encode(expert, TOOL["sound"]())
    assert features.values.dtype == torch.float32
    assert features.values.shape == (1, 29, WIDTH)
    np.testing.assert_allclose(features.values[0].numpy(), upstream["features"], atol=ROUNDING, rtol=0)


def test_slopes_are_those_of_alibi() -> None:
    # Press et al. (2022): a geometric series for a power of two; for 12 heads the 8 of it, and 4 of 16 heads' between.
    assert network.slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert network.slopes(12).tolist() == pytest.approx([2.0**-i for i in range(1, 9)] + between)


# --- batches


def test_padded_batch_equals_single_sounds(expert: Emotion2vec) -> None:
    # Lengths of one group and of several, under 400 samples, and with several stretches of convolutions.
    sounds = [noise(n, seed=n) for n in (30_000, 9_000, 100, 29_000, 8_700, 1)]
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


def test_pieces_leave_no_seam(expert: Emotion2vec, monkeypatch: pytest.MonkeyPatch) -> None:
    sounds = [noise(12_345), noise(12_000, seed=1)]  # one group, with padding
    whole = encode(expert, *sounds).values
    monkeypatch.setattr(network, "_FRAMES_AT_ONCE", {"cpu": 14, "other": 14})
    monkeypatch.setattr(network, "_SCORES_AT_ONCE", 2 * 12 * 48 * 7)  # seven queries of 48
    pieces = list(network.Bias(torch.ones(12), torch.zeros(2, 38, 1), torch.ones(2, 38, dtype=torch.bool)))
    assert [bias.shape[2] for _, bias in pieces] == [7] * 6 + [6]
    torch.testing.assert_close(encode(expert, *sounds).values, whole, atol=ROUNDING, rtol=0)


def test_level_and_offset_do_not_matter(expert: Emotion2vec) -> None:
    sound = noise(8_000)
    torch.testing.assert_close(
        encode(expert, 0.2 + 5 * sound).values, encode(expert, 5 * sound).values, atol=1e-3, rtol=0
    )


# --- time


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (399, 1), (400, 1), (719, 1), (720, 2), (1_600, 4), (16_000, 49)]
)
def test_lengths(expert: Emotion2vec, samples: int, frames: int) -> None:
    features = encode(expert, noise(samples))
    assert features.values.shape == (1, frames, WIDTH)
    assert features.lengths.tolist() == [frames]
    assert features.values.isfinite().all()
    assert features.frame_rate == 50.0
    assert features.offset == 40 / RATE


def test_a_frame_sees_400_samples_around_its_centre(expert: Emotion2vec) -> None:
    assert expert.network is not None
    features = encode(expert, noise(4_000))
    sound = torch.from_numpy(noise(4_000))[None]
    plain = expert.network._convolve(sound)
    for place in (0, 399, 400, 1_000, 1_599, 3_919):
        touched = sound.clone()
        touched[0, place] += 1.0
        changed = (expert.network._convolve(touched) - plain)[0].abs().amax(1) > 0
        seen = [320 * i <= place < 320 * i + 400 for i in range(12)]
        assert changed.tolist() == seen
    centres = features.offset + (np.arange(12) + 0.5) / features.frame_rate
    np.testing.assert_allclose(centres, (320 * np.arange(12) + 200) / RATE)


def test_an_event_shows_at_its_time(expert: Emotion2vec) -> None:
    quiet, seconds = noise(32_000), 1.234
    event = quiet.copy()
    event[round(seconds * RATE) :][:160] += 0.5
    features = encode(expert, quiet, event)
    change = (features.values[1] - features.values[0]).norm(dim=1)
    centre = features.offset + (int(change.argmax()) + 0.5) / features.frame_rate
    assert abs(centre - (seconds + 0.005)) < 1.5 / features.frame_rate


@pytest.mark.parametrize("samples", [1, 1_600, 16_000])
def test_silence_is_finite(expert: Emotion2vec, samples: int) -> None:
    assert encode(expert, np.zeros(samples, np.float32)).values.isfinite().all()


# --- use


def test_refuses_another_rate(expert: Emotion2vec) -> None:
    with pytest.raises(CoatkitError, match="emotion2vec: audio is at 22050 Hz, expected 16000 Hz"):
        expert.encode(AudioBatch.from_arrays([noise(1_000)], 22_050))


def test_use_before_load_is_refused() -> None:
    for use in (Emotion2vec().fingerprint, lambda: encode(Emotion2vec(), noise(1_000))):
        with pytest.raises(CoatkitError, match=r"load\(\) must be called"):
            use()


def test_gradient_reaches_the_prediction_only(expert: Emotion2vec) -> None:
    features = encode(expert, noise(4_000))
    predicted = torch.zeros_like(features.values, requires_grad=True)
    expert.loss(predicted, features.values, torch.ones(1, 12, dtype=torch.bool))["mse"].backward()
    assert predicted.grad is not None
    assert predicted.grad.abs().min() > 0
    assert expert.network is not None
    assert not any(p.requires_grad or p.grad is not None for p in expert.network.parameters())


def test_large_is_wider() -> None:
    large = Emotion2vec(variant="plus-large", weights="random")
    assert large.dim == 1_024
    large.load(torch.device("cpu"), torch.float32)
    features = encode(large, noise(2_000))
    assert features.values.shape == (1, 6, 1_024)
    assert features.values.std() > 0


def test_manifest_is_true() -> None:
    (manifest,) = coatkit_manifests()
    assert manifest.target == f"{Emotion2vec.__module__}:{Emotion2vec.__qualname__}"
    assert (manifest.sample_rate, manifest.frame_rate) == (Emotion2vec.sample_rate, Emotion2vec.frame_rate)
    assert manifest.dim is None  # it follows the variant
    assert {Emotion2vec(variant=v).dim for v in ("base", "plus-seed", "plus-base")} == {768}
