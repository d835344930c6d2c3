"""The real thinker's configuration, for planning without its weights."""

from __future__ import annotations

from transformers import Qwen2_5OmniThinkerConfig


def plan_config() -> Qwen2_5OmniThinkerConfig:
    """The thinker of Qwen2.5-Omni-7B: 8,931,813,888 parameters with its image encoder, 8,255,263,744 without.

    Every value is spelt out. transformers' defaults are another model: an image encoder of width 3584, where the real
    one has 1280.
    """
    return Qwen2_5OmniThinkerConfig(
        audio_config={
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "output_dim": 3584,
            "n_window": 100,
            "scale_embedding": False,
            "activation_function": "gelu",
            "max_source_positions": 1500,
        },
        vision_config={
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "model_type": "qwen2_5_omni_text",
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
        audio_token_index=151_646,
        audio_start_token_id=151_647,
        audio_end_token_id=151_648,
        image_token_index=151_655,
        video_token_index=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
    )
