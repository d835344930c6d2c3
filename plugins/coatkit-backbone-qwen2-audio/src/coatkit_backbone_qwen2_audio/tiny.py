"""The same classes in a tiny size with random weights: for tests, and for the option `weights: random`."""

from __future__ import annotations

import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from coatkit.backbones.tiny import AUDIO, TEXT, byte_tokenizer, tiny_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
"""The real tokenizer's special tokens, in its order."""


def tiny_config() -> Qwen2AudioConfig:
    """Two layers of width 64 (head width 32), an encoder of one layer of width 32, one token for each byte."""
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **AUDIO},
        text_config={"model_type": "qwen2", "vocab_size": len(SPECIAL) + 256, **TEXT},
        audio_token_index=SPECIAL.index("<|AUDIO|>"),
    )


def tiny_processor() -> Qwen2AudioProcessor:
    """The stock processor with its own chat template and log-mel; only the tokenizer is made here."""
    tokenizer = byte_tokenizer(SPECIAL, "", eos="<|im_end|>", pad="<|endoftext|>")
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer)


def tiny(dtype: torch.dtype) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    """Model and processor; needs no asset and no network."""
    return tiny_model(Qwen2AudioForConditionalGeneration, tiny_config(), dtype), tiny_processor()
