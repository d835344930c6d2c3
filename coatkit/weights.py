"""Reading an expert's weights: never running code from the file, and never leaving a tensor out silently."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coatkit.errors import AssetError


def read_weights(owner: str, path: Path) -> Any:
    """What a weights file holds, on the CPU: tensors by name for `.safetensors`; for a torch file whatever its top is.

    Where its format allows, the file is mapped into memory, and read where a tensor is used: an optimizer's state
    beside the weights costs nothing. So copy what is kept, as `fill_weights` does. What is changed is not written back.

    Args:
        owner: The component's name, for messages.
        path: `.safetensors`, or a file of `torch.save`, read with `weights_only`.

    Raises:
        AssetError: If the file is missing, damaged, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise AssetError(f"{owner}: there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AssetError(f"{owner}: {path} cannot be read as weights: {reason[0]}") from error


def _can_be_mapped(path: Path) -> bool:
    """Whether a torch file is of the zip format, and not compressed: torch would map the compressed bytes."""
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # of the older format
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # a damaged archive makes zipfile raise nearly anything; let torch say what is wrong with it
        return False


def fill_weights(owner: str, path: Path, module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Fill a module with exactly its own tensors.

    Raises:
        AssetError: If a tensor is missing, unexpected, of another shape, or not a tensor; names the file and them.
    """
    wanted = module.state_dict()
    found = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise AssetError(f"{owner}: {path} does not fit the network: {'; '.join(problems[:6])}{more}")
    module.load_state_dict({name: found[name] for name in wanted})
