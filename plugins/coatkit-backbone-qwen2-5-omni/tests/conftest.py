"""A tiny whole Qwen2.5-Omni in a folder, transformers' own thinker from it, and backbones made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from coatkit import AudioBatch, Inputs, Row, load_backbone
from coatkit.backbones.folder import add_thinking_tokens, transformers_quiet
from coatkit.backbones.tiny import tiny_model
from coatkit_backbone_qwen2_5_omni.tiny import tiny_parts

RATE = 16_000
Prepared = Callable[..., Inputs]
Load = Callable[..., Any]


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    """Inputs of a backbone for rows and their sounds, [N] each."""

    def make(backbone: Any, rows: list[Row], sounds: list[np.ndarray], *, train: bool = True) -> Inputs:
        batch = AudioBatch.from_arrays(sounds, RATE) if sounds else None
        inputs: Inputs = backbone.preparer.prepare(rows, batch, train=train)
        return inputs

    return make


def louder(model: Any) -> None:
    """Give layers the gain of trained ones: at a random start every prompt has nearly the same answer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(0.8 / (float(parameter.std()) * parameter[0].numel() ** 0.5))


def whole(thinker: Any) -> Any:
    """The model with speech output around a thinker, as the published repository holds it, and tiny."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    channels = {"enc_channels": [16, 16, 16, 16, 48], "enc_emb_dim": 16, "enc_dim": 16, "enc_attention_channels": 8}
    config = Qwen2_5OmniConfig(
        thinker_config=thinker.config.to_dict(),
        talker_config={**sizes, "intermediate_size": 32, "num_key_value_heads": 1, "vocab_size": 64,
                       "embedding_size": thinker.config.text_config.hidden_size, "rope_parameters": rope},
        token2wav_config={
            "dit_config": {**sizes, **channels, "ff_mult": 1, "emb_dim": 16, "num_embeds": 20, "mel_dim": 8,
                           "look_ahead_layers": [0], "look_backward_layers": [0]},
            "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3],
                               "resblock_dilation_sizes": [[1, 3, 5]], "upsample_rates": [2],
                               "upsample_kernel_sizes": [4]},
        },
    )  # fmt: skip
    model = tiny_model(Qwen2_5OmniForConditionalGeneration, config)
    model.thinker = thinker
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model as transformers saves it, in the keys of the published one, with the three tokens in it."""
    path = tmp_path_factory.mktemp("whole")
    thinker, tokenizer, extractor = tiny_parts(torch.float32)
    add_thinking_tokens(tokenizer, thinker)
    louder(thinker)
    with transformers_quiet():
        for part in (whole(thinker), tokenizer, extractor):
            part.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def stock(folder: Path) -> Any:
    """transformers' own thinker, with its image encoder and without any of our hooks."""
    with transformers_quiet():
        return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def load(folder: Path) -> Load:
    def make(**options: Any) -> Any:
        return load_backbone("qwen2.5-omni", device="cpu", **{"weights": str(folder), **options})

    return make


@pytest.fixture(scope="session")
def backbone(load: Load) -> Any:
    """Shared: no test changes it."""
    found = load()
    found.model.eval()
    return found
