"""The encoder of emotion2vec, as far as its features need it: convolutions, positional convolutions, 4 + 8 layers.

It is the audio model of data2vec 2.0 (Baevski et al., 2022) without decoder and teacher. Upstream's own padding mask is
inexact, since its positional convolutions see what lies beyond a sound's end. Here padded frames are zeroed before each
of them and masked in attention, so a sound in a batch gets what it gets alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatkit import conv_frames, receptive_field
from coatkit_expert_emotion2vec import Variant

SAMPLE_RATE = 16_000
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of each convolution, from the samples on."""
HOP = 320
"""Samples from one frame to the next: the product of the strides."""
FEWEST = receptive_field(CONVOLUTIONS)
"""400 samples make one frame."""
EXTRA_TOKENS = 10
"""Learned tokens before the frames. They take part in attention and are dropped at the end."""

_CHANNELS = 512
_PRENET, _DEPTH = 4, 8
_POSITIONAL, _KERNEL, _GROUPS = 5, 19, 16
_FRAMES_AT_ONCE = {"cpu": 64, "other": 4_096}
"""Frames that go through the convolutions together: on a CPU what stays in its caches, else what bounds memory (the
first convolution makes 64 times as many, about 0.13 MB for each frame)."""
_SCORES_AT_ONCE = 1 << 25
"""Attention scores that are biased together, 128 MB. Where there are more, queries go in pieces."""


@dataclass(frozen=True)
class Size:
    """Width of the features, and heads of each attention."""

    width: int
    heads: int


SIZES: dict[Variant, Size] = {
    "base": Size(768, 12),
    "plus-seed": Size(768, 12),
    "plus-base": Size(768, 12),
    "plus-large": Size(1_024, 16),
}


