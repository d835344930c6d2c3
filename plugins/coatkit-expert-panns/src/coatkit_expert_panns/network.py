"""Cnn14_DecisionLevelMax of PANNs (Kong et al., 2020) up to its classifier, in modules named as upstream names them.

Sounds of any lengths go through together without a batch dimension: one after the other along time, each in a slot of
32 n + 32 or more rows that holds n segments of 32 frames and zeros behind them. Every pooling halves slots and sounds
alike, so a sound is always followed by a row of zeros, which is what a convolution sees beyond the end of a sound that
is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatkit_expert_panns.convolution import TILE, Direct, First, Winograd
from coatkit_expert_panns.front_end import BANDS, BINS, WINDOW, log_mel

DIM = 2_048
"""Width of the features before the classifier."""
CLASSES = 527
"""Sound classes of AudioSet."""
SEGMENT = 32
"""Frames of one segment: five poolings by two."""

_CHANNELS = (1, 64, 128, 256, 512, 1_024, 2_048)
EDGE = 2
"""Rows of zeros before the first sound of an array."""
_ROWS_AT_ONCE = 512
"""Rows times columns that a block's two convolutions make at once on a CPU, for what they keep to stay in its cache."""


class ConvBlock(nn.Module):
    """Parameters of two convolutions with batch norms; `Network.prepare` folds them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)


class Network(nn.Module):
    """Sounds at 32 kHz to features [segments, 2048] at 3.125 Hz, and these to the logits of 527 classes.

    Weights go in under upstream's names; then `prepare` must be called, on the device that is to be used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spectrogram_extractor = nn.Module()
        self.spectrogram_extractor.stft = nn.Module()
        self.spectrogram_extractor.stft.conv_real = nn.Conv1d(1, BINS, WINDOW, bias=False)
        self.spectrogram_extractor.stft.conv_imag = nn.Conv1d(1, BINS, WINDOW, bias=False)
        self.logmel_extractor = nn.Module()
        self.logmel_extractor.melW = nn.Parameter(torch.empty(BINS, BANDS))
        self.bn0 = nn.BatchNorm2d(BANDS)
        for k in range(1, 7):
            self.add_module(f"conv_block{k}", ConvBlock(_CHANNELS[k - 1], _CHANNELS[k]))
        self.fc1 = nn.Linear(DIM, DIM)
        self.fc_audioset = nn.Linear(DIM, CLASSES)
        self.folded = nn.ModuleList()

    @torch.no_grad()
    def prepare(self) -> None:
        """Fold batch norms into convolutions, and give each the fastest kind for the device.

        What is made here is no part of the state: that stays as it was loaded.
        """
        layers: list[nn.Module] = []
        for k in range(1, 7):
            block = self.get_submodule(f"conv_block{k}")
            assert isinstance(block, ConvBlock)
            for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
                scale, shift = _affine(norm)
                weight = conv.weight * scale[:, None, None, None]
                # With few channels the sums around the products cost more than Winograd saves.
                if weight.shape[1] == 1:
                    layers.append(First(weight, shift))
                elif weight.device.type != "cpu" or k == 1:
                    layers.append(Direct(weight, shift))
                else:
                    layers.append(Winograd(weight, shift, BANDS >> (k - 1)))
        self.folded = nn.ModuleList(layers).train(self.training)

    def forward(self, sounds: Sequence[Tensor]) -> list[Tensor]:
        """Features [L, 2048] of each sound [N], N at least 9,920, L = (N // 320 + 1) // 32."""
        bank = self.get_parameter("logmel_extractor.melW")
        levels = [log_mel(sound, bank) for sound in sounds]
        frames = [len(level) for level in levels]
        starts = [0, *accumulate(SEGMENT * (count // SEGMENT + 1) for count in frames)]
        slots = Slots(starts, frames)
        scale, shift = _affine(self.bn0)
        x = slots.empty(levels[0], BANDS, 1)
        for start, level in zip(starts, levels, strict=False):
            torch.addcmul(shift, level, scale, out=x[EDGE + start :][: len(level), :, 0])
        slots.clear(x)
        for k in range(1, 6):
            halved = slots.halve()
            pooled = halved.empty(x, x.shape[1] // 2, _CHANNELS[k])
            for row, made in self._block(k, x, slots):
                _pool(made, pooled[EDGE + row // 2 :][: len(made) // 2])
            halved.clear(pooled)
            x, slots = pooled, halved
        # The last block has no pooling. Its two columns are averaged, and beyond a sound's segments stay zeros.
        deep = slots.empty(x, 1, DIM)
        for row, made in self._block(6, x, slots):
            torch.mean(made, 1, keepdim=True, out=deep[EDGE + row :][: len(made)])
        slots.clear(deep)
        # All is at least 0, so zeros are as good as nothing under the maximum; upstream counts them in the mean too.
        before, here, after = (deep[EDGE - 1 + i :][: slots.starts[-1], 0] for i in range(3))
        around = torch.maximum(torch.maximum(before, here), after) + (before + here + after) / 3
        features = F.relu_(self.fc1(around))
        return [features[s : s + n] for s, n in zip(slots.starts, slots.counts, strict=False)]

    def _block(self, k: int, x: Tensor, slots: Slots) -> Iterator[tuple[int, Tensor]]:
        """Block k, some rows at a time: the number of the first row, and [rows, columns, channels] before pooling."""
        first, second = self.folded[2 * k - 2], self.folded[2 * k - 1]
        total = -(-slots.starts[-1] // TILE) * TILE
        step = total if x.device.type != "cpu" else _ROWS_AT_ONCE * TILE // x.shape[1]
        for row in range(0, total, step):
            rows = min(step, total - row)
            # The second convolution sees one row more on either side. Made are four more, as tiles are.
            between = first(x[row : row + rows + TILE + 2])
            slots.clear(between, row - 1)
            yield row, second(between[: rows + 2])

    def event_logits(self, features: Tensor) -> Tensor:
        """Logits [..., 527] of features [..., 2048]."""
        logits: Tensor = self.fc_audioset(features)
        return logits


class Slots:
    """Where sounds lie along the rows of an array that holds them all.

    Args:
        starts: First row of each slot, and where the last one ends.
        counts: Rows of each sound, fewer than its slot has.
    """

    def __init__(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        self.starts, self.counts = starts, counts
        ends = (s + n for s, n in zip(starts, counts, strict=False))
        self.gaps = [(-EDGE, 0), *zip(ends, starts[1:], strict=True), (starts[-1], starts[-1] + TILE + 2 * EDGE)]

    def halve(self) -> Slots:
        """After pooling by two; an odd last row of a sound is dropped, as upstream does."""
        return Slots([s // 2 for s in self.starts], [n // 2 for n in self.counts])

    def empty(self, like: Tensor, columns: int, channels: int) -> Tensor:
        """An array [rows, columns, channels] with what tiles reach around; its row `EDGE` is row 0 of the slots."""
        return like.new_empty(EDGE + -(-self.starts[-1] // TILE) * TILE + 2 + EDGE, columns, channels)

    def clear(self, rows: Tensor, first: int = -EDGE) -> None:
        """Put zeros where there is no sound; `first` is the number of the array's first row."""
        last = first + len(rows)
        for start, stop in self.gaps:
            if start < last and stop > first:
                rows[max(0, start - first) : stop - first] = 0.0


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a batch norm that is not in training."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _pool(rows: Tensor, out: Tensor) -> None:
    """Means of 2 x 2: [n, F, C] into [n / 2, F / 2, C]."""
    pairs = rows[0::2] + rows[1::2]
    torch.add(pairs[:, 0::2], pairs[:, 1::2], out=out)
    out.mul_(0.25)
