"""The `mini` backbone: coatkit's transformers adapter over the weights folder this package makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor

from coatkit import AudioBatch, BackboneOptions, HFBackbone, HFPreparer, PluginError, ThinkingSpec
from coatkit.backbones import whisper
from coatkit.backbones.publishing import SIDE_BY_SIDE
from coatkit_backbone_mini.convert import prepare_weights
from coatkit_backbone_mini.loading import load_model, load_processor
from coatkit_backbone_mini.options import Options
from coatkit_backbone_mini.projector import replaces_projector, start_projector
from coatkit_backbone_mini.sizes import real_config
from coatkit_backbone_mini.tokens import SOUND


class MiniPreparer(HFPreparer):
    """SmolLM2's chat template and Whisper's log-mel in 30 s windows; any length up to the language model's context."""

    # 8192 positions hold the sound twice (heard and thought about) and leave 500 for text.
    max_seconds = 150.0
    max_tokens = 8192

    def __init__(self, tokenizer: Any, extractor: Any, thinking: ThinkingSpec | None) -> None:
        super().__init__(tokenizer, thinking, SOUND)
        self.extractor = extractor

    def audio_tokens(self, samples: int) -> int:
        return whisper.audio_tokens(samples)

    def audio_features(self, audio: AudioBatch) -> tuple[dict[str, Tensor], list[int]]:
        return whisper.windowed_features(self.extractor, audio)


class MiniBackbone(HFBackbone):
    """Whisper tiny.en and SmolLM2-135M-Instruct; keyword arguments are the fields of `Options`."""

    options_type: ClassVar[type[BackboneOptions]] = Options
    model_class: ClassVar[Any] = AudioFlamingo3ForConditionalGeneration
    published_names: ClassVar[Mapping[str, str]] = SIDE_BY_SIDE

    def plan_config(self) -> AudioFlamingo3Config:
        assert isinstance(self.options, Options)
        if self.options.weights == "default":
            return real_config()
        return AudioFlamingo3Config.from_pretrained(prepare_weights(self.options))

    def build(self, dtype: torch.dtype) -> tuple[Any, HFPreparer]:
        assert isinstance(self.options, Options)
        folder = prepare_weights(self.options)
        model = load_model(folder, dtype)
        start_projector(model.model.multi_modal_projector, self.options)
        whisper.allow_short_windows(model.model.audio_tower)
        return model, MiniPreparer(*load_processor(folder), self.thinking)

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        assert isinstance(self.options, Options)
        if self.options.train.projector != "full" and replaces_projector(self.options):
            raise PluginError(
                f"projector: {self.options.projector} is in no folder that an adapter could name as its base; "
                "export the whole model with --merge"
            )
        super().save_adapter(folder, base_model)

    def tower_frames(self, output: Any, tokens: dict[str, Tensor]) -> Tensor:
        return whisper.valid_frames(output, tokens["input_features_mask"])

    def processor(self, chat_template: str) -> AudioFlamingo3Processor:
        return AudioFlamingo3Processor(
            self.preparer.extractor,
            self.preparer.tokenizer,
            chat_template=chat_template,
            max_audio_len=int(self.preparer.max_seconds),
        )
