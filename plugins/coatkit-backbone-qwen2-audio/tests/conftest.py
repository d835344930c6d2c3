"""A tiny model folder, the stock model and processor in it, and backbones made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from coatkit import AudioBatch, Inputs, Row, load_backbone
from coatkit.backbones.folder import add_thinking_tokens
from coatkit_backbone_qwen2_audio.tiny import tiny

RATE = 16_000


Prepared = Callable[..., Inputs]


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as transformers saves it, with the three tokens in it already."""
    path = tmp_path_factory.mktemp("stock")
    model, processor = tiny(torch.float32)
    add_thinking_tokens(processor.tokenizer, model)
    louder(model)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def processor(folder: Path) -> Any:
    """transformers' own."""
    return Qwen2AudioProcessor.from_pretrained(folder)


@pytest.fixture(scope="session")
def stock(folder: Path) -> Any:
    """transformers' own model without any of our hooks."""
    return Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


Load = Callable[..., Any]


@pytest.fixture(scope="session")
def load(folder: Path) -> Load:
    def make(**options: Any) -> Any:
        return load_backbone("qwen2-audio", device="cpu", **{"weights": str(folder), **options})

    return make


@pytest.fixture(scope="session")
def backbone(load: Load) -> Any:
    """Shared: no test changes it."""
    found = load()
    found.model.eval()
    return found
