"""The emotion2vec expert: frame features of emotion2vec and emotion2vec+ as targets."""

from __future__ import annotations

from typing import Any

import torch

from coatkit import AudioBatch, CoatkitError, Expert, Features, encode_by_length, exact_float32, standardise
from coatkit_expert_emotion2vec import NAME, loading, network
from coatkit_expert_emotion2vec.options import Options


class Emotion2vec(Expert):
    """Frame features of emotion2vec: the output of its last transformer layer, after that layer's norm.

    `encode` gives [A, L, dim] at 50 Hz, dim 768 (1024 for `plus-large`), L = floor((samples - 400) / 320) + 1 and at
    least 1. Frame i sees samples 320 i to 320 i + 399 in its convolutions, so it is centred at sample 320 i + 200;
    positional convolutions and attention give it the rest of the sound. Each sound is scaled to zero mean and unit
    variance first. What lies beyond a sound's end has no part in its features.

    Args:
        **options: The fields of `Options`.
    """

    sample_rate = network.SAMPLE_RATE
    frame_rate = network.SAMPLE_RATE / network.HOP
    dim = network.SIZES["base"].width

    def __init__(self, **options: Any) -> None:
        # One object, which the fingerprint skips: where weights came from does not change the features.
        self.options = Options(**options)
        self.dim = network.SIZES[self.options.variant].width
        self.network: network.Network | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights onto a device, always in float32 whatever `dtype`.

        Raises:
            AssetError: If the weights are missing, damaged or do not fit; the message names the file.
        """
        self.network = loading.build(self.options.weights, self.options.variant).to(device)

    def encode(self, audio: AudioBatch) -> Features:
        """Features of each sound.

        Raises:
            CoatkitError: If `load` was not called, or the audio is not at 16,000 Hz.
        """
        loaded = self._loaded()
        if audio.sample_rate != self.sample_rate:
            raise CoatkitError(f"{NAME}: audio is at {audio.sample_rate} Hz, expected {self.sample_rate} Hz")
        # Upstream scales a sound with a layer norm over all of it, and that is its epsilon. Zeros behind a sound that
        # is too short to make a frame come after the scaling.
        scaled = AudioBatch(standardise(audio.samples, audio.lengths, eps=1e-5), audio.lengths, audio.sample_rate)
        with exact_float32(audio.samples.device):
            values, lengths = encode_by_length(scaled, loaded, min_samples=network.FEWEST)
        # A frame's centre is half its 400 samples in; it starts half a hop before that.
        offset = (network.FEWEST - network.HOP) / 2 / self.sample_rate
        return Features(values, lengths, self.frame_rate, offset)

    def fingerprint(self) -> str:
        """Identity of the features: the code and the loaded weights, wherever they came from.

        Raises:
            CoatkitError: If `load` was not called.
        """
        self._loaded()
        return super().fingerprint()

    def _loaded(self) -> network.Network:
        if self.network is None:
            raise CoatkitError(f"{NAME}: load() must be called before the expert is used")
        return self.network
