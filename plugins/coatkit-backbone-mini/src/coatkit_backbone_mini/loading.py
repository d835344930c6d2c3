"""Load a backbone folder, strictly and without ever asking the model hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.utils import logging

from coatkit import AssetError
from coatkit_backbone_mini.tokens import ADDED, THINK, THINK_END, THINK_START

_REMEDY = "  If coatkit made this folder, delete it and run again; otherwise give a complete one as `weights`."


def load_processor(folder: Path) -> tuple[PreTrainedTokenizerBase, WhisperFeatureExtractor]:
    """The tokenizer and the feature extractor of a backbone folder.

    Raises:
        AssetError: If a file is missing or damaged, or the tokenizer has not the tokens a backbone needs.
    """
    tokenizer = _read(AutoTokenizer, folder)
    extractor = _read(WhisperFeatureExtractor, folder)
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
    """The model of a backbone folder, on the CPU and in evaluation mode.

    Args:
        folder: Folder with `config.json` and `model.safetensors`.
        dtype: Type to hold the weights in.

    Raises:
        AssetError: If a file is missing or damaged, or a weight is missing, unexpected or of another shape.
    """
    # Weights of another shape are let through only to be refused by name below; the stock error names none.
    model, report = _read(
        AudioFlamingo3ForConditionalGeneration,
        folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(folder, report)
    assert isinstance(model, AudioFlamingo3ForConditionalGeneration)
    return model


def check_loaded(folder: Path, report: Mapping[str, Any]) -> None:
    """Check transformers' loading report, which `from_pretrained` itself only prints.

    Raises:
        AssetError: If any weight was missing, unexpected, of another shape, or not read.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(str(name) for name in report.get(kind) or ()):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{more}")
    if problems:
        raise AssetError(f"{folder}: its weights do not fit its config.json; {'; '.join(problems)}.\n{_REMEDY}")


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports off the terminal; `check_loaded` reads the reports."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _read(reader: Any, folder: Path, **arguments: Any) -> Any:
    if not (folder / "config.json").is_file():
        raise AssetError(f"{folder}: is no model folder (it has no config.json).\n{_REMEDY}")
    try:
        with transformers_quiet():
            return reader.from_pretrained(folder, local_files_only=True, **arguments)
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise AssetError(f"{folder}: cannot be read as {reader.__name__}: {error}\n{_REMEDY}") from error
