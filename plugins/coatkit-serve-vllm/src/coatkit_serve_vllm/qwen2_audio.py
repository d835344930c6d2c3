"""Qwen2-Audio."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_audio as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from coatkit_serve_vllm.thinking import ThinkingDummies, ThinkingModel, ThinkingProcessor


class Dummies(ThinkingDummies, stock.Qwen2AudioDummyInputsBuilder): ...


class Processor(ThinkingProcessor, stock.Qwen2AudioMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(Processor, info=stock.Qwen2AudioProcessingInfo, dummy_inputs=Dummies)
class ThinkingQwen2Audio(ThinkingModel, stock.Qwen2AudioForConditionalGeneration): ...
