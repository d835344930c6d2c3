"""Rows, sounds, and a stock model with the same weights as the tiny backbone but none of coatkit's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coatkit import AudioBatch, AudioRef, Row, load_backbone
from coatkit.backbones.folder import add_thinking_tokens
from coatkit.data.rows import Message
from coatkit_backbone_audio_flamingo_3.tiny import tiny_parts

RATE = 16_000
Sound = Callable[..., np.ndarray]
MakeRow = Callable[..., Row]
Load = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COATKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield


def sound_of(seconds: float, seed: int = 0) -> np.ndarray:
    """A decaying tone in noise, [N] float32."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * random.uniform(150, 1500) * time) * np.exp(-time)
    return (tone + 0.05 * random.normal(size=time.size)).astype(np.float32)


@pytest.fixture(scope="session")
def sound() -> Sound:
    return sound_of


def row_of(*turns: str, name: str = "row") -> Row:
    """User and assistant in turn; every `<audio>` tag stands for a sound."""
    messages = tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns))
    sounds = sum(turn.count("<audio>") for turn in turns)
    return Row(name, messages, tuple(AudioRef(Path(f"{i}.wav")) for i in range(sounds)), f"data.jsonl:{name}")


@pytest.fixture(scope="session")
def row() -> MakeRow:
    return row_of


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """A row with one sound, one of text alone, and one with two sounds in two turns."""
    return [
        row_of("<audio>Which animal is it?", "A dog.", name="one"),
        row_of("Capital of France?", "Paris.", name="text"),
        row_of("<audio>What?", "Rain.", "And <audio>?", "A bell.", name="two"),
    ]


@pytest.fixture(scope="session")
def audio() -> AudioBatch:
    return AudioBatch.from_arrays([sound_of(0.4, 1), sound_of(0.15, 2), sound_of(0.9, 3)], RATE)


def louder(model: Any) -> None:
    """Bring random layers near the gain of trained ones; what they say is drowned in the residual stream otherwise."""
    with torch.no_grad():
        for name, layer in model.model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv1d) and "lora_" not in name:
                gain = float(layer.weight.std()) * layer.weight[0].numel() ** 0.5
                layer.weight.mul_(0.8 / gain)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder, laid out as transformers saves one, its layers louder."""
    path = tmp_path_factory.mktemp("folder") / "tiny"
    model, tokenizer, extractor = tiny_parts()
    louder(model)
    for part in (model, tokenizer, extractor):
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def load(folder: Path) -> Load:
    def make(**options: Any) -> Any:
        return load_backbone("audio-flamingo-3", **{"weights": str(folder), "device": "cpu", **options})

    return make


@pytest.fixture
def backbone(load: Load) -> Any:
    return load()


@pytest.fixture(scope="session")
def stock() -> Any:
    """transformers' own model with the weights of `folder` and the three tokens."""
    model, tokenizer, _ = tiny_parts()
    louder(model)
    add_thinking_tokens(tokenizer, model)
    return model
