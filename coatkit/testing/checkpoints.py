"""Spoiling a checkpoint file, to see that its reader notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SPOILS = ("missing", "unexpected", "shape", "truncated")
"""The faults of `Checkpoint.spoil` that a reader must notice in any checkpoint."""
EXTRA = "conformance_extra"
"""Last part of the name of the tensor that `unexpected` adds."""


class Checkpoint:
    """A checkpoint in its upstream layout, kept so that it can be spoiled and put right again.

    Args:
        path: A file, or a folder whose largest file holds the tensors; of several kinds, `.safetensors` does.
        tensor: Name of a tensor the reader needs, as the file calls it; the first one when empty.
        like: What the name of the first one should hold, if there is one that does.

    Attributes:
        trouble: Why the component cannot load it whole; empty where it can, None where nobody has tried.

    Raises:
        ValueError: If there is no such tensor, or none at all.
    """

    def __init__(self, path: Path, tensor: str = "", like: str = "") -> None:
        self.path = path
        self.trouble: str | None = None
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        if not files:
            raise ValueError(f"{path} is neither a file nor a folder with files")
        self.file = max(files, key=lambda p: (p.suffix == ".safetensors", p.stat().st_size))
        found = self._tensors(self._read(), tensor)
        names = [name for name, value in found.items() if isinstance(value, Tensor)]
        self.tensor = tensor or next((name for name in names if like in name), names[0])

    def spoil(self, how: str) -> None:
        """Write the file anew with one fault: one of `SPOILS`, `gone`, or `other` for other values of the tensor."""
        self._whole = self.file.read_bytes()
        content, metadata = self._read(), self._metadata()
        self.file.unlink()  # a reader may have the old one mapped into memory
        if how == "truncated":
            self.file.write_bytes(self._whole[: len(self._whole) // 2])
        if how in ("truncated", "gone"):
            return
        tensors = self._tensors(content, self.tensor)
        value = tensors[self.tensor]
        if how == "missing":
            del tensors[self.tensor]
        elif how == "unexpected":
            parent = self.tensor.rpartition(".")[0]
            tensors[f"{parent}.{EXTRA}".lstrip(".")] = value.clone()
        elif how == "other":
            tensors[self.tensor] = value + 1
        else:
            tensors[self.tensor] = torch.zeros(*value.shape, 2)  # one dimension more fits nowhere
        if self.file.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, self.file, metadata)
        else:
            torch.save(content, self.file)

    def mend(self) -> None:
        """Put the file back as it was."""
        self.file.unlink(missing_ok=True)
        self.file.write_bytes(self._whole)

    def _read(self) -> Any:
        if self.file.suffix == ".safetensors":
            return load_file(self.file)
        return torch.load(self.file, map_location="cpu", weights_only=True)

    def _metadata(self) -> dict[str, str] | None:
        """What a safetensors file says of itself; transformers reads none that does not."""
        if self.file.suffix != ".safetensors":
            return None
        with safe_open(self.file, "pt") as opened:
            found: dict[str, str] | None = opened.metadata()
            return found

    def _tensors(self, content: Any, wanted: str) -> dict[str, Any]:
        """The dict in a file's content that holds `wanted`, or, when that is empty, the first that holds a tensor."""
        todo = [content]
        for value in todo:
            if isinstance(value, dict):
                if wanted in value or (not wanted and any(isinstance(v, Tensor) for v in value.values())):
                    return value
                todo += value.values()
        raise ValueError(f"{self.file} holds no tensor {wanted}".rstrip())
