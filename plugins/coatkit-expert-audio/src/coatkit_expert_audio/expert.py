"""The reconstruction expert: the thinking states must hold what the backbone heard (paper section 3)."""

from __future__ import annotations

from typing import Literal

import torch

from coatkit import AudioBatch, Backbone, Expert, Features


class AudioFeatures(Expert):
    """The backbone's audio features at its own rate; no second pass through the audio tower is made.

    Args:
        target: `consumed` (the embeddings at the audio placeholders) or `tower` (the tower's output before the
            projector). A projector that learns moves `consumed` as training goes; `tower` stays put.
    """

    uses_backbone = True

    def __init__(self, target: Literal["consumed", "tower"] = "consumed") -> None:
        self.target = target
        self.source = ""

    def bind(self, backbone: Backbone) -> None:
        self.sample_rate = backbone.preparer.sample_rate
        self.frame_rate = backbone.preparer.frame_rate
        if self.target not in backbone.audio_dims:
            raise ValueError(
                f"target {self.target!r} is not offered by this backbone, only {list(backbone.audio_dims)}"
            )
        self.dim = backbone.audio_dims[self.target]
        self.source = backbone.fingerprint()

    def encode(self, audio: AudioBatch) -> Features:
        heard = audio.backbone
        if heard is None:
            raise ValueError("the audio expert needs AudioBatch.backbone, which a backbone's forward fills")
        values = heard.consumed if self.target == "consumed" else heard.tower
        if values is None:
            raise ValueError("this backbone did not capture its audio tower's output")
        return Features(values.to(torch.float32), heard.lengths, heard.frame_rate)
