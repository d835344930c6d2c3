"""What the backbone is put together from, whichever source it was read from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AudioFlamingo3EncoderConfig, LlamaConfig, PreTrainedTokenizerBase, WhisperFeatureExtractor

WINDOW = 30
"""Seconds of audio in one window of the Whisper encoder."""


@dataclass(frozen=True)
class Parts:
    """A language model and an audio encoder, not yet joined.

    Args:
        tokenizer: The language model's, as its source has it (without this package's added tokens).
        text_config: Configuration of the language model.
        text_state: State dictionary of its `LlamaModel`.
        output_rows: Output embeddings, [vocabulary, hidden]; may be the very tensor of the input embeddings.
        audio_config: Configuration of the encoder.
        audio_state: State dictionary of the Whisper encoder.
    """

    tokenizer: PreTrainedTokenizerBase
    text_config: LlamaConfig
    text_state: dict[str, torch.Tensor]
    output_rows: torch.Tensor
    audio_config: AudioFlamingo3EncoderConfig
    audio_state: dict[str, torch.Tensor]


def feature_extractor(mel_bins: int) -> WhisperFeatureExtractor:
    """Whisper's log-mel features of 16 kHz audio in windows of 30 s: [mel_bins, 3000] at 100 Hz.

    Callers ask for the mask in each call, `return_attention_mask=True`. Set here instead, transformers 5.23 returns it
    by sample and not by frame, which passes for a full window without an error.
    """
    return WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=WINDOW)
