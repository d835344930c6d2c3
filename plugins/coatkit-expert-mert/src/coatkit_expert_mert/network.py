"""Running transformers' HubertModel, which MERT-v1-95M is, so that padding has no part in a sound's hidden states.

The stock forward pass is inexact on padded batches: the norm after the first convolution runs over time, padding
included. Here its statistics come from each sound's own samples. That also allows the convolutions to run in short
stretches, which is faster on a CPU and keeps memory small however long the sound is. For a single sound the result is
the stock one up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coatkit import conv_frames, receptive_field

SAMPLE_RATE = 24_000
WIDTH = 768
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of each convolution, from the samples on."""
HOP = 320
"""Samples from one frame to the next: the product of the strides."""

_FRAMES_AT_ONCE = {"cpu": 128, "other": 4_096}
"""Frames that go through the convolutions together: on a CPU what stays in its caches, else what bounds memory (the
first convolution makes 64 times as many, about 0.13 MB for each frame)."""


def features(network: Any, samples: Tensor, lengths: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean of hidden states, numbered as transformers does.

    Args:
        network: A HubertModel of MERT-v1-95M's sizes with at least `max(layers)` layers.
        samples: [a, n] standardised sounds, zero beyond their ends.
        lengths: [a] samples of each, at least 400.
        layers: Ascending: 0 for the input of the first layer, i for the output of layer i.

    Returns:
        Values [a, l, 768], of no meaning beyond a sound's frames, and frame counts [a].
    """
    counts = conv_frames(lengths, CONVOLUTIONS)
    hidden = network.feature_projection(_convolve(network.feature_extractor.conv_layers, samples, lengths))
    mask = None
    if int(counts.min()) < hidden.shape[1]:
        valid = torch.arange(hidden.shape[1], device=samples.device) < counts[:, None]
        # The positional convolution sees 64 frames either way: beyond the end it must find what it finds there alone.
        hidden = hidden.masked_fill(~valid[..., None], 0.0)
        mask = valid[:, None, None]
    encoder = network.encoder
    hidden = encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden))
    total = hidden if 0 in layers else None
    for i in range(1, max(layers) + 1):
        hidden = encoder.layers[i - 1](hidden, attention_mask=mask)
        if i in layers:
            total = hidden if total is None else total + hidden
    assert total is not None
    return total / len(layers), counts


def _convolve(stack: Any, samples: Tensor, lengths: Tensor) -> Tensor:
    """Frames [a, l, 512] of the convolution stack."""
    scale, shift = _first_norm(stack[0], samples, lengths)
    count = int(conv_frames(torch.tensor(samples.shape[1]), CONVOLUTIONS))
    size = receptive_field(CONVOLUTIONS)
    budget = _FRAMES_AT_ONCE.get(samples.device.type, _FRAMES_AT_ONCE["other"])
    step = max(1, budget // len(samples))
    stretches = []
    for first in range(0, count, step):
        last = min(first + step, count) - 1
        hidden = stack[0].conv(samples[:, None, first * HOP : last * HOP + size])
        hidden = stack[0].activation(torch.addcmul(shift, hidden, scale))
        for layer in stack[1:]:
            hidden = layer(hidden)
        stretches.append(hidden.transpose(1, 2))
    return torch.cat(stretches, 1)


def _first_norm(layer: Any, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of the first convolution's output over each sound's own time, as a factor and a term [a, 512, 1].

    The convolution is linear and has no bias, so the mean and variance of its output follow from those of the stretches
    of samples it sees: w m and w C w, with m the mean stretch and C the stretches' covariance. In float64, because
    a filter can suppress nearly all of the sound and so nearly all of C.
    """
    kernel, stride = CONVOLUTIONS[0]
    # Apple's GPUs have no float64; the numbers are few.
    place = torch.device("cpu") if samples.device.type == "mps" else samples.device
    seen = samples.to(place).double().unfold(1, kernel, stride)
    frames = conv_frames(lengths.to(place), CONVOLUTIONS[:1])[:, None, None]
    beyond = torch.arange(seen.shape[1], device=place)[:, None] >= frames
    mean = seen.masked_fill(beyond, 0.0).sum(1, keepdim=True) / frames
    centred = (seen - mean).masked_fill(beyond, 0.0)
    covariance = centred.transpose(1, 2) @ centred / frames
    weight = layer.conv.weight[:, 0].to(place).double()
    variance = ((weight @ covariance) * weight).sum(-1).clamp(min=0.0)
    norm = layer.layer_norm
    scale = norm.weight.to(place) * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.to(place) - (mean @ weight.T)[:, 0] * scale
    scale, shift = (x.to(samples.device, torch.float32)[..., None] for x in (scale, shift))
    return scale, shift
