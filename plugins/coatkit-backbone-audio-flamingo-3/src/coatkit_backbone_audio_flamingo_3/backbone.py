"""The `audio-flamingo-3` backbone: coatkit's transformers adapter over the stock class and its published folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    AutoTokenizer,
    GenerationConfig,
    WhisperFeatureExtractor,
)

from coatkit import Asset, AssetError, AudioBatch, BackboneOptions, HFBackbone, HFPreparer, ThinkingSpec
from coatkit.backbones import whisper
from coatkit.backbones.folder import add_thinking_tokens, read, read_model, weights_folder, with_thinking_tokens
from coatkit.backbones.publishing import SIDE_BY_SIDE
from coatkit_backbone_audio_flamingo_3 import NAME, WEIGHTS
from coatkit_backbone_audio_flamingo_3.options import Options
from coatkit_backbone_audio_flamingo_3.sizes import plan_config
from coatkit_backbone_audio_flamingo_3.tiny import tiny_config, tiny_parts

SOUND, TURN_END, TEXT_END = "<sound>", "<|im_end|>", "<|endoftext|>"


class AudioFlamingo3Preparer(HFPreparer):
    """ChatML, and Whisper's log-mel in 30 s windows; a sound of up to 600 s, as the stock processor takes.

    Args:
        tokenizer: With `<sound>` and the three thinking tokens.
        extractor: The folder's feature extractor, 128 mel bins.
        thinking: The block's settings, or None for no block.
        context: Positions of the language model, tokens.
    """

    # The stock processor cuts what is beyond its 20 windows; here it is refused.
    max_seconds = 600.0

    def __init__(self, tokenizer: Any, extractor: Any, thinking: ThinkingSpec | None, context: int) -> None:
        super().__init__(tokenizer, thinking, SOUND)
        self.extractor = extractor
        self.max_tokens = context

    def audio_tokens(self, samples: int) -> int:
        return whisper.audio_tokens(samples)

    def audio_features(self, audio: AudioBatch) -> tuple[dict[str, Tensor], list[int]]:
        return whisper.windowed_features(self.extractor, audio)


class AudioFlamingo3(HFBackbone):
    """Audio Flamingo 3; keyword arguments are the fields of `Options`."""

    options_type: ClassVar[type[BackboneOptions]] = Options
    model_class: ClassVar[Any] = AudioFlamingo3ForConditionalGeneration
    default_weights: ClassVar[Asset | None] = WEIGHTS
    published_names: ClassVar[Mapping[str, str]] = SIDE_BY_SIDE

    def build(self, dtype: torch.dtype) -> tuple[Any, HFPreparer]:
        if self.options.weights == "random":
            model, tokenizer, extractor = tiny_parts(dtype)
        else:
            folder = weights_folder(NAME, self.options.weights, WEIGHTS)
            tokenizer, extractor = read(AutoTokenizer, folder), read(WhisperFeatureExtractor, folder)
            model = read_model(self.model_class, folder, dtype)
            check_tokens(folder, tokenizer, model)
        add_thinking_tokens(tokenizer, model)
        whisper.allow_short_windows(model.model.audio_tower)
        # Only the ends of an answer are kept: a folder's repetition penalty would act on greedy decoding too.
        ends = [tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, TEXT_END)]
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        context = model.config.text_config.max_position_embeddings
        return model, AudioFlamingo3Preparer(tokenizer, extractor, self.thinking, context)

    def plan_config(self) -> Any:
        if self.options.weights == "default":
            return plan_config()
        if self.options.weights == "random":
            config, tokenizer = tiny_config()
            return with_thinking_tokens(config, tokenizer)
        folder = weights_folder(NAME, self.options.weights, WEIGHTS)
        return with_thinking_tokens(read(AudioFlamingo3Config, folder), read(AutoTokenizer, folder))

    def tower_frames(self, output: Any, tokens: dict[str, Tensor]) -> Tensor:
        return whisper.valid_frames(output, tokens["input_features_mask"])

    def processor(self, chat_template: str) -> AudioFlamingo3Processor:
        return AudioFlamingo3Processor(
            self.preparer.extractor,
            self.preparer.tokenizer,
            chat_template=chat_template,
            max_audio_len=int(self.preparer.max_seconds),
        )


def check_tokens(folder: Path, tokenizer: Any, model: Any) -> None:
    """Check that a folder's tokenizer is that of its model, and let `<|im_end|>` end an answer.

    Raises:
        AssetError: If a token is missing, or the placeholder has another id than the model's.
    """
    remedy = "  Give the tokenizer that belongs to these weights, or fetch them again."
    known = tokenizer.get_vocab()
    if absent := [token for token in (SOUND, TURN_END, TEXT_END) if token not in known]:
        raise AssetError(f"{folder}: its tokenizer has no {', '.join(absent)}.\n{remedy}")
    if (wanted := model.config.audio_token_id) != known[SOUND]:
        raise AssetError(
            f"{folder}: {SOUND} is token {known[SOUND]} in its tokenizer and audio_token_id {wanted} in its"
            f" config.json.\n{remedy}"
        )
    if tokenizer.chat_template is None:
        raise AssetError(f"{folder}: its tokenizer has no chat template (chat_template.jinja).\n{remedy}")
    tokenizer.eos_token = TURN_END
    if tokenizer.pad_token is None:
        tokenizer.pad_token = TEXT_END
