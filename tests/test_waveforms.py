"""What experts on raw samples share: scaling, frame counts and batches by length."""

import numpy as np
import pytest
import torch
from torch import Tensor

from coatkit import AudioBatch, conv_frames, encode_by_length, receptive_field, standardise

WAV2VEC = [(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2


def batch(*sizes: int, rate: int = 100) -> AudioBatch:
    random = np.random.default_rng(0)
    made = AudioBatch.from_arrays([random.normal(3.0, 2.0, n).astype(np.float32) for n in sizes], rate)
    for row, size in enumerate(sizes):
        made.samples[row, size:] = 1e6  # whatever padding holds must not matter
    return made


def test_each_sound_is_standardised_over_its_own_samples() -> None:
    audio = batch(50, 400, 1)
    out = standardise(audio.samples, audio.lengths, eps=1e-5)
    for row, size in enumerate((50, 400)):
        x = audio.samples[row, :size].double()
        expected = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(out[row, :size].double(), expected, atol=1e-5, rtol=0)
        assert not out[row, size:].any()
    assert not out[2].any()


def test_frames_are_those_of_the_convolutions() -> None:
    convolutions = torch.nn.Sequential(*[torch.nn.Conv1d(1, 1, k, s) for k, s in WAV2VEC])
    lengths = torch.tensor([1, 399, 400, 719, 720, 5_000, 16_000])
    frames = conv_frames(lengths, WAV2VEC)
    assert frames.tolist()[:2] == [0, 0]
    for size, count in zip(lengths.tolist()[2:], frames.tolist()[2:], strict=True):
        assert convolutions(torch.zeros(1, size)).shape[-1] == count
    assert receptive_field(WAV2VEC) == 400


class Recorder:
    """Gives every sample as a frame of two features, and keeps what it was called with."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []

    def __call__(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        assert samples.shape == (len(lengths), int(lengths.max()))
        self.groups.append(lengths.tolist())
        return torch.stack([samples, -samples], -1) + 7, lengths


@pytest.mark.parametrize("seconds", [0.01, 3.0, 1e9])
@pytest.mark.parametrize("waste", [0.0, 0.1, 1.0])
def test_results_come_back_in_order(seconds: float, waste: float) -> None:
    sizes = [30, 200, 7, 190, 200, 30, 1]
    audio, network = batch(*sizes), Recorder()
    values, frames = encode_by_length(audio, network, seconds=seconds, waste=waste, min_samples=5)
    assert frames.tolist() == [30, 200, 7, 190, 200, 30, 5]
    for row, size in enumerate(sizes):
        torch.testing.assert_close(values[row, :size, 0], audio.samples[row, :size] + 7)
        torch.testing.assert_close(values[row, :size, 1], 7 - audio.samples[row, :size])
        assert not values[row, frames[row] :].any()
    assert (values[6, 1:5] == 7).all()  # a sound that was too short has zeros behind it
    for group in network.groups:
        padded = len(group) * max(group)
        assert padded - sum(group) <= waste * padded
        assert len(group) == 1 or padded <= seconds * 100
    if waste == 1.0 and seconds == 1e9:
        assert len(network.groups) == 1
    assert torch.equal(audio.samples, batch(*sizes).samples)  # the batch is only read
