"""Sounds the suites play: tones in noise, edge cases, and files as people have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from coatkit.data import audio as sound
from coatkit.data.audio import Samples
from coatkit.data.rows import AudioRef

FILES = ("8_bit", "stereo", "8_khz", "96_khz")
"""Kinds of file that `from_file` writes and reads."""


def tone(seconds: float, rate: int, seed: int = 0) -> Samples:
    """A decaying chord in noise, [N] float32: not periodic, nowhere silent, the same every time."""
    random = np.random.default_rng(seed)
    time = np.arange(max(1, round(seconds * rate))) / rate
    chord = sum(np.sin(2 * np.pi * f * time) for f in random.uniform(120, min(3_000, 0.4 * rate), size=3))
    made: Samples = (0.15 * chord * np.exp(-time / 3) + 0.03 * random.normal(size=time.size)).astype(np.float32)
    return made


def edge(kind: str, rate: int) -> Samples:
    """`silence` (0.5 s), `one_sample` or `tenth_of_a_second`, at `rate` Hz."""
    if kind == "silence":
        return np.zeros(rate // 2, np.float32)
    return np.full(1, 0.3, np.float32) if kind == "one_sample" else tone(0.1, rate)


def from_file(kind: str, folder: Path, rate: int) -> Samples:
    """0.4 s written as one of `FILES`, then read and resampled to `rate` Hz as training does."""
    path, written = folder / f"{kind}.wav", {"8_khz": 8_000, "96_khz": 96_000}.get(kind, 44_100)
    samples = tone(0.4, written, seed=4)
    if kind == "stereo":
        samples = np.stack([samples, -0.5 * samples], axis=1)
    soundfile.write(path, samples, written, subtype="PCM_U8" if kind == "8_bit" else "PCM_16")
    read, from_rate = sound.read(AudioRef(path), max_seconds=10.0)
    return sound.resample(read, from_rate, rate)
