"""What the audio tower and projector of a transformers backbone cost, counted from their layers' shapes, for planning.

Their stock forward looks at values, which torch's meta device does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TowerWork:
    """A part of `HFBackbone`."""

    window_seconds: ClassVar[float]
    tower_path: ClassVar[str]
    projector_path: ClassVar[str]
    options: Any
    tower: nn.Module
    projector: nn.Module

    def tower_flops(self, seconds: float) -> float:
        """Floating-point operations of tower and projector on one sound, counted from the layers' shapes.

        The tower is a Whisper encoder: 100 mel frames a second, halved by its second convolution, and attention within
        windows of `window_seconds`.
        """
        return sum(forward for forward, _ in self._audio_work(seconds))

    def tower_backward(self, seconds: float) -> float:
        """The same for the way back: once for weights that learn, once for inputs that something learnt has made."""
        return sum(backward for _, backward in self._audio_work(seconds))

    def _audio_work(self, seconds: float) -> Iterator[tuple[float, float]]:
        """Operations of one layer after the other on one sound, forward and backward."""
        tokens = 25 * seconds
        windows, rest = divmod(seconds, self.window_seconds)
        squares = windows * (50 * self.window_seconds) ** 2 + (50 * rest) ** 2
        named = [(f"{self.tower_path}.{name}", layer) for name, layer in self.tower.named_modules()]
        named = [pair for pair in named if not pair[0].startswith(self.projector_path)]
        named += [(f"{self.projector_path}.{name}", layer) for name, layer in self.projector.named_modules()]
        made = before = False
        group, heads = "", 0
        for name, layer in named:
            if not isinstance(layer, nn.Conv1d | nn.Linear):
                continue
            place = re.sub(r"\.(base_layer|lora_[AB]\..*)$", "", name)
            if (new := re.sub(r"\.[qkv](_proj)?$", ".qkv", place)) != group:  # what has one input, so learns from one
                yield 4.0 * heads * squares, 8.0 * heads * squares * made
                group, before, heads = new, made, 0
            taps = float(layer.weight[0].numel() * layer.weight.shape[0])
            if isinstance(layer, nn.Conv1d):
                frames = 100 * seconds if layer.stride[0] == 1 else 50 * seconds
            else:
                frames = 50 * seconds if ".layers." in name else tokens
            if re.search(r"\.q(_proj)?(\.base_layer)?$", name):
                heads = layer.weight.shape[0]
            forward = 2 * taps * frames
            yield forward, forward * (layer.weight.requires_grad + (before or ".lora_B." in name))
            made = made or layer.weight.requires_grad

    def _tower_kept(self) -> float:
        """Bytes per second of sound that a tower that learns keeps, about: what goes into each layer, and comes out."""
        widths = [sum(m.weight.shape[:2]) for m in self.tower.modules() if isinstance(m, nn.Linear | nn.Conv1d)]
        norms = [2 * m.weight.shape[0] for m in self.tower.modules() if isinstance(m, nn.LayerNorm)]
        return 50.0 * DTYPES[self.options.dtype].itemsize * (sum(widths) + sum(norms))
