"""Rows and sounds to Qwen2-Audio's inputs: its numbered markup, its log-mel, and what it does with long sounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coatkit import AUDIO_TAG, AudioBatch, DataError, HFPreparer, Inputs, Row, ThinkingSpec
from coatkit.backbones import whisper

AUDIO = "<|AUDIO|>"
MARKUP = f"<|audio_bos|>{AUDIO}<|audio_eos|>"
"""What the chat template writes for a sound, after its number."""
FEWEST = 2
"""Audio tokens a sound must give. transformers takes a batch in which no two placeholders are neighbours for text from
before placeholders were expanded and merges it in another way, so a sound of one token is refused in every batch."""
WINDOW = whisper.WINDOW / 16_000
_FOR_TEXT = 500  # positions of the context that a long sound leaves to text


class Qwen2AudioPreparer(HFPreparer):
    """Qwen2-Audio's chat template and log-mel in windows of up to 30 s.

    Args:
        processor: transformers' `Qwen2AudioProcessor`, its tokenizer with the three thinking tokens.
        thinking: The block's settings, or None for no block.
        context: Positions of the language model.
        long_audio: `refuse` sounds of over 30 s, or hear them in `segments`.
    """

    def __init__(self, processor: Any, thinking: ThinkingSpec | None, context: int, long_audio: str) -> None:
        super().__init__(processor.tokenizer, thinking, AUDIO)
        self.extractor = processor.feature_extractor
        self.max_tokens = context
        self.max_seconds = WINDOW
        if long_audio == "segments":
            # The sound is in the context twice, heard and thought about. What remains too long is refused as a row.
            each = self.frame_rate + (self.thinking_rate if thinking is not None else 0)
            self.max_seconds = max(1, int((context - _FOR_TEXT) / each / WINDOW)) * WINDOW

    def audio_tokens(self, samples: int) -> int:
        count = whisper.audio_tokens(samples)
        return count if count >= FEWEST else 0

    def cannot_hear(self, seconds: float) -> str:
        reason = super().cannot_hear(seconds)
        if reason and seconds > WINDOW and self.max_seconds == WINDOW:
            return f"{reason}; with the option long_audio: segments it is heard in pieces of {WINDOW:g} s"
        if reason and seconds < WINDOW:
            return f"{seconds * 1000:.0f} ms is too short: it must be over 60 ms, to give {FEWEST} audio tokens"
        return reason

    def audio_features(self, audio: AudioBatch) -> tuple[dict[str, Tensor], list[int]]:
        mel, counts = whisper.windowed_features(self.extractor, audio)
        features = {"input_features": mel["input_features"], "feature_attention_mask": mel["input_features_mask"]}
        if (given := int(tokens_of(features["feature_attention_mask"]).sum())) != sum(counts):
            raise DataError(
                f"the feature extractor gave log-mel for {given} audio tokens where the sounds have {sum(counts)};"
                " its preprocessor_config.json is not Qwen2-Audio's"
            )
        return features, counts

    def content(self, text: str) -> Any:
        """A message as the model's own template takes it: in parts, so that the template numbers the sounds."""
        before, *rest = text.split(AUDIO_TAG)
        if not rest:
            return text
        parts = [{"type": "text", "text": before}]
        for after in rest:
            parts += [{"type": "audio"}, {"type": "text", "text": after}]
        return [part for part in parts if part.get("text") != ""]

    def prepare(self, rows: Sequence[Row], audio: AudioBatch | None, *, train: bool) -> Inputs:
        owners = [row for row in rows for _ in row.audios]
        for row, seconds in zip(owners, audio.seconds.tolist() if audio is not None else (), strict=False):
            if reason := self.cannot_hear(seconds):
                raise row.fail(reason)
        return super().prepare(rows, audio, train=train)


def tokens_of(mask: Tensor) -> Tensor:
    """[W] audio tokens of windows with log-mel mask [W, T]."""
    return (((mask.sum(-1) - 1) // 2 + 1) // 2).clamp(min=0)
