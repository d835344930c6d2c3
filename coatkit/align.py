"""Expert frames at any rate to thinking positions, by time.

Position i of a sound covers [i / R, (i + 1) / R) seconds, R being thinking positions per second (25 in the paper).
Expert frame k covers [offset + k / r, offset + (k + 1) / r). An expert faster than R is averaged over
the overlap of the two intervals; a slower one is interpolated linearly between frame centres, or repeated.
Beyond an expert's last valid frame its last frame is held, so padding never leaks in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from coatkit.protocols import Features


def align(
    features: Features, lengths: Tensor, rate: float, upsampling: Literal["linear", "repeat"] = "linear"
) -> Tensor:
    """Features [A, L, d] on thinking positions: [A, max(lengths), d], zero beyond each sound's length.

    Args:
        features: Frames of the expert.
        lengths: [A] thinking positions of each sound.
        rate: Thinking positions per second, Hz.
        upsampling: For experts slower than `rate`.

    Raises:
        ValueError: If a sound with thinking positions has no expert frame, or the batches differ.
    """
    values, device = features.values, features.values.device
    lengths, valid = lengths.to(device), features.lengths.to(device)
    if lengths.shape != valid.shape:
        raise ValueError(f"{valid.numel()} sounds have features but {lengths.numel()} have thinking positions")
    if bool(((valid < 1) & (lengths > 0)).any()):
        raise ValueError("an expert gave no frame for a sound that has thinking positions")
    positions = int(lengths.max()) if lengths.numel() else 0
    # Time in expert frames: position i starts at frame i * step - shift.
    step, shift = features.frame_rate / rate, features.offset * features.frame_rate
    start = torch.arange(positions, device=device, dtype=torch.float64) * step - shift
    if step > 1:
        index, weight = _overlap(start, step, valid)
    elif upsampling == "repeat":
        index = (start + step / 2).floor().long()[None, :, None].expand(len(valid), -1, 1)
        weight = torch.ones_like(index, dtype=torch.float64)
    else:
        centre = start + step / 2 - 0.5
        low = centre.floor()
        part = centre - low
        index = torch.stack([low, low + 1], -1).long().expand(len(valid), -1, -1)
        weight = torch.stack([1 - part, part], -1).expand(len(valid), -1, -1)
    last = (valid - 1).clamp(min=0)[:, None, None]
    index = torch.minimum(index.clamp(min=0), last)
    out = torch.zeros(len(valid), positions, values.shape[-1], device=device, dtype=torch.float32)
    sound = torch.arange(len(valid), device=device)[:, None]
    for k in range(index.shape[-1]):  # a handful: the frames one position overlaps
        out += values[sound, index[..., k]].float() * weight[..., k, None].float()
    inside = torch.arange(positions, device=device) < lengths[:, None]
    return out.masked_fill(~inside[..., None], 0.0)


def _overlap(start: Tensor, step: float, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and weights [A, positions, K] of the frames each position overlaps, clipped to the valid ones."""
    count = int(step) + 2
    first = start.floor()
    frame = first[:, None] + torch.arange(count, device=start.device, dtype=torch.float64)  # [positions, K]
    ends = valid.double()[:, None, None]
    low = torch.maximum(frame, start[:, None]).expand(len(valid), -1, -1).clamp(min=0)
    high = torch.minimum(torch.minimum(frame + 1, (start + step)[:, None]), ends)
    weight = (high - low).clamp(min=0)
    total = weight.sum(-1, keepdim=True)
    # A position wholly before the first or past the last frame holds that frame: all weight on one clamped index.
    held = torch.zeros_like(weight)
    held[..., 0] = 1
    outside = total <= 1e-9
    weight = torch.where(outside, held, weight / total.clamp(min=1e-9))
    index = frame.expand(len(valid), -1, -1).long()
    return torch.where(outside, index[..., :1], index), weight
