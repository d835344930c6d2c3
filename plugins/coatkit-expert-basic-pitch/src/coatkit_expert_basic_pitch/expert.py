"""The basic-pitch expert: contour features of basic-pitch as targets, its own pitch head inside the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coatkit import (
    AudioBatch,
    CoatkitError,
    Expert,
    Features,
    Readout,
    exact_float32,
    masked_focal_bce,
    masked_mse,
)
from coatkit_expert_basic_pitch import loading, windowing
from coatkit_expert_basic_pitch.network import BINS_PER_OCTAVE, CHANNELS, LOWEST, PITCH_BINS, Network
from coatkit_expert_basic_pitch.options import Options

_PRESENT = 0.3
"""Probability from which a pitch counts as heard: upstream's threshold for frames of a note."""
_WINDOWS_AT_ONCE = 16
"""Windows that go through the network together (1.6 s of sound each): bounds memory to about 0.1 GB."""


class BasicPitch(Expert):
    """Contour features z of basic-pitch 0.4.0, and the focal pitch loss through its frozen head h.

    `encode` gives [A, L, 2112] at 22050 / 256 = 86.13 Hz, L = ceil(samples / 256). A frame is z [8, 264] flattened with
    the channel outermost: element `264 c + b` is channel c at pitch bin b. Frame n is centred at sample 256 n; its
    values were computed at most 5.8 ms from there (see `windowing`).

    Args:
        **options: The fields of `Options`.
    """

    sample_rate = windowing.SAMPLE_RATE
    frame_rate = windowing.SAMPLE_RATE / windowing.HOP
    dim = CHANNELS * PITCH_BINS

    def __init__(self, **options: Any) -> None:
        # One object, which the fingerprint skips: how the loss is weighted does not change the features.
        self.options = Options(**options)
        self.network: Network | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights onto a device, always in float32 whatever `dtype`: the log power needs its range.

        Raises:
            AssetError: If the weights are missing or do not fit the network.
        """
        self.network = loading.build(self.options.weights).to(device)

    def encode(self, audio: AudioBatch) -> Features:
        """Features of each sound; padding has no part in them.

        Raises:
            CoatkitError: If `load` was not called, or the audio is not at 22,050 Hz.
        """
        network = self._loaded()
        if audio.sample_rate != self.sample_rate:
            raise CoatkitError(f"basic-pitch: audio is at {audio.sample_rate} Hz, expected {self.sample_rate} Hz")
        device = audio.samples.device
        lengths = windowing.frame_count(audio.lengths.cpu())
        values = torch.zeros(len(audio), int(lengths.max()), self.dim, device=device)

        # One entry per frame and one per window of the whole batch, both in order of sound and time.
        frames = _ramps(lengths)
        sound = torch.repeat_interleave(lengths)
        window, row = windowing.locate(frames)
        window_counts = windowing.locate(lengths - 1)[0] + 1
        windows = _ramps(window_counts)
        window_sound = torch.repeat_interleave(window_counts)
        place = window + (window_counts.cumsum(0) - window_counts)[sound]

        samples, sample_lengths = audio.samples.float(), audio.lengths.to(device)
        for start in range(0, len(windows), _WINDOWS_AT_ONCE):
            chunk = slice(start, start + _WINDOWS_AT_ONCE)
            begin, end = torch.searchsorted(place, torch.tensor([start, start + _WINDOWS_AT_ONCE])).tolist()
            cut = windowing.cut(samples, sample_lengths, window_sound[chunk].to(device), windows[chunk].to(device))
            kept = _kept_features(network, cut)
            here = (place[begin:end] - start).to(device), (row[begin:end] - windowing.FIRST_ROW).to(device)
            values[sound[begin:end].to(device), frames[begin:end].to(device)] = kept[here]
        # Frame n is centred at sample 256 n, so it starts half a hop earlier.
        offset = -0.5 * windowing.HOP / windowing.SAMPLE_RATE
        return Features(values, lengths.to(audio.lengths.device), self.frame_rate, offset)

    def pitch_logits(self, features: Tensor, mask: Tensor) -> Tensor:
        """h: pitch logits [A, L, 264] of features [A, L, 2112] at any frame rate; mask [A, L] is True at valid frames.

        h sees two frames either way, so invalid frames are zeroed first, as beyond the ends of a sound. Its weights are
        frozen; gradient flows to `features`.

        Raises:
            CoatkitError: If `load` was not called.
        """
        network = self._loaded()
        valid = features.float().masked_fill(~mask[..., None], 0.0)
        grid = valid.view(*valid.shape[:2], CHANNELS, PITCH_BINS).transpose(1, 2)
        with exact_float32(features.device):
            return network.pitch_logits(grid)

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`mse` on the features, and `pitch`: `aux_weight` times the focal cross-entropy of h, in nats per pitch bin.

        Both sides go through h at the rate they come in. h mixes five frames, so h of features at 25 Hz is not the
        contour of 86 Hz brought to 25 Hz: compared with that, even a perfect prediction would have a loss to reduce.

        Raises:
            CoatkitError: If `load` was not called and `aux_weight` is not 0.
        """
        terms = {"mse": masked_mse(predicted, target, mask)}
        if self.options.aux_weight > 0:
            with torch.no_grad():
                contour = torch.sigmoid(self.pitch_logits(target, mask))
            focal = masked_focal_bce(
                self.pitch_logits(predicted, mask),
                contour,
                mask,
                gamma=self.options.focal_gamma,
                alpha=self.options.focal_alpha,
            )
            terms["pitch"] = self.options.aux_weight * focal
        return terms

    def readout(self, features: Tensor, mask: Tensor) -> Readout:
        """The pitch posteriorgram, [A, L, 264]: three bins a semitone, bin 1 is A0.

        Raises:
            CoatkitError: If `load` was not called.
        """
        values = torch.sigmoid(self.pitch_logits(features, mask))
        hertz = tuple(LOWEST * 2.0 ** ((b - 1) / BINS_PER_OCTAVE) for b in range(PITCH_BINS))
        return Readout("pitch", values, tuple(f"{f:.1f} Hz" for f in hertz), hertz=hertz, threshold=_PRESENT)

    def fingerprint(self) -> str:
        """Identity of the features: the class and the loaded weights, wherever they came from.

        Raises:
            CoatkitError: If `load` was not called.
        """
        self._loaded()
        return super().fingerprint()

    def _loaded(self) -> Network:
        if self.network is None:
            raise CoatkitError("basic-pitch: load() must be called before the expert is used")
        return self.network


def _ramps(counts: Tensor) -> Tensor:
    """0 .. count - 1 for each of [A] counts, one after the other."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - torch.repeat_interleave(starts, counts)


def _kept_features(network: Network, windows: Tensor) -> Tensor:
    """z of the kept rows of windows [W, 43844]: [W, 142, 2112], channel outermost."""
    # contour1 sees one row either way: the other rows (a sixth of the work) have no part in the kept ones.
    rows = slice(windowing.FIRST_ROW - 1, windowing.FIRST_ROW + windowing.KEPT_ROWS + 1)
    with exact_float32(windows.device):
        return network.contour_features(network.level(windows)[:, rows])
