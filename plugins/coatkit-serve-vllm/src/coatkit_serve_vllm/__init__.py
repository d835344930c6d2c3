"""vLLM finds `register` by its entry point and calls it in every process; models are imported when one is served."""

from __future__ import annotations

MODELS = {
    "AudioFlamingo3ForConditionalGeneration": "coatkit_serve_vllm.audio_flamingo_3:ThinkingAudioFlamingo3",
    "Qwen2AudioForConditionalGeneration": "coatkit_serve_vllm.qwen2_audio:ThinkingQwen2Audio",
    "Qwen2_5OmniModel": "coatkit_serve_vllm.qwen2_5_omni:ThinkingQwen25Omni",
    "Qwen2_5OmniForConditionalGeneration": "coatkit_serve_vllm.qwen2_5_omni:ThinkingQwen25Omni",
}
"""Stock architectures, and what takes their place; a folder without a coatkit.json is served as by the stock one."""


def register() -> None:
    """Put the thinking models in the place of the stock ones of the same architecture."""
    from vllm import ModelRegistry

    from coatkit_serve_vllm.sounds import refuse_damaged

    refuse_damaged()
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)
