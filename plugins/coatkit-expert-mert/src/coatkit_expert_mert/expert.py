"""The MERT expert: hidden states of MERT-v1-95M as targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coatkit import (
    AudioBatch,
    CoatkitError,
    Expert,
    Features,
    encode_by_length,
    exact_float32,
    receptive_field,
    standardise,
)
from coatkit_expert_mert import NAME, loading, network
from coatkit_expert_mert.options import Options

_FEWEST = receptive_field(network.CONVOLUTIONS)
"""400 samples make one frame."""


class Mert(Expert):
    """Hidden states of MERT-v1-95M.

    `encode` gives [A, L, 768] at 75 Hz, L = floor((samples - 400) / 320) + 1 and at least 1. Frame i sees samples 320 i
    to 320 i + 399 in its convolutions, so it is centred at sample 320 i + 200; the positional embedding and the
    attention give it the rest of the sound. Each sound is scaled to zero mean and unit variance first. What lies
    beyond a sound's end has no part in its features.

    Args:
        **options: The fields of `Options`.
    """

    sample_rate = network.SAMPLE_RATE
    frame_rate = network.SAMPLE_RATE / network.HOP
    dim = network.WIDTH

    def __init__(self, **options: Any) -> None:
        # One object, which the fingerprint skips: where weights came from does not change the features.
        self.options = Options(**options)
        self.layers = self.options.indices
        self.network: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights onto a device, always in float32 whatever `dtype`.

        Raises:
            AssetError: If the weights are missing, damaged or do not fit; the message names the file.
        """
        self.network = loading.build(self.options.weights, self.layers[-1]).to(device)

    def encode(self, audio: AudioBatch) -> Features:
        """The mean of the chosen hidden states of each sound.

        Raises:
            CoatkitError: If `load` was not called, or the audio is not at 24,000 Hz.
        """
        loaded = self._loaded()
        if audio.sample_rate != self.sample_rate:
            raise CoatkitError(f"{NAME}: audio is at {audio.sample_rate} Hz, expected {self.sample_rate} Hz")

        def run(samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            return network.features(loaded, samples, lengths, self.layers)

        scaled = AudioBatch(standardise(audio.samples, audio.lengths), audio.lengths, audio.sample_rate)
        with exact_float32(audio.samples.device):
            values, lengths = encode_by_length(scaled, run, min_samples=_FEWEST)
        # A frame's centre is half its 400 samples in; it starts half a hop before that.
        offset = (_FEWEST / 2 - network.HOP / 2) / self.sample_rate
        return Features(values, lengths, self.frame_rate, offset)

    def fingerprint(self) -> str:
        """Identity of the features: the code, the chosen layers, and the weights up to the highest of them.

        Raises:
            CoatkitError: If `load` was not called.
        """
        self._loaded()
        return super().fingerprint()

    def _loaded(self) -> Any:
        if self.network is None:
            raise CoatkitError(f"{NAME}: load() must be called before the expert is used")
        return self.network
