"""The thinker of Qwen2.5-Omni."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.model_executor.models import qwen2_5_omni_thinker as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from coatkit_serve_vllm.thinking import ThinkingDummies, ThinkingInfo, ThinkingModel, ThinkingProcessor, block_of


class Info(ThinkingInfo, stock.Qwen2_5OmniThinkerProcessingInfo):
    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int] | None = None) -> Mapping[str, int]:
        """As the stock one, which takes a sound to have Qwen2-Audio's 30 s at most; room for more came from videos."""
        most = dict(super().get_mm_max_tokens_per_item(seq_len, mm_counts))
        if "audio" in most and block_of(self.ctx.model_config) is not None:
            heard = self.get_feature_extractor()
            frames = heard.chunk_length * heard.sampling_rate // heard.hop_length
            most["audio"] = min(((frames - 1) // 2 + 1) // 2, seq_len)
        return most


class Dummies(ThinkingDummies, stock.Qwen2_5OmniThinkerDummyInputsBuilder): ...


class Processor(ThinkingProcessor, stock.Qwen2_5OmniThinkerMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class ThinkingQwen25Omni(ThinkingModel, stock.Qwen2_5OmniThinkerForConditionalGeneration): ...
