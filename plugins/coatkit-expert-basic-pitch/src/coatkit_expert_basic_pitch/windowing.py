"""Where basic-pitch's windows lie in a sound, and which of their frames make a uniform 86.13 Hz sequence.

basic-pitch prepends 3,840 zeros and reads windows of 43,844 samples every 36,164. A window has 172 frames, 256 samples
apart; rows 15 to 156 are kept, so frame `row` of window `w` is centred at sample `36164 w - 3840 + 256 row` of the
sound.

36,164 is not a multiple of 256: upstream's concatenation of the 142 kept frames gains 0.73 frame per window on the true
time (its note decoder corrects for that later). Here every output frame n stands for sample 256 n and takes the kept
frame nearest to it, at most half a hop (128 samples, 5.8 ms) away, so no drift builds up.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE_RATE = 22_050
"""Hz."""
HOP = 256
"""Samples between frames."""
WINDOW = 43_844
"""Samples per window."""
STRIDE = 36_164
"""Samples between windows."""
LEAD = 3_840
"""Zeros before the sound, in samples: 15 frames, so the first kept frame is centred at sample 0."""
FIRST_ROW = 15
"""First kept frame of a window."""
KEPT_ROWS = 142
"""Kept frames per window."""

_SEAM = (STRIDE - HOP * (KEPT_ROWS - 1)) // 2
"""Half the gap of 68 samples between the last kept frame of a window and the first of the next."""


def frame_count(samples: Tensor) -> Tensor:
    """Frames of sounds of [A] samples: those centred before the end, `ceil(samples / 256)`, so at least 1."""
    return (samples + HOP - 1) // HOP


def locate(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Window and row of the kept frame nearest to sample `256 n`, for int64 frame numbers n of any shape."""
    window = (frames * HOP + _SEAM) // STRIDE
    row = (frames * HOP - window * STRIDE + HOP // 2) // HOP + FIRST_ROW
    return window, row


def cut(samples: Tensor, lengths: Tensor, sound: Tensor, window: Tensor) -> Tensor:
    """Windows `window` [W] of sounds `sound` [W] out of samples [A, N]: [W, 43844], zero outside each sound."""
    position = window[:, None] * STRIDE - LEAD + torch.arange(WINDOW, device=samples.device)
    inside = (position >= 0) & (position < lengths[sound][:, None])
    found = samples[sound[:, None], position.clamp(0, samples.shape[1] - 1)]
    return torch.where(inside, found, 0.0)
