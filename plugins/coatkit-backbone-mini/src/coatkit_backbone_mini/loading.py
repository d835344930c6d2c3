"""Load a backbone folder, strictly and without ever asking the model hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from coatkit import AssetError
from coatkit.backbones.folder import read, read_model
from coatkit_backbone_mini.tokens import ADDED, THINK, THINK_END, THINK_START

_REMEDY = "  If coatkit made this folder, delete it and run again; otherwise give a complete one as `weights`."


def load_processor(folder: Path) -> tuple[PreTrainedTokenizerBase, WhisperFeatureExtractor]:
    """The tokenizer and the feature extractor of a backbone folder.

    Raises:
        AssetError: If a file is missing or damaged, or the tokenizer has not the tokens a backbone needs.
    """
    tokenizer = read(AutoTokenizer, folder)
    extractor = read(WhisperFeatureExtractor, folder)
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in ADDED if token not in vocabulary]:
        raise AssetError(f"{folder}: its tokenizer has no {', '.join(absent)}.\n{_REMEDY}")
    start, think, end = (vocabulary[token] for token in (THINK_START, THINK, THINK_END))
    if (think, end) != (start + 1, start + 2):
        raise AssetError(
            f"{folder}: the ids of the thinking tokens are {start}, {think}, {end}, not in a row.\n{_REMEDY}"
        )
    return tokenizer, extractor


def load_model(folder: Path, dtype: torch.dtype) -> AudioFlamingo3ForConditionalGeneration:
    """The model of a backbone folder, on the CPU and in evaluation mode, its weights held in `dtype`.

    Raises:
        AssetError: If a file is missing or damaged, or a weight is missing, unexpected or of another shape.
    """
    model = read_model(AudioFlamingo3ForConditionalGeneration, folder, dtype)
    assert isinstance(model, AudioFlamingo3ForConditionalGeneration)
    return model
