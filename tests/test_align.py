"""Alignment by time, against a plain loop over time intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coatkit.align import align
from coatkit.protocols import Features

RATES = [3.125, 12.5, 25.0, 31.25, 50.0, 75.0, 22_050 / 256]
OFFSETS = [0.0, 0.0171, 0.137, -0.0058, 0.6]


def reference(
    frames: np.ndarray, frame_rate: float, offset: float, positions: int, rate: float, upsampling: str
) -> np.ndarray:
    """[n, d] frames to [positions, d], one interval of time after the other, in float64."""
    n, dim = frames.shape
    out = np.zeros((positions, dim))
    for i in range(positions):
        begin, end = i / rate, (i + 1) / rate
        middle = (begin + end) / 2
        if frame_rate > rate:
            covered = 0.0
            for k in range(n):
                overlap = min(end, offset + (k + 1) / frame_rate) - max(begin, offset + k / frame_rate)
                if overlap > 1e-12:
                    out[i] += overlap * frames[k]
                    covered += overlap
            if covered > 0:
                out[i] /= covered
            else:
                out[i] = frames[0] if end <= offset + 1e-9 else frames[-1]
        elif upsampling == "repeat":
            out[i] = frames[min(max(math.floor((middle - offset) * frame_rate), 0), n - 1)]
        else:
            centres = [offset + (k + 0.5) / frame_rate for k in range(n)]
            out[i] = [np.interp(middle, centres, frames[:, j]) for j in range(dim)]
    return out


def padded(sounds: list[np.ndarray], frame_rate: float, offset: float = 0.0) -> Features:
    """A batch whose padding is NaN."""
    values = torch.full((len(sounds), max(len(s) for s in sounds) + 3, sounds[0].shape[1]), torch.nan)
    for i, frames in enumerate(sounds):
        values[i, : len(frames)] = torch.from_numpy(frames).float()
    return Features(values, torch.tensor([len(s) for s in sounds]), frame_rate, offset)


@pytest.mark.parametrize("upsampling", ["linear", "repeat"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("frame_rate", RATES)
@pytest.mark.parametrize("rate", [25.0, 6.25])
def test_equals_a_loop_over_time(rate: float, frame_rate: float, offset: float, upsampling: str) -> None:
    random = np.random.default_rng(0)
    # Seconds of sound, and how much of it the expert gave frames for: all, too much, a third, a single frame.
    lengths, frames = [], []
    for seconds, share in ((2.0, 1.0), (1.36, 1.2), (3.0, 0.35), (0.4, 0.0), (0.04, 1.0)):
        lengths.append(max(1, round(seconds * rate)))
        frames.append(random.normal(size=(max(1, round(seconds * share * frame_rate)), 3)))
    got = align(padded(frames, frame_rate, offset), torch.tensor(lengths), rate, upsampling)  # type: ignore[arg-type]
    assert got.shape == (5, max(lengths), 3)
    for i, length in enumerate(lengths):
        expected = reference(frames[i], frame_rate, offset, length, rate, upsampling)
        np.testing.assert_allclose(got[i, :length].numpy(), expected, atol=2e-6)
        assert (got[i, length:] == 0).all()


def test_the_same_rate_changes_nothing() -> None:
    frames = np.random.default_rng(1).normal(size=(7, 4))
    got = align(padded([frames], 25.0), torch.tensor([7]), 25.0)
    assert torch.equal(got[0], torch.from_numpy(frames).float())


def test_twice_the_rate_is_the_mean_of_two() -> None:
    frames = torch.tensor([[1.0], [3.0], [10.0], [20.0]])
    got = align(Features(frames[None], torch.tensor([4]), 50.0), torch.tensor([2]), 25.0)
    assert got.flatten().tolist() == [2.0, 15.0]


def test_half_the_rate_is_interpolated_or_repeated() -> None:
    features = Features(torch.tensor([[[0.0], [8.0]]]), torch.tensor([2]), 12.5)
    # Frame centres lie at positions 0.5 and 2.5.
    assert align(features, torch.tensor([4]), 25.0).flatten().tolist() == [0.0, 2.0, 6.0, 8.0]
    assert align(features, torch.tensor([4]), 25.0, "repeat").flatten().tolist() == [0.0, 0.0, 8.0, 8.0]


@pytest.mark.parametrize("frame_rate", [12.5, 25.0, 100.0])
def test_the_last_frame_is_held(frame_rate: float) -> None:
    frames = np.arange(4.0)[:, None]
    got = align(padded([frames], frame_rate), torch.tensor([40]), 25.0)
    assert (got[0, 20:] == 3.0).all()


def test_half_precision_features_give_float32() -> None:
    features = Features(torch.ones(1, 4, 2, dtype=torch.float16), torch.tensor([4]), 50.0)
    assert align(features, torch.tensor([2]), 25.0).dtype == torch.float32


def test_a_sound_without_positions_may_be_without_frames() -> None:
    values = torch.full((2, 3, 1), torch.nan)
    values[1] = 5.0
    got = align(Features(values, torch.tensor([0, 3]), 25.0), torch.tensor([0, 2]), 25.0)
    assert got.flatten().tolist() == [0.0, 0.0, 5.0, 5.0]


def test_a_sound_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="no frame"):
        align(Features(torch.zeros(2, 3, 1), torch.tensor([3, 0]), 25.0), torch.tensor([2, 2]), 25.0)


def test_another_number_of_sounds_is_refused() -> None:
    with pytest.raises(ValueError, match="1 sounds have features but 2"):
        align(Features(torch.zeros(1, 3, 1), torch.tensor([3]), 25.0), torch.tensor([2, 2]), 25.0)


rates = st.floats(1.0, 200.0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30), rates, rates, st.floats(-0.5, 0.5), st.integers(1, 40), st.sampled_from(["linear", "repeat"])
)
def test_every_output_is_a_mean_of_valid_frames(
    frames: int, frame_rate: float, rate: float, offset: float, positions: int, upsampling: str
) -> None:
    values = np.random.default_rng(frames).uniform(-1, 1, (frames, 2))
    got = align(padded([values], frame_rate, offset), torch.tensor([positions]), rate, upsampling)[0]  # type: ignore[arg-type]
    assert (got >= torch.from_numpy(values.min(0)) - 1e-5).all()
    assert (got <= torch.from_numpy(values.max(0)) + 1e-5).all()
    same = align(padded([np.full((frames, 1), 0.7)], frame_rate, offset), torch.tensor([positions]), rate)
    np.testing.assert_allclose(same.numpy(), 0.7, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))
def test_averaging_keeps_the_mean_and_is_the_same_backwards(blocks: int, more: int, fewer: int) -> None:
    """`more` frames for every `fewer` positions, over exactly the same time."""
    assume(more > fewer)
    values = np.random.default_rng(blocks).normal(size=(blocks * more, 3))
    rate, frame_rate, positions = 25.0, 25.0 * more / fewer, torch.tensor([blocks * fewer])
    got = align(padded([values], frame_rate), positions, rate)[0]
    np.testing.assert_allclose(got.mean(0).numpy(), values.mean(0), atol=1e-5)
    backwards = align(padded([values[::-1].copy()], frame_rate), positions, rate)[0]
    np.testing.assert_allclose(backwards.flip(0).numpy(), got.numpy(), atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4), rates)
def test_a_sound_is_aligned_as_if_it_were_alone(sizes: list[tuple[int, int]], frame_rate: float) -> None:
    random = np.random.default_rng(len(sizes))
    sounds = [random.normal(size=(frames, 2)) for frames, _ in sizes]
    lengths = torch.tensor([positions for _, positions in sizes])
    together = align(padded(sounds, frame_rate), lengths, 25.0)
    for i, frames in enumerate(sounds):
        alone = align(padded([frames], frame_rate), lengths[i : i + 1], 25.0)[0]
        assert torch.equal(together[i, : len(alone)], alone)
