"""The `qwen2-audio` backbone: coatkit's transformers adapter over the stock Qwen2-Audio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
)

from coatkit import Asset, AssetError, BackboneOptions, DataError, HFBackbone, HFPreparer, Inputs, Output
from coatkit.backbones import whisper
from coatkit.backbones.folder import add_thinking_tokens, read, read_model, weights_folder, with_thinking_tokens
from coatkit.backbones.publishing import SIDE_BY_SIDE
from coatkit_backbone_qwen2_audio import NAME, WEIGHTS
from coatkit_backbone_qwen2_audio.options import Options
from coatkit_backbone_qwen2_audio.preparer import AUDIO, MARKUP, Qwen2AudioPreparer, tokens_of
from coatkit_backbone_qwen2_audio.sizes import real_config
from coatkit_backbone_qwen2_audio.tiny import tiny, tiny_config, tiny_processor
from coatkit_backbone_qwen2_audio.tower import allow_short_mel

END = "<|im_end|>"


class Qwen2Audio(HFBackbone):
    """Qwen2-Audio-7B-Instruct; keyword arguments are the fields of `Options`."""

    options_type: ClassVar[type[BackboneOptions]] = Options
    model_class: ClassVar[Any] = Qwen2AudioForConditionalGeneration
    default_weights: ClassVar[Asset | None] = WEIGHTS
    published_names: ClassVar[Mapping[str, str]] = SIDE_BY_SIDE

    def plan_config(self) -> Qwen2AudioConfig:
        if self.options.weights == "default":
            return real_config()
        if self.options.weights == "random":
            return with_thinking_tokens(tiny_config(), tiny_processor().tokenizer)
        folder = weights_folder(NAME, self.options.weights, WEIGHTS)
        return with_thinking_tokens(read(Qwen2AudioConfig, folder), read(Qwen2AudioProcessor, folder).tokenizer)

    def build(self, dtype: torch.dtype) -> tuple[Any, HFPreparer]:
        assert isinstance(self.options, Options)
        if self.options.weights == "random":
            model, processor = tiny(dtype)
        else:
            folder = weights_folder(NAME, self.options.weights, WEIGHTS)
            processor = read(Qwen2AudioProcessor, folder)
            _check(folder, processor, read(Qwen2AudioConfig, folder))
            model = read_model(Qwen2AudioForConditionalGeneration, folder, dtype)
        tokenizer = processor.tokenizer
        tokenizer.chat_template = processor.chat_template
        # The template ends every turn with it, whatever the folder names as the end of a text.
        tokenizer.eos_token = END
        add_thinking_tokens(tokenizer, model)
        # A folder's own generation settings may sample or punish repetition, which greedy decoding must not.
        model.generation_config = GenerationConfig(
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
        )
        allow_short_mel(model.model.audio_tower)
        context = model.config.text_config.max_position_embeddings
        return model, Qwen2AudioPreparer(processor, self.thinking, context, self.options.long_audio)

    def tower_frames(self, output: Any, tokens: dict[str, Tensor]) -> Tensor:
        return whisper.valid_frames(output, tokens["feature_attention_mask"])

    def processor(self, chat_template: str) -> Qwen2AudioProcessor:
        return Qwen2AudioProcessor(self.preparer.extractor, self.preparer.tokenizer, chat_template=chat_template)

    def forward(self, inputs: Inputs) -> Output:
        self._check_placeholders(inputs)
        return super().forward(inputs)

    def generate(self, inputs: Inputs, *, max_new_tokens: int = 64, **options: Any) -> list[str]:
        self._check_placeholders(inputs)
        return super().generate(inputs, max_new_tokens=max_new_tokens, **options)

    def _check_placeholders(self, inputs: Inputs) -> None:
        """Refuse what the model would scatter wrongly, or merge in the way of its first version.

        Raises:
            DataError: If the placeholders do not match the sounds or the log-mel; names the rows.
        """
        here = (inputs.tokens["input_ids"] == self.preparer.audio_token).cpu()
        mask = inputs.tokens.get("feature_attention_mask")
        features = 0 if mask is None else int(tokens_of(mask).sum())
        expected = torch.zeros(len(here), dtype=torch.long)
        expected.index_add_(0, inputs.audio_row.cpu(), inputs.audio_lengths.cpu())
        if not torch.equal(here.sum(1), expected) or features != int(expected.sum()):
            raise DataError(
                f"rows {', '.join(inputs.row_ids)}: {here.sum(1).tolist()} audio placeholders for sounds of"
                f" {expected.tolist()} audio tokens and log-mel for {features};"
                " prepare them with this backbone's preparer"
            )
        if features and not bool((here[:, 1:] & here[:, :-1]).any()):
            raise DataError(
                f"rows {', '.join(inputs.row_ids)}: no two audio placeholders are neighbours, which the model takes for"
                " placeholders that are still to be expanded; every sound must give two audio tokens or more"
            )


def _check(folder: Path, processor: Any, config: Any) -> None:
    """Check that tokenizer, chat template and feature extractor are this model's.

    Raises:
        AssetError: If they are not; says which.
    """
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    remedy = "  Give a complete Qwen2-Audio folder as `weights`, or fetch the default again."
    known = tokenizer.get_vocab()
    if known.get(AUDIO) != config.audio_token_id or END not in known or tokenizer.pad_token is None:
        raise AssetError(
            f"{folder}: its tokenizer has {AUDIO} at {known.get(AUDIO)} where config.json says {config.audio_token_id},"
            f" or it has no {END} or no padding token.\n{remedy}"
        )
    mels, bins = extractor.feature_size, config.audio_config.num_mel_bins
    if (mels, extractor.sampling_rate, extractor.hop_length) != (bins, 16_000, whisper.HOP):
        raise AssetError(
            f"{folder}: its feature extractor gives {mels} mel bins of {extractor.sampling_rate} Hz audio, every"
            f" {extractor.hop_length} samples; the model hears {bins} bins of 16000 Hz, every {whisper.HOP}.\n{remedy}"
        )
    talk = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What?"}]}]
    try:
        text = tokenizer.apply_chat_template(talk, chat_template=processor.chat_template, tokenize=False)
    except Exception as error:  # a damaged template can fail in any way
        raise AssetError(f"{folder}: its chat template cannot be used: {error}.\n{remedy}") from error
    if text.count(MARKUP) != 1 or not text.rstrip().endswith(END):
        raise AssetError(f"{folder}: its chat template does not write a sound as {MARKUP} and end in {END}.\n{remedy}")
