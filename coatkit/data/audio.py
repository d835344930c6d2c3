"""Reading sound: soundfile to decode and seek, soxr to resample, mono float32, nothing normalised."""

from __future__ import annotations

import os

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from coatkit.data import containers
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError

Samples = NDArray[np.float32]

# TypeError: a headerless `.raw` file; ValueError: a name the file system cannot hold.
_UNREADABLE = (soundfile.SoundFileError, OSError, RuntimeError, MemoryError, TypeError, ValueError)


def duration(ref: AudioRef) -> float:
    """Seconds of a stretch, from the file's header.

    Raises:
        DataError: If the file cannot be opened, holds nothing, or the stretch lies outside it.
    """
    try:
        with containers.opened(ref) as file:
            info = soundfile.info(file)
    except _UNREADABLE as error:
        raise DataError(f"{ref}: cannot be opened as sound: {_reason(ref, error)}") from None
    start, stop = _frames(ref, info.samplerate, info.frames)
    return (stop - start) / int(info.samplerate)


def read(ref: AudioRef, max_seconds: float) -> tuple[Samples, int]:
    """A stretch as mono float32 samples [N] and its sample rate in Hz; channels are averaged.

    Raises:
        DataError: If it cannot be decoded, is empty, longer than `max_seconds`, or holds NaN or infinite samples.
    """
    try:
        with containers.opened(ref) as file, soundfile.SoundFile(file) as sound:
            rate: int = sound.samplerate
            start, stop = _frames(ref, rate, sound.frames)
            if (stop - start) / rate > max_seconds:
                raise DataError(f"{ref}: {(stop - start) / rate:.1f} s is over the limit of {max_seconds:g} s")
            sound.seek(start)
            samples = sound.read(stop - start, dtype="float32", always_2d=True)
    except _UNREADABLE as error:
        raise DataError(f"{ref}: cannot be decoded: {_reason(ref, error)}") from None
    # A header can promise more than the file holds; a tail of a few frames is a codec's rounding.
    if samples.shape[0] < (stop - start) - rate // 10:
        raise DataError(f"{ref}: truncated: {samples.shape[0]} of {stop - start} frames could be decoded")
    mono: Samples = samples.mean(axis=1, dtype=np.float32)
    if mono.size == 0:
        raise DataError(f"{ref}: holds no sound")
    if not np.isfinite(mono).all():
        raise DataError(f"{ref}: holds NaN or infinite samples")
    return mono, rate


def resample(samples: Samples, rate: int, to: int) -> Samples:
    """Samples [N] at `rate` Hz to [N'] at `to` Hz, soxr's high quality; at least one sample."""
    if rate == to:
        return samples
    out: Samples = soxr.resample(samples, rate, to, quality="HQ").astype(np.float32, copy=False)
    return out if out.size else np.zeros(1, np.float32)


def _frames(ref: AudioRef, rate: int, frames: int) -> tuple[int, int]:
    start = round((ref.start or 0.0) * rate)
    stop = frames if ref.end is None else round(ref.end * rate)
    if frames <= 0:
        raise DataError(f"{ref}: holds no sound")
    # Manifests round their times; a tenth of a second past the end is the end.
    if stop > frames + rate // 10 or start >= frames:
        raise DataError(
            f"{ref}: {ref.start or 0.0:g} to {ref.end if ref.end is not None else frames / rate:g} s"
            f" lies outside its {frames / rate:.2f} s"
        )
    return start, min(stop, frames)


def _reason(ref: AudioRef, error: BaseException) -> str:
    if not os.path.exists(ref.path):
        return "there is no such file"
    if os.path.isdir(ref.path):
        return "it is a folder"
    if os.path.getsize(ref.path) == 0:
        return "the file is empty"
    if isinstance(error, TypeError):
        return "its format has no header; convert it to WAV or FLAC"
    return str(error).rpartition(": ")[2].strip() or type(error).__name__
