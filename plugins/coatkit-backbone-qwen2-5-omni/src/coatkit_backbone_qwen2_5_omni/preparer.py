"""Rows and sounds to Qwen2.5-Omni's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coatkit import AudioBatch, DataError, HFPreparer, ThinkingSpec
from coatkit.backbones import whisper

AUDIO = "<|AUDIO|>"
MARKUP = f"<|audio_bos|>{AUDIO}<|audio_eos|>"
"""What the chat template writes for a sound."""


class Qwen25OmniPreparer(HFPreparer):
    """Qwen2.5-Omni's chat template, and one log-mel for each sound, whatever its length.

    Args:
        tokenizer: With `<|AUDIO|>` and the three thinking tokens.
        extractor: The model's feature extractor; its longest sound, 300 s, is the longest heard.
        thinking: The block's settings, or None for no block.
        context: Positions of the language model, tokens.
    """

    def __init__(self, tokenizer: Any, extractor: Any, thinking: ThinkingSpec | None, context: int) -> None:
        super().__init__(tokenizer, thinking, AUDIO, MARKUP)
        self.extractor = extractor
        # The stock processor cuts what is beyond; here it is refused.
        self.max_seconds = extractor.n_samples / self.sample_rate
        self.max_tokens = context

    def audio_tokens(self, samples: int) -> int:
        # As one of Whisper's windows, but without an end at 30 s: the tower's blocks of 2 s have whole tokens.
        return whisper.window_tokens(samples)

    def audio_features(self, audio: AudioBatch) -> tuple[dict[str, Tensor], list[int]]:
        lengths = audio.lengths.tolist()
        counts = [self.audio_tokens(length) for length in lengths]
        frames = -(-max(lengths) // whisper.HOP)
        # Two frames past the end still hear the sound and count in its normalisation; what is beyond is silence, of
        # which the stock processor computes up to 300 s.
        out = self.extractor(
            [samples[:length].numpy() for samples, length in zip(audio.samples, lengths, strict=True)],
            sampling_rate=audio.sample_rate,
            padding="max_length",
            max_length=(frames + 2) * whisper.HOP,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = out["attention_mask"][:, :frames]
        if (given := tokens_of(mask).tolist()) != counts:
            raise DataError(
                f"the feature extractor gave log-mel for {given} audio tokens where the sounds have {counts};"
                " its preprocessor_config.json is not Qwen2.5-Omni's"
            )
        return {"input_features": out["input_features"][..., :frames], "feature_attention_mask": mask}, counts


def tokens_of(mask: Tensor) -> Tensor:
    """[A] audio tokens that the tower makes of sounds with log-mel mask [A, T]."""
    return torch.div(torch.div(mask.sum(-1) - 1, 2, rounding_mode="floor") + 1, 2, rounding_mode="floor").clamp(min=0)
