"""What experts that read raw samples share: scaling each sound, counting frames, batching sounds of like length.

A batch holds sounds of different lengths, padded with zeros. A plugin's network should give each sound what it would
give it alone; these parts keep padding out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coatkit.protocols import AudioBatch

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From samples [a, n] and lengths [a] to values [a, l, d] and frame counts [a]."""


def standardise(samples: Tensor, lengths: Tensor, eps: float = 1e-7) -> Tensor:
    """Each sound to zero mean and unit variance over its own samples; padding becomes zero.

    Args:
        samples: [A, N].
        lengths: [A] valid samples of each sound.
        eps: Added to the variance, as the encoder's own front end does.

    Returns:
        [A, N] float32. A constant sound becomes zeros.
    """
    beyond = torch.arange(samples.shape[1], device=samples.device) >= lengths.to(samples.device)[:, None]
    count = lengths.to(samples.device)[:, None].clamp(min=1)
    samples = samples.float().masked_fill(beyond, 0.0)
    centred = (samples - samples.sum(1, keepdim=True) / count).masked_fill(beyond, 0.0)
    return centred * torch.rsqrt(centred.square().sum(1, keepdim=True) / count + eps)


def conv_frames(lengths: Tensor, layers: Sequence[tuple[int, int]]) -> Tensor:
    """Frames [A] that unpadded convolutions make of [A] samples; `layers` are (kernel, stride) from the input on."""
    for kernel, stride in layers:
        lengths = (torch.div(lengths - kernel, stride, rounding_mode="floor") + 1).clamp(min=0)
    return lengths


def receptive_field(layers: Sequence[tuple[int, int]]) -> int:
    """Samples one frame of such convolutions sees, the fewest that make a frame."""
    size, hop = 1, 1
    for kernel, stride in layers:
        size, hop = size + (kernel - 1) * hop, hop * stride
    return size


def encode_by_length(
    audio: AudioBatch,
    network: Network,
    *,
    seconds: float | None = None,
    waste: float | None = None,
    min_samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run a network over groups of sounds of like length, and put the results back in order.

    Args:
        audio: The batch.
        network: Gives the frames of a group; what it gives beyond a sound's frames is dropped.
        seconds: Padded seconds of sound that go through together at most, unless one sound alone is longer: bounds
            memory. When left out 8 on a CPU, where only short sounds gain from company, and 120 elsewhere.
        waste: Share of a group that may be padding. When left out 0.05 on a CPU, where padding costs what sound costs,
            and 0.1 elsewhere.
        min_samples: A shorter sound is taken as this long, with zeros behind it.

    Returns:
        Values [A, L, d], zero beyond each sound's frames, and frame counts [A] on the device of `audio.lengths`.
    """
    on_cpu = audio.samples.device.type == "cpu"
    seconds = (8.0 if on_cpu else 120.0) if seconds is None else seconds
    waste = (0.05 if on_cpu else 0.1) if waste is None else waste
    lengths = audio.lengths.cpu().clamp(min=min_samples)
    samples = torch.nn.functional.pad(audio.samples, (0, max(0, min_samples - audio.samples.shape[1])))
    beyond = torch.arange(samples.shape[1], device=samples.device) >= audio.lengths.to(samples.device)[:, None]
    samples = samples.masked_fill(beyond, 0.0)
    groups: list[list[int]] = []
    longest = total = 0
    for i in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[i])
        padded = longest * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > seconds * audio.sample_rate or padded - total - length > waste * padded:
            groups.append([])
            longest, total = length, 0
        groups[-1].append(i)
        total += length

    found = [
        network(samples[torch.tensor(g, device=samples.device), : int(lengths[g[0]])], lengths[g].to(samples.device))
        for g in groups
    ]
    counts = torch.zeros(len(audio), dtype=torch.int64)
    for group, (_, frames) in zip(groups, found, strict=True):
        counts[group] = frames.cpu()
    values = torch.zeros(len(audio), int(counts.max()), found[0][0].shape[-1], device=samples.device)
    for group, (made, _) in zip(groups, found, strict=True):
        for row, i in enumerate(group):
            values[i, : counts[i]] = made[row, : counts[i]]
    return values, counts.to(audio.lengths.device)
