"""A good head, and heads with one fault each; tests/test_head_conformance_suite.py says what names it."""

from __future__ import annotations

import contextlib
import os
import random
import urllib.request
from typing import Any

import torch
from torch import Tensor, nn

from coatkit import Head


class Good(Head):
    """A mean over the sound's valid positions beside each state, then a map."""

    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(2 * hidden_size, dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        kept = hidden.masked_fill(~mask[..., None], 0.0)
        mean = kept.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
        found: Tensor = self.out(torch.cat([kept, mean.expand_as(kept)], -1))
        return found


class OtherArguments(Good):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)


class WrongDim(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim + 1)


class OneValueForAll(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden, mask).mean(1)


class NaNWithoutPositions(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        found = super().forward(hidden, mask)
        return found / mask.any(1)[:, None, None]


class FixedLength(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim)
        self.place = nn.Parameter(torch.zeros(64, hidden_size))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden + self.place[torch.arange(hidden.shape[1])], mask)


class OwnWidth(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(64, dim)


class AlwaysDropsOut(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(hidden, mask), 0.1)


class PoolsPadding(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden, torch.ones_like(mask))


class DividesByPadding(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden, mask) / hidden.shape[1]


class MixesSounds(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        found = super().forward(hidden, mask)
        return found + 0.1 * found.detach()[:, :1].mean()


class Constant(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.out.bias.expand(*hidden.shape[:2], -1) + 0.0 * super().forward(hidden, mask)


class Detaches(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden.detach(), mask)


class IdleParameters(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim)
        self.unused = nn.Linear(hidden_size, dim)


class DrawsFromPython(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim)
        with torch.no_grad():
            self.out.weight.mul_(1 + int.from_bytes(os.urandom(2), "big") / 65536)


class SeedsGlobally(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        random.seed(0)
        super().__init__(hidden_size, dim)


class PlainTensor(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim)
        self.scale = 1 + torch.rand(dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(hidden, mask) * self.scale


class SharedTensor(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim)
        self.again = self.out


class FloatsOnly(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().forward(torch.lerp(hidden, torch.zeros_like(hidden, dtype=torch.float32), 0.5), mask)


class ZeroesPadding(Good):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if not hidden.requires_grad:
            hidden[~mask] = 0.0
        return super().forward(hidden, mask)


class Downloads(Good):
    def __init__(self, hidden_size: int, dim: int) -> None:
        super().__init__(hidden_size, dim)
        with contextlib.suppress(OSError):
            urllib.request.urlopen("http://weights.example/head")


class RefusesOptions(Good):
    def __init__(self, hidden_size: int, dim: int, **options: Any) -> None:
        if options:
            raise ValueError(f"unknown options {sorted(options)}")
        super().__init__(hidden_size, dim)
