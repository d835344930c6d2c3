"""Running transformers' Data2VecAudioModel, which SpidR's student is, so that padding has no part in its features.

The stock forward pass is inexact on padded batches: its positional convolutions see what lies beyond a sound's end.
Here padded frames are zeroed before each of them. The first convolutions run with channels last and in short stretches,
which is faster on a CPU and keeps memory small however long the sound is. For a single sound the result is the stock
one up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coatkit import conv_frames, receptive_field

SAMPLE_RATE = 16_000
WIDTH = 768
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of each convolution, from the samples on."""
HOP = 320
"""Samples from one frame to the next: the product of the strides."""
FEWEST = receptive_field(CONVOLUTIONS)
"""400 samples make one frame."""

_FRAMES_AT_ONCE = {"cpu": 64, "other": 4_096}
"""Frames that go through the convolutions together: on a CPU what stays in its caches, else what bounds memory (the
first convolution makes 64 times as many, about 0.13 MB for each frame)."""


def features(network: Any, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the network's last layer.

    Args:
        network: A Data2VecAudioModel of SpidR's sizes, with as many layers as are wanted.
        samples: [a, n] standardised sounds, zero beyond their ends.
        lengths: [a] samples of each, at least 400.

    Returns:
        Values [a, l, 768], of no meaning beyond a sound's frames, and frame counts [a].
    """
    counts = conv_frames(lengths, CONVOLUTIONS)
    hidden, _ = network.feature_projection(_convolve(network.feature_extractor.conv_layers, samples))
    valid = None
    if int(counts.min()) < hidden.shape[1]:
        valid = torch.arange(hidden.shape[1], device=samples.device) < counts[:, None]
    encoder = network.encoder
    hidden = encoder.layer_norm(hidden + _positions(encoder.pos_conv_embed.layers, hidden, valid))
    mask = None if valid is None else valid[:, None, None]
    for layer in encoder.layers:
        hidden = layer(hidden, attention_mask=mask)
    return hidden, counts


def _convolve(stack: Any, samples: Tensor) -> Tensor:
    """Frames [a, l, 512] of the convolutions, in stretches: no norm or kernel reaches beyond a frame's 400 samples."""
    # As a product with channels last, a convolution needs no transposing for the norm over channels after it.
    weights = [layer.conv.weight.transpose(1, 2).flatten(1) for layer in stack]
    count = (samples.shape[1] - FEWEST) // HOP + 1
    step = max(1, _FRAMES_AT_ONCE.get(samples.device.type, _FRAMES_AT_ONCE["other"]) // len(samples))
    stretches = []
    for first in range(0, count, step):
        last = min(first + step, count) - 1
        hidden = samples[:, first * HOP : last * HOP + FEWEST, None]
        for layer, weight, (kernel, stride) in zip(stack, weights, CONVOLUTIONS, strict=True):
            seen = hidden.unfold(1, kernel, stride).transpose(2, 3).flatten(2)  # [a, m, kernel * channels]
            hidden = layer.activation(layer.layer_norm(F.linear(seen, weight)))
        stretches.append(hidden)
    return torch.cat(stretches, dim=1)


def _positions(layers: Any, hidden: Tensor, valid: Tensor | None) -> Tensor:
    """Positional embedding [a, l, 768]: five convolutions of 19 frames, which find zeros beyond a sound's end.

    Args:
        layers: The convolutions, each with its norm and activation.
        hidden: [a, l, 768].
        valid: [a, l] bool, True at a sound's frames; None where there is no padding.
    """
    hidden = hidden.transpose(1, 2)
    for layer in layers:
        hidden = layer(hidden if valid is None else hidden.masked_fill(~valid[:, None], 0.0))
    return hidden.transpose(1, 2)
