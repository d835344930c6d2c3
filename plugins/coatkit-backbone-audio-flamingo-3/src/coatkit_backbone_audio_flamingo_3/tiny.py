"""The same class in a tiny size with random weights: for tests, and for the option `weights: random`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from coatkit.backbones.tiny import AUDIO, TEXT, byte_tokenizer, tiny_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>")

# What the published template makes of text contents: ChatML with Qwen's short default system prompt.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_config(**text: Any) -> tuple[AudioFlamingo3Config, Any]:
    """Configuration and tokenizer: one embedding row per token and none to spare, as the published model has.

    Args:
        text: Fields of the language model's configuration to change, e.g. `tie_word_embeddings`.
    """
    # The published model's context, which holds 600 s of sound twice.
    sizes = {**TEXT, "max_position_embeddings": 32_768, **text}
    tokenizer = byte_tokenizer(SPECIAL, CHAT_TEMPLATE, eos="<|im_end|>", pad="<|endoftext|>")
    config = AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(**AUDIO),
        text_config=Qwen2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=2, pad_token_id=0, **sizes),
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )
    return config, tokenizer


def tiny_parts(dtype: torch.dtype = torch.float32, **text: Any) -> tuple[Any, Any, Any]:
    """Model, tokenizer and feature extractor, the same on every machine; no file and no network is read.

    Args:
        dtype: Type of the weights.
        text: As of `tiny_config`.
    """
    config, tokenizer = tiny_config(**text)
    model = tiny_model(AudioFlamingo3ForConditionalGeneration, config, dtype)
    return model, tokenizer, WhisperFeatureExtractor(feature_size=128)
