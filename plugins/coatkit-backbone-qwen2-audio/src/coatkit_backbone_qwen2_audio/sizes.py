"""The real model's configuration, for planning without its weights."""

from __future__ import annotations

from transformers import Qwen2AudioConfig


def real_config() -> Qwen2AudioConfig:
    """Qwen2-Audio-7B-Instruct: 8,397,094,912 parameters.

    The values are those of the published config.json; what it leaves out (`hidden_size` 4096, 32 layers, 32 heads, 32
    key and value heads) are the defaults of transformers' `Qwen2Config`, spelt out here so that they stay.
    """
    return Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "scale_embedding": False,
            "activation_function": "gelu",
            "max_source_positions": 1500,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 156_032,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "sliding_window": 32_768,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
        },
        audio_token_index=151_646,
    )
