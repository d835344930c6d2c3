"""Spoiled sound files of ten kinds, as files, as slices of a shard, and as cells of a table."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import mutate
import numpy as np
import soundfile
from harness import Case

KINDS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "adpcm.wav": ("WAV", "MS_ADPCM"),
    "rf64": ("RF64", "PCM_24"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "ULAW"),
    "caf": ("CAF", "ALAC_16"),
}
M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + b"\xff\xff\xff\xffmdat" + bytes(500)
LONGEST = 10.0


def _read(ref) -> None:  # type: ignore[no-untyped-def]
    from coatkit.data import audio

    length = audio.duration(ref)
    assert 0 < length < 1e7, f"insane length {length}"
    samples, rate = audio.read(ref, LONGEST)
    assert samples.ndim == 1, samples.shape
    assert 0 < samples.size <= (LONGEST + 0.1) * rate, (samples.size, rate)
    assert np.isfinite(samples).all()


def sounds(folder: Path, draw: random.Random) -> Iterator[Case]:
    from coatkit.data.rows import AudioRef

    noise = np.random.default_rng(1).normal(size=(24_000, 2)).astype(np.float32)
    good: dict[str, bytes] = {"m4a": M4A}
    for suffix, (kind, coding) in KINDS.items():
        path = folder / f"good.{suffix}"
        soundfile.write(path, 0.1 * noise, 48_000 if suffix == "opus" else 24_000, format=kind, subtype=coding)
        good[suffix] = path.read_bytes()
    for suffix in KINDS:
        yield f"{suffix} as it is", lambda suffix=suffix: _read(AudioRef(folder / f"good.{suffix}"))
    for number in range(1, 1 << 30):
        suffix = draw.choice(list(good))
        content = mutate.raw(draw, good[suffix])
        path = folder / f"spoiled.{draw.choice((suffix, suffix, 'wav', 'flac'))}"
        way = draw.random()
        if way < 0.7:
            path.write_bytes(content)
            ref = AudioRef(path)
        elif way < 0.85:
            start = draw.choice((0, 512, 3))
            path.write_bytes(bytes(start) + content + bytes(1024))
            length = draw.choice((len(content), len(content) // 2, 2**40, 0, -1))
            ref = AudioRef(path, part=f"{draw.choice((start, start, -1, 2**50))}+{length}")
        else:
            path.write_bytes(content)
            start = draw.choice((0.0, 0.3, 5.0, 1e18))
            ref = AudioRef(path, start=start, end=draw.choice((None, start + 0.2, 1e300)))
        yield f"{suffix} {number}", lambda ref=ref: _read(ref)
