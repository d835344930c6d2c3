"""The same classes in a tiny size with random weights: for tests, and for the option `weights: random`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor

from coatkit.backbones.tiny import AUDIO, TEXT, byte_tokenizer, tiny_model

CONTEXT = 32_768
"""Positions of the language model, as many as the real one has: 300 s of sound and its block fit."""
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
)
"""Special tokens of the real tokenizer, in its order."""

# In the shape of the real template: turns, a default system prompt, and a content that is a text or a list of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_config() -> Qwen2_5OmniThinkerConfig:
    """Two layers of width 64 (head width 32), an encoder of one layer of width 32, one token for each byte."""
    return Qwen2_5OmniThinkerConfig(
        audio_config={"model_type": "qwen2_5_omni_audio_encoder", **AUDIO, "output_dim": TEXT["hidden_size"]},
        # The image encoder is there because the class has one; it is as small as it can be.
        vision_config={
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [0],
        },
        text_config={
            "model_type": "qwen2_5_omni_text",
            **TEXT,
            "vocab_size": len(SPECIAL) + 256,
            "max_position_embeddings": CONTEXT,
            # Half a head's width in all, shared out as in the real model: 16, 24, 24 of 64.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
        },
        audio_token_index=SPECIAL.index("<|AUDIO|>"),
        audio_start_token_id=SPECIAL.index("<|audio_bos|>"),
        audio_end_token_id=SPECIAL.index("<|audio_eos|>"),
        image_token_index=SPECIAL.index("<|IMAGE|>"),
        video_token_index=SPECIAL.index("<|VIDEO|>"),
        # Not among the class's fields, but its positions are computed with it; the published file has it.
        vision_start_token_id=SPECIAL.index("<|vision_bos|>"),
    )


def tiny_tokenizer() -> Any:
    """One token for each byte, the real special tokens and a chat template in the shape of the real one."""
    names = {f"{name}_token": f"<|{name.upper()}|>" for name in ("image", "audio", "video")}
    names |= {f"{name}_token": f"<|{name}|>" for name in ("audio_bos", "audio_eos", "vision_bos", "vision_eos")}
    return byte_tokenizer(SPECIAL, CHAT_TEMPLATE, eos="<|im_end|>", pad="<|endoftext|>", context=CONTEXT, named=names)


def tiny_parts(dtype: torch.dtype) -> tuple[Qwen2_5OmniThinkerForConditionalGeneration, Any, WhisperFeatureExtractor]:
    """Model, tokenizer and the real model's feature extractor; needs no asset and no network."""
    extractor = WhisperFeatureExtractor(feature_size=AUDIO["num_mel_bins"], chunk_length=300)
    return tiny_model(Qwen2_5OmniThinkerForConditionalGeneration, tiny_config(), dtype), tiny_tokenizer(), extractor
