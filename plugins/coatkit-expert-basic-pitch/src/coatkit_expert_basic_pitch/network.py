"""The contour branch of basic-pitch 0.4.0 in PyTorch, written from the graph of its ONNX model.

Samples -> constant-Q transform -> log power -> harmonic stack -> contour1 (z) -> contour2 (pitch logits, h). The note
and onset branches come after these and are not needed here.

Two convolutions are computed as matrix products, which give the same sums and are several times as fast on a CPU. The
harmonic stack is eight shifted copies of one map, so stack and contour1 together are linear in three rows of it: one
matrix. The low-pass filter between octaves has one channel, which convolution routines are slow at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 8
"""Channels of z: as many as the harmonic stack has copies."""
PITCH_BINS = 264
"""Bins of z and of the pitch logits, three per semitone: bin b is 27.5 * 2 ** ((b - 1) / 36) Hz, 440 Hz is bin 145."""
BINS_PER_OCTAVE = 36
LOWEST = 27.5
"""Frequency of bin 1, Hz."""

_OCTAVES = 9
_CQT_BINS = 309
"""The top bins that are kept of the 9 * 36 computed: 264 and the 45 that the highest harmonics reach above them."""
_CQT_LENGTH = 256
"""Samples in each of the 36 kernels; the same ones serve every octave, after halving the rate."""
_CQT_HOP = 256
_SHIFTS = (-36, 0, 36, 57, 72, 84, 93, 101)
"""Bins to the harmonics 0.5, 1, 2, ..., 7."""
_HALVED_AT_ONCE = 64
"""Samples of the halved signal that one row of the low-pass product makes."""


class Network(nn.Module):
    """Samples [W, N] at 22,050 Hz to z [W, 8, L, 264] and pitch logits [W, L, 264], L = 1 + N // 256.

    N is 43,844 upstream (L = 172); the log power is scaled to [0, 1] over each window, so z depends on where windows
    lie. A silent window gives finite values: its scaled power is 0.
    """

    cqt_real: Tensor
    cqt_imag: Tensor
    lowpass: Tensor
    bin_scale: Tensor
    norm_scale: Tensor
    norm_shift: Tensor
    contour1_matrix: Tensor
    lowpass_matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cqt_real", torch.zeros(BINS_PER_OCTAVE, 1, _CQT_LENGTH))
        self.register_buffer("cqt_imag", torch.zeros(BINS_PER_OCTAVE, 1, _CQT_LENGTH))
        self.register_buffer("lowpass", torch.zeros(1, 1, _CQT_LENGTH))
        self.register_buffer("bin_scale", torch.ones(_CQT_BINS))
        self.register_buffer("norm_scale", torch.ones(1))
        self.register_buffer("norm_shift", torch.zeros(1))
        self.contour1 = nn.Conv2d(CHANNELS, CHANNELS, (3, 39), padding=(1, 19))
        self.contour2 = nn.Conv2d(CHANNELS, 1, (5, 5), padding=(2, 2))
        self.register_buffer("contour1_matrix", torch.empty(0), persistent=False)
        self.register_buffer("lowpass_matrix", torch.empty(0), persistent=False)

    @torch.no_grad()
    def fold(self) -> None:
        """Make the two matrices from the weights; to be called once these are in."""
        each_bin = torch.eye(_CQT_BINS, device=self.lowpass.device)[:, None]
        stacks = _harmonics(each_bin)
        rows = [F.conv2d(stacks, kernel, padding=(0, 19)) for kernel in self.contour1.weight.split(1, dim=2)]
        # [3 rows of the map, 309 bins, 2112 features], channel outermost.
        self.contour1_matrix = torch.stack([row.flatten(1) for row in rows])
        each_sample = torch.eye(_CQT_LENGTH + 2 * (_HALVED_AT_ONCE - 1), device=self.lowpass.device)[:, None]
        self.lowpass_matrix = F.conv1d(each_sample, self.lowpass, stride=2)[:, 0]

    def cqt_power(self, samples: Tensor) -> Tensor:
        """Constant-Q power of samples [W, N]: [W, L, 309], lowest bin first."""
        signal = samples
        hop = _CQT_HOP
        octaves = []
        for octave in range(_OCTAVES):
            if octave > 0:
                signal = self._halve(signal)
                hop //= 2
            padded = F.pad(signal[:, None], (_CQT_LENGTH // 2, _CQT_LENGTH // 2), mode="reflect")
            real = F.conv1d(padded, self.cqt_real, stride=hop)
            imag = F.conv1d(padded, self.cqt_imag, stride=hop)
            octaves.append(real.square() + imag.square())
        power = torch.cat(octaves[::-1], dim=1)[:, -_CQT_BINS:]
        return power.transpose(1, 2) * self.bin_scale.square()

    def level(self, samples: Tensor) -> Tensor:
        """Log power of samples [W, N], scaled over each window: [W, L, 309]."""
        level = 10 * torch.log10(self.cqt_power(samples) + 1e-10)
        level = level - level.amin((1, 2), keepdim=True)
        top = level.amax((1, 2), keepdim=True)
        level = level / torch.where(top == 0, 1.0, top)
        return level * self.norm_scale + self.norm_shift

    def contour_features(self, level: Tensor) -> Tensor:
        """z: the ReLU output of contour1, from the level [W, L, 309] of rows with a neighbour on either side.

        Returns:
            [W, L - 2, 2112]: 8 channels of 264 bins, channel outermost.
        """
        before, here, after = self.contour1_matrix
        assert self.contour1.bias is not None
        z = level[:, :-2] @ before
        z += level[:, 1:-1] @ here
        z += level[:, 2:] @ after
        z += self.contour1.bias.repeat_interleave(PITCH_BINS)
        return z.relu_()

    def pitch_logits(self, features: Tensor) -> Tensor:
        """h: logits [W, L, 264] of z [W, 8, L, 264]; sigmoid gives upstream's contour. Sees two frames each way."""
        logits: Tensor = self.contour2(features)
        return logits[:, 0]

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """z and pitch logits of samples [W, N]."""
        # Beyond the first and last row the harmonic stack is zero, and so is the map it is linear in.
        features = self.contour_features(F.pad(self.level(samples), (0, 0, 1, 1)))
        features = features.unflatten(-1, (CHANNELS, PITCH_BINS)).transpose(1, 2)
        return features, self.pitch_logits(features)

    def _halve(self, signal: Tensor) -> Tensor:
        """Low-pass a signal [W, N] and keep every second sample: [W, N // 2]."""
        wanted = signal.shape[1] // 2
        rows = -(-wanted // _HALVED_AT_ONCE)
        length, hop = self.lowpass_matrix.shape[0], 2 * _HALVED_AT_ONCE
        padded = F.pad(signal, (127, (rows - 1) * hop + length - 127 - signal.shape[1]))
        return (padded.unfold(1, length, hop) @ self.lowpass_matrix).flatten(1)[:, :wanted]


def _harmonics(level: Tensor) -> Tensor:
    """Harmonic stack of levels [W, L, 309]: [W, 8, L, 264], each channel the level shifted by one harmonic."""
    # Zeros are padded after the normalisation, as in the graph: 0 is a middling level there, not silence.
    below = -_SHIFTS[0]
    level = F.pad(level, (below, PITCH_BINS + _SHIFTS[-1] - _CQT_BINS))
    return torch.stack([level[..., s + below : s + below + PITCH_BINS] for s in _SHIFTS], dim=1)