class Network(nn.Module):
    """From standardised sounds to frames.

    Args:
        size: Of the variant.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.stem = nn.ModuleList(
            _Convolution(kernel, stride, 1 if i == 0 else _CHANNELS) for i, (kernel, stride) in enumerate(CONVOLUTIONS)
        )
        self.project_norm = nn.LayerNorm(_CHANNELS)
        self.project = nn.Linear(_CHANNELS, size.width)
        self.positional = nn.ModuleList(
            nn.Conv1d(size.width, size.width, _KERNEL, padding=_KERNEL // 2, groups=_GROUPS) for _ in range(_POSITIONAL)
        )
        self.extra_tokens = nn.Parameter(torch.randn(1, EXTRA_TOKENS, size.width))
        self.alibi_scale = nn.Parameter(torch.ones(1, 1, size.heads, 1, 1))
        self.norm = nn.LayerNorm(size.width)
        self.prenet = nn.ModuleList(_Layer(size) for _ in range(_PRENET))
        self.blocks = nn.ModuleList(_Layer(size) for _ in range(_DEPTH))

    def forward(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames of each sound.

        Args:
            samples: [a, n] sounds of zero mean and unit variance, zero beyond their ends.
            lengths: [a] samples of each, at least 400.

        Returns:
            Values [a, l, width], of no meaning beyond a sound's frames, and frame counts [a].
        """
        counts = conv_frames(lengths, CONVOLUTIONS)
        frames = self._convolve(samples)
        valid = None
        if int(counts.min()) < frames.shape[1]:
            valid = torch.arange(frames.shape[1], device=samples.device) < counts[:, None]
        hidden = self.project(self.project_norm(frames))
        hidden = hidden + self._positions(hidden, valid)
        bias = Bias(slopes(self.size.heads).to(hidden) * self.alibi_scale.flatten().clamp(min=0), hidden, valid)
        hidden = self.norm(torch.cat([self.extra_tokens.expand(len(hidden), -1, -1), hidden], dim=1))
        for layer in (*self.prenet, *self.blocks):
            hidden = layer(hidden, bias)
        return hidden[:, EXTRA_TOKENS:], counts

    def _convolve(self, samples: Tensor) -> Tensor:
        """Frames [a, l, 512] of the convolutions, in short stretches: no norm or kernel reaches beyond a frame's own
        400 samples."""
        count = (samples.shape[1] - FEWEST) // HOP + 1
        step = max(1, _FRAMES_AT_ONCE.get(samples.device.type, _FRAMES_AT_ONCE["other"]) // len(samples))
        stem: list[Any] = list(self.stem)  # a ModuleList forgets what it holds
        matrices = [layer.matrix() for layer in stem]
        stretches = []
        for first in range(0, count, step):
            last = min(first + step, count) - 1
            hidden = samples[:, first * HOP : last * HOP + FEWEST, None]
            for layer, matrix in zip(stem, matrices, strict=True):
                hidden = layer(hidden, matrix)
            stretches.append(hidden)
        return torch.cat(stretches, dim=1)

    def _positions(self, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """Positional embedding [a, l, width]: five convolutions of 19 frames, which find zeros beyond a sound's end."""
        for convolution in self.positional:
            if valid is not None:
                hidden = hidden.masked_fill(~valid[..., None], 0.0)
            hidden = convolution(hidden.transpose(1, 2)).transpose(1, 2)
            hidden = F.gelu(F.layer_norm(hidden, hidden.shape[-1:]))
        return hidden


class _Convolution(nn.Module):
    """A convolution without bias, a norm over channels and GELU, all with channels last.

    As a matrix product it needs no transposing for the norm, which makes it twice as fast on a CPU.
    """

    def __init__(self, kernel: int, stride: int, channels: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(_CHANNELS, channels, kernel))
        nn.init.kaiming_normal_(self.weight)
        self.norm = nn.LayerNorm(_CHANNELS)

    def matrix(self) -> Tensor:
        """The weight as [512, kernel * channels]; made once for all stretches."""
        return self.weight.transpose(1, 2).flatten(1)

    def forward(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        """[a, n, channels] to [a, m, 512]."""
        seen = hidden.unfold(1, self.kernel, self.stride).transpose(2, 3)  # [a, m, kernel, channels]
        return F.gelu(self.norm(F.linear(seen.flatten(2), matrix)))


class _Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, hidden: Tensor, bias: Bias) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pieces = [
            F.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=added) for rows, added in bias
        ]
        mixed = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        attended: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return attended


class _Layer(nn.Module):
    """A transformer layer with its norms after each half."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attn = _Attention(size)
        self.norm1 = nn.LayerNorm(size.width)
        self.fc1 = nn.Linear(size.width, 4 * size.width)
        self.fc2 = nn.Linear(4 * size.width, size.width)
        self.norm2 = nn.LayerNorm(size.width)

    def forward(self, hidden: Tensor, bias: Bias) -> Tensor:
        hidden = self.norm1(hidden + self.attn(hidden, bias))
        finished: Tensor = self.norm2(hidden + self.fc2(F.gelu(self.fc1(hidden))))
        return finished


class Bias:
    """What is added to attention scores: how far apart two frames are (ALiBi, Press et al., 2022), and the mask.

    Iterating gives the queries in pieces, each with its bias [1 or a, heads, queries, tokens].

    Args:
        slopes: [heads] weight of a distance of one frame.
        frames: [a, l, width]; only its shape counts. The extra tokens before them are at no distance to anything.
        valid: [a, l] bool, True at a sound's frames; None where there is no padding.
    """

    def __init__(self, slopes: Tensor, frames: Tensor, valid: Tensor | None) -> None:
        self.slopes = slopes
        self.time = torch.arange(-EXTRA_TOKENS, frames.shape[1], device=frames.device)
        self.beyond = None if valid is None else ~F.pad(valid, (EXTRA_TOKENS, 0), value=True)[:, None, None]
        sounds = 1 if valid is None else len(valid)
        self.step = max(1, _SCORES_AT_ONCE // (sounds * len(slopes) * len(self.time)))
        # One piece serves all layers. Several are made anew in each of them: that is quick, and keeping them is not
        # what pieces are for.
        self.single = self._of(slice(None)) if self.step >= len(self.time) else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if self.single is not None:
            yield slice(None), self.single
            return
        for first in range(0, len(self.time), self.step):
            rows = slice(first, first + self.step)
            yield rows, self._of(rows)

    def _of(self, rows: slice) -> Tensor:
        query, key = self.time[rows, None], self.time
        distance = (query - key).abs().masked_fill((query < 0) | (key < 0), 0)
        bias = (-self.slopes[:, None, None] * distance.to(self.slopes))[None]
        return bias if self.beyond is None else bias.masked_fill(self.beyond, -math.inf)


def slopes(heads: int) -> Tensor:
    """[heads] slopes of ALiBi: 2 ** (-8 i / heads) for a power of two; the missing ones of another number are every
    other one of twice the largest power of two below it."""
    power = 1 << (heads.bit_length() - 1)
    exact = 2.0 ** (-8 / power * torch.arange(1, power + 1))
    between = 2.0 ** (-4 / power * torch.arange(1, 2 * power, 2))
    return torch.cat([exact, between[: heads - power]])
