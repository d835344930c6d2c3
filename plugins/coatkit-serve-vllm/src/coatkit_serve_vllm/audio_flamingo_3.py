"""Audio Flamingo 3, and coatkit's default backbone, which is the same class over a Llama."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models import audioflamingo3 as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from coatkit_serve_vllm.thinking import ThinkingDummies, ThinkingModel, ThinkingProcessor


class Dummies(ThinkingDummies, stock.AudioFlamingo3DummyInputsBuilder): ...


class Processor(ThinkingProcessor, stock.AudioFlamingo3MultiModalProcessor):
    def longest(self) -> float:
        return float(self.info.get_hf_processor().max_audio_len)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=stock.AudioFlamingo3ProcessingInfo, dummy_inputs=Dummies)
class ThinkingAudioFlamingo3(ThinkingModel, stock.AudioFlamingo3ForConditionalGeneration):
    """The stock model; its language model is vLLM's Qwen2, which a Llama is when its biases are zero."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(_with_biases(weights, self.config.text_config))
        return loaded


def _with_biases(weights: Iterable[tuple[str, torch.Tensor]], text: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, with a bias of zero behind each projection that has none in a Llama and one in a Qwen2."""
    bare = ("q_proj.weight", "k_proj.weight", "v_proj.weight") if text.model_type == "llama" else ()
    for name, tensor in weights:
        yield name, tensor
        if name.startswith("language_model.") and name.endswith(bare):
            yield name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0])
