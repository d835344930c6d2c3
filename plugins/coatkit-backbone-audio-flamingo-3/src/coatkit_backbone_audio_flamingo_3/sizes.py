"""The configuration of the published 7B model, for planning without weights."""

from __future__ import annotations

from typing import Any


def plan_config() -> Any:
    """The stock configuration in its real size: `AudioFlamingo3ForConditionalGeneration` builds on the meta device.

    The language model's values are those that transformers' own conversion script wrote for the published folder; the
    encoder's are the defaults of `AudioFlamingo3EncoderConfig`, which that script took too. Neither was read from the
    published `config.json`, which could not be reached.
    """
    from transformers import AudioFlamingo3Config, AudioFlamingo3EncoderConfig, Qwen2Config

    text = Qwen2Config(
        vocab_size=151_672,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=151_643,
        eos_token_id=151_645,
    )
    audio = AudioFlamingo3EncoderConfig(
        num_mel_bins=128,
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        intermediate_size=5120,
        max_source_positions=1500,
    )
    return AudioFlamingo3Config(audio_config=audio, text_config=text, audio_token_id=151_669)
