"""What turns a stock model of vLLM into one that thinks: mixins for its processor, dummy inputs and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from coatkit_serve_vllm.block import Block, Sound, expand

SIDE_FILE = "coatkit.json"


@lru_cache(maxsize=8)
def _facts(model: str, revision: str | None) -> dict[str, Any] | None:
    found: dict[str, Any] | None = get_hf_file_to_dict(SIDE_FILE, model, revision)
    return found


def block_of(model_config: Any) -> Block | None:
    """The thinking block of the model that is served; None for a stock model, which is left as it is."""
    facts = _facts(str(model_config.model), model_config.revision)
    if facts is None:
        return None
    return Block.read(facts, cached_tokenizer_from_config(model_config).get_vocab())


class ThinkingInfo:
    """Of a `BaseProcessingInfo`: a run was trained on sound and text, and takes nothing else.

    Where a model also sees, vLLM would measure memory with an image when it starts, and refuses one by this limit.
    """

    ctx: Any

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        if block_of(self.ctx.model_config) is None:
            return limits
        return {kind: most for kind, most in limits.items() if kind == "audio"}


class ThinkingDummies:
    """Of a `BaseDummyInputsBuilder`: the prompt that memory is measured with has its block too."""

    info: Any

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        text: str = super().get_dummy_text(mm_counts)  # type: ignore[misc]
        facts = _facts(str(self.info.ctx.model_config.model), self.info.ctx.model_config.revision)
        if facts is None or facts["thinking"] is None or not mm_counts.get("audio"):
            return text
        return text + "".join(facts["thinking"][part] for part in ("start", "think", "end"))


class ThinkingProcessor:
    """Of a `BaseMultiModalProcessor`: when sounds have been expanded, their blocks are."""

    info: Any

    def longest(self) -> float:
        """Seconds of the longest sound that is heard in full; the stock front end cuts what is beyond."""
        return float(self.info.get_feature_extractor().chunk_length)

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        ids, found = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        block = block_of(self.info.ctx.model_config)
        if block is None:
            return ids, found
        self._refuse_long(mm_items)
        places = found.get("audio", [])
        sounds = [
            Sound(p.start_idx, p.length, p.length if p.is_embed is None else int(p.is_embed.sum())) for p in places
        ]
        ids, starts = expand(ids, sounds, block)
        moved = [replace(place, start_idx=start) for place, start in zip(places, starts, strict=True)]
        return ids, {**found, **({"audio": moved} if moved else {})}

    def _refuse_long(self, mm_items: Any) -> None:
        """Refuse a sound that would be cut.

        Raises:
            ValueError: Naming both lengths.
        """
        if "audio" not in mm_items or not hasattr(mm_items["audio"], "get_audio_length"):  # ready embeddings
            return
        longest, rate = self.longest(), self.info.get_feature_extractor().sampling_rate
        for number in range(mm_items["audio"].get_count()):
            if mm_items["audio"].get(number) is None:  # seen before, and told by its name alone
                continue
            seconds = mm_items["audio"].get_audio_length(number) / rate
            if seconds > longest:
                raise ValueError(f"a sound of {seconds:.2f} s is too long: this model hears up to {longest:g} s")


class ThinkingModel:
    """Of a model: the block's tokens, whose output rows are untrained, are never generated."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        block = block_of(vllm_config.model_config)
        self._never = None if block is None else torch.tensor(block.never)

    def compute_logits(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if logits is not None and self._never is not None:
            if self._never.device != logits.device:
                self._never = self._never.to(logits.device)
            logits.index_fill_(-1, self._never, float("-inf"))
        return logits
