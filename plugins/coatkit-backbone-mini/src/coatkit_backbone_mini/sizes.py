"""The sizes of the default weights, for planning without them."""

from __future__ import annotations

from transformers import AudioFlamingo3Config


def real_config() -> AudioFlamingo3Config:
    """SmolLM2-135M with four tokens more, and Whisper tiny.en's encoder: 171,593,664 parameters."""
    return AudioFlamingo3Config(
        audio_config={
            "model_type": "audioflamingo3_encoder",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 6,
            "num_hidden_layers": 4,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "vocab_size": 49_156,
        },
        audio_token_id=49_152,
    )
