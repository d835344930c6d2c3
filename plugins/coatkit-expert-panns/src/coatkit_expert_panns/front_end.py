"""Sound to log-mel frames, as PANNs hears it: 64 bands from 50 Hz to 14 kHz, 100 frames per second.

Frame t is centred at sample 320 t. The window of 1,024 samples reaches beyond both ends of a sound, which is mirrored
there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 32_000
"""Hz."""
HOP = 320
"""Samples between frames: 10 ms."""
WINDOW = 1_024
"""Samples per frame."""
BANDS = 64
"""Mel bands."""
BINS = WINDOW // 2 + 1
"""Bins of the spectrum."""

_LOWEST, _HIGHEST = 50.0, 14_000.0
_FLOOR = 1e-10
"""Least power in a band: -100 dB."""
_FRAMES_AT_ONCE = 2_048
"""Bounds memory to some 20 MB."""


def frame_count(samples: Tensor) -> Tensor:
    """Frames of sounds of [A] samples."""
    return samples // HOP + 1


def log_mel(sound: Tensor, bank: Tensor) -> Tensor:
    """Levels [frames, 64] in dB of one sound [N], N at least 513; `bank` [513, 64] weighs power into bands."""
    padded = F.pad(sound[None], (WINDOW // 2, WINDOW // 2), mode="reflect")[0]
    window = torch.hann_window(WINDOW, device=sound.device)
    levels = []
    for frames in torch.split(padded.unfold(0, WINDOW, HOP), _FRAMES_AT_ONCE):
        spectrum = torch.view_as_real(torch.fft.rfft(frames * window))
        power = spectrum.square_().sum(-1)
        levels.append((power @ bank).clamp_(min=_FLOOR).log10_().mul_(10))
    return torch.cat(levels)


def windowed_fourier() -> tuple[Tensor, Tensor]:
    """Kernels [513, 1, 1024] for the real and imaginary part of a windowed frame's spectrum, float32.

    PANNs' checkpoints hold their front end as two convolutions with these.
    """
    time = torch.arange(WINDOW, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * time / WINDOW)
    # The product of bin and sample is taken modulo 1024 first, so the angle is exact.
    turns = (torch.arange(BINS)[:, None] * torch.arange(WINDOW)) % WINDOW
    angle = turns.double() * (2 * math.pi / WINDOW)
    return (window * angle.cos())[:, None].float(), (-window * angle.sin())[:, None].float()


def mel_bank() -> Tensor:
    """Weights [513, 64] of triangular bands evenly spaced on Slaney's mel scale, each of unit area in Hz.

    Only random weights use it: a checkpoint brings its own.
    """
    lowest, highest = _mel(torch.tensor([_LOWEST, _HIGHEST], dtype=torch.float64)).tolist()
    edges = _hertz(torch.linspace(lowest, highest, BANDS + 2, dtype=torch.float64))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = torch.linspace(0, SAMPLE_RATE / 2, BINS, dtype=torch.float64)[:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


_LINEAR = 200 / 3
"""Hz per mel up to 1 kHz; above, 27 mels make a factor of 6.4."""
_STEP = math.log(6.4) / 27


def _mel(hertz: Tensor) -> Tensor:
    return torch.where(hertz < 1_000, hertz / _LINEAR, 15 + (hertz / 1_000).log() / _STEP)


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * _LINEAR, 1_000 * ((mel - 15) * _STEP).exp())
