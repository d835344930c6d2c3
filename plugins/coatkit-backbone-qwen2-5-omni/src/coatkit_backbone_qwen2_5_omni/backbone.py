"""The `qwen2.5-omni` backbone: coatkit's transformers adapter over the stock thinker of Qwen2.5-Omni."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from coatkit import Asset, BackboneOptions, DataError, HFBackbone, HFPreparer, Inputs
from coatkit.backbones.folder import (
    add_thinking_tokens,
    read,
    transformers_quiet,
    weights_folder,
    with_thinking_tokens,
)
from coatkit_backbone_qwen2_5_omni import NAME, WEIGHTS
from coatkit_backbone_qwen2_5_omni.folder import complete_processor, image_tensors, read_parts
from coatkit_backbone_qwen2_5_omni.options import Options
from coatkit_backbone_qwen2_5_omni.preparer import Qwen25OmniPreparer, tokens_of
from coatkit_backbone_qwen2_5_omni.sizes import plan_config
from coatkit_backbone_qwen2_5_omni.tiny import tiny_config, tiny_parts, tiny_tokenizer


class Qwen25Omni(HFBackbone):
    """The thinker of Qwen2.5-Omni; keyword arguments are the fields of `Options`.

    The tower ends in its own projector, `proj`: that is the part `projector`, and the tower's target is what goes into
    it.
    """

    options_type: ClassVar[type[BackboneOptions]] = Options
    model_class: ClassVar[Any] = Qwen2_5OmniThinkerForConditionalGeneration
    default_weights: ClassVar[Asset | None] = WEIGHTS
    published_names: ClassVar[Mapping[str, str]] = {
        "model.language_model": "thinker.model",
        "model.audio_tower": "thinker.audio_tower",
        "lm_head": "thinker.lm_head",
    }
    window_seconds: ClassVar[float] = 2.0
    projector_path: ClassVar[str] = "model.audio_tower.proj"
    tower_output_path: ClassVar[str] = "model.audio_tower.ln_post"
    packs_sounds: ClassVar[bool] = True
    # Position ids of one kind are taken for text alone: rows of one sequence would see each other without a word.
    cannot_pack = "transformers' Qwen2.5-Omni lets packed rows attend to each other"

    def plan_config(self) -> Qwen2_5OmniThinkerConfig:
        if self.options.weights == "default":
            return plan_config()
        if self.options.weights == "random":
            return with_thinking_tokens(tiny_config(), tiny_tokenizer())
        folder = weights_folder(NAME, self.options.weights, WEIGHTS)
        return with_thinking_tokens(read(Qwen2_5OmniThinkerConfig, folder), read(AutoTokenizer, folder))

    def build(self, dtype: torch.dtype) -> tuple[Any, HFPreparer]:
        if self.options.weights == "random":
            model, tokenizer, extractor = tiny_parts(dtype)
        else:
            model, tokenizer, extractor = read_parts(weights_folder(NAME, self.options.weights, WEIGHTS), dtype)
        add_thinking_tokens(tokenizer, model)
        ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        context = model.config.text_config.max_position_embeddings
        return model, Qwen25OmniPreparer(tokenizer, extractor, self.thinking, context)

    def tower_frames(self, output: Any, tokens: dict[str, Tensor]) -> Tensor:
        frames: Tensor = output  # the tower packs its sounds, so there is no padding to take out
        return frames

    def published_config(self) -> Qwen2_5OmniConfig:
        # What speaks was not trained and is not written; stock classes then read the thinker alone.
        parts = {"thinker_config": super().published_config().to_dict(), "enable_audio_output": False}
        with transformers_quiet():  # of a tiny vocabulary, it warns that the published ids are not in it
            config = Qwen2_5OmniConfig(**parts)
        config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
        return config

    def published_parts(self) -> Mapping[str, Tensor]:
        if self.options.weights == "random":
            images = tiny_parts(self.dtype)[0].model.visual.state_dict()
            return {f"thinker.visual.{name}": tensor for name, tensor in images.items()}
        return image_tensors(Path(self.stock.name_or_path))

    def save_processor(self, folder: Path) -> None:
        super().save_processor(folder)
        source = None if self.options.weights == "random" else Path(self.stock.name_or_path)
        complete_processor(folder, source)

    def _adopt(self, stock: Any, first_token: int) -> None:
        # The image encoder is never run: 0.68 B parameters less to hold.
        del stock.model.visual
        super()._adopt(stock, first_token)

    def _choose_what_learns(self, embedding: Any, first_token: int) -> None:
        super()._choose_what_learns(embedding, first_token)
        # No pass uses these two rows, so that they would never get a gradient.
        self.tower.audio_bos_eos_token.requires_grad_(False)

    def _check_placeholders(self, inputs: Inputs) -> None:
        """Check that every feature goes where its sound stands: the model fills placeholders one after the other,
        through all rows, and leaves over what does not fit.

        Raises:
            DataError: If placeholders, sounds and log-mel do not match; names the rows.
        """
        where = (inputs.tokens["input_ids"] == self.preparer.audio_token).cpu()
        expected = torch.zeros_like(where)
        for row, index, count in zip(
            inputs.audio_row.tolist(), inputs.audio_index.cpu(), inputs.audio_lengths.tolist(), strict=True
        ):
            expected[row, index[:count]] = True
        mask = inputs.tokens.get("feature_attention_mask")
        heard = [] if mask is None else tokens_of(mask).tolist()
        if not torch.equal(where, expected) or heard != inputs.audio_lengths.tolist():
            raise DataError(
                f"rows {', '.join(inputs.row_ids)}: {where.sum(1).tolist()} audio placeholders and log-mel for {heard}"
                f" audio tokens, for sounds of {inputs.audio_lengths.tolist()} in rows {inputs.audio_row.tolist()};"
                " prepare them with this backbone's preparer"
            )
