"""Reading a model folder, strictly and without ever asking the model hub; and giving it the block's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken
from transformers.utils import logging

from coatkit.assets import require
from coatkit.errors import AssetError
from coatkit.manifest import Asset
from coatkit.thinking import TOKENS

_REMEDY = "  If coatkit made this folder, delete it and run again; otherwise give a complete one as `weights`."


def weights_folder(owner: str, weights: str, default: Asset) -> Path:
    """The folder of the option `weights`: the fetched asset for `default`, or a local folder.

    Raises:
        AssetError: If it has not been fetched, or is no model folder.
    """
    folder = require(owner, default) if weights == "default" else Path(weights).expanduser()
    if not (folder / "config.json").is_file():
        raise AssetError(
            f"weights: {folder} is no model folder (it has no config.json).\n"
            "  Give `default`, `random`, or a folder with config.json, safetensors and tokenizer files."
        )
    return folder


def read_model(model_class: Any, folder: Path, dtype: torch.dtype, **arguments: Any) -> Any:
    """The model of a folder, on the CPU and in evaluation mode; `arguments` go to `from_pretrained`.

    Raises:
        AssetError: If a file is missing or damaged, or a weight is missing, unexpected or of another shape.
    """
    # Weights of another shape are let through only to be refused by name below; the stock error names none.
    strict = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = read(model_class, folder, dtype=dtype, **strict, **arguments)
    check_loaded(folder, report)
    return model


def read(reader: Any, folder: Path, **arguments: Any) -> Any:
    """`reader.from_pretrained` on a local folder: a model, tokenizer or feature extractor.

    Raises:
        AssetError: If it cannot be read; says why.
    """
    if not (folder / "config.json").is_file():
        raise AssetError(f"{folder}: is no model folder (it has no config.json).\n{_REMEDY}")
    try:
        with transformers_quiet():
            return reader.from_pretrained(folder, local_files_only=True, **arguments)
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise AssetError(f"{folder}: cannot be read as {reader.__name__}: {error}\n{_REMEDY}") from error


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


def add_thinking_tokens(tokenizer: Any, model: Any) -> None:
    """Give a tokenizer the three tokens of the block, and the model rows for them where it has none to spare.

    The new output rows are the mean of the others, the same on every machine; they are never saved, and the tokens are
    suppressed when generating.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS], special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    start = tokenizer.convert_tokens_to_ids(TOKENS[0])
    with torch.no_grad():
        for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            rows[start : start + len(TOKENS)] = rows[:start].mean(0, dtype=torch.float32).to(rows.dtype)


def with_thinking_tokens(config: Any, tokenizer: Any) -> Any:
    """A configuration with as many rows as `add_thinking_tokens` leaves the model, for planning."""
    missing = sum(token not in tokenizer.get_vocab() for token in TOKENS)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer) + missing)
    return config


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
