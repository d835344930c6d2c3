"""The thinker of Qwen2.5-Omni."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_5_omni_thinker as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from coatkit_serve_vllm.thinking import ThinkingDummies, ThinkingInfo, ThinkingModel, ThinkingProcessor


class Info(ThinkingInfo, stock.Qwen2_5OmniThinkerProcessingInfo): ...


class Dummies(ThinkingDummies, stock.Qwen2_5OmniThinkerDummyInputsBuilder): ...


class Processor(ThinkingProcessor, stock.Qwen2_5OmniThinkerMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class ThinkingQwen25Omni(ThinkingModel, stock.Qwen2_5OmniThinkerForConditionalGeneration): ...
