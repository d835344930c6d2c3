"""The PANNs expert: features of its trunk as targets, its own classifier of sound events inside the loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coatkit import AudioBatch, CoatkitError, Expert, Features, Readout, exact_float32, masked_bce
from coatkit_expert_panns import front_end, loading
from coatkit_expert_panns.classes import class_names
from coatkit_expert_panns.network import DIM, SEGMENT, Network
from coatkit_expert_panns.options import Options

_SHORTEST = (SEGMENT - 1) * front_end.HOP
"""Samples that make one segment; a shorter sound is followed by zeros."""
_PRESENT = 0.2
"""Probability from which a class counts as heard; ours: upstream's are low, its own examples show the top classes."""
_SECONDS_AT_ONCE = 90.0
"""Sound that goes through the network together, unless one sound alone is longer: bounds memory to some 0.3 GB."""


class Panns(Expert):
    """Features z of PANNs Cnn14_DecisionLevelMax, and the loss through its frozen classifier g of 527 sound classes.

    `encode` gives [A, L, 2048] at 3.125 Hz, L = max(1, (samples // 320 + 1) // 32). z is what upstream's `fc_audioset`
    reads; sigmoid(g(z)) is upstream's frame-wise output, which is the same over the 32 frames of a segment. Segment i
    is frames 32 i to 32 i + 31, frame t centred at sample 320 t.

    Args:
        **options: The fields of `Options`.
    """

    sample_rate = front_end.SAMPLE_RATE
    frame_rate = front_end.SAMPLE_RATE / (front_end.HOP * SEGMENT)
    dim = DIM
    # Upstream repeats a segment's probabilities over its frames; features between two segments never occur there.
    upsampling: Literal["linear", "repeat"] = "repeat"

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        self.network: Network | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the 527 classes, in the order of `event_logits`."""
        return class_names()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights onto a device, always in float32 whatever `dtype`: the log power needs its range.

        Raises:
            AssetError: If the weights have not been fetched, or are not a checkpoint of this network.
        """
        self.network = loading.build(self.options.weights, device)

    def encode(self, audio: AudioBatch) -> Features:
        """Features of each sound; padding has no part in them.

        Raises:
            CoatkitError: If `load` was not called, or the audio is not at 32,000 Hz.
        """
        network = self._loaded()
        if audio.sample_rate != self.sample_rate:
            raise CoatkitError(f"panns: audio is at {audio.sample_rate} Hz, expected {self.sample_rate} Hz")
        heard = audio.lengths.clamp(min=_SHORTEST)
        lengths = front_end.frame_count(heard) // SEGMENT
        values = audio.samples.new_zeros(len(audio), int(lengths.max()), self.dim, dtype=torch.float32)
        with exact_float32(audio.samples.device):
            for group in _groups(heard.tolist()):
                sounds = []
                for i in group:
                    sound = audio.samples[i, : int(audio.lengths[i])].float()
                    sounds.append(F.pad(sound, (0, max(0, _SHORTEST - len(sound)))))
                for i, features in zip(group, network(sounds), strict=True):
                    values[i, : len(features)] = features
        # Frames are centred at their samples, so the first begins half a hop before the sound does.
        offset = -0.5 * front_end.HOP / self.sample_rate
        return Features(values, lengths, self.frame_rate, offset)

    def event_logits(self, features: Tensor) -> Tensor:
        """g: logits [..., 527] of features [..., 2048], in the order of `labels`; sigmoid gives probabilities.

        Its weights are frozen; gradient flows to `features`.

        Raises:
            CoatkitError: If `load` was not called.
        """
        network = self._loaded()
        with exact_float32(features.device):
            return network.event_logits(features.float())

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`bce`: cross-entropy between g(prediction) and sigmoid(g(target)), in nats per class.

        Its least value is not 0 but the mean entropy of the target's probabilities.

        Raises:
            CoatkitError: If `load` was not called.
        """
        with torch.no_grad():
            probability = torch.sigmoid(self.event_logits(target))
        return {"bce": masked_bce(self.event_logits(predicted), probability, mask)}

    def readout(self, features: Tensor, mask: Tensor) -> Readout:
        """Probabilities of the 527 sound classes, [A, L, 527].

        Raises:
            CoatkitError: If `load` was not called.
        """
        return Readout("sound events", torch.sigmoid(self.event_logits(features)), self.labels, threshold=_PRESENT)

    def fingerprint(self) -> str:
        """Identity of the features: the class and the loaded weights, wherever they came from.

        Raises:
            CoatkitError: If `load` was not called.
        """
        self._loaded()
        return super().fingerprint()

    def _loaded(self) -> Network:
        if self.network is None:
            raise CoatkitError("panns: load() must be called before the expert is used")
        return self.network


def _groups(lengths: list[int]) -> list[list[int]]:
    """Sounds by number, in order, in groups of bounded length in all."""
    groups: list[list[int]] = []
    room = 0.0
    for i, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = _SECONDS_AT_ONCE * front_end.SAMPLE_RATE
        groups[-1].append(i)
        room -= length
    return groups
