"""Reading sound: soundfile to decode and seek, soxr to resample, mono float32, nothing normalised.

Files are not trusted. A header may say anything, so nothing is allocated by what it says: samples are decoded in blocks
and mixed to mono at once, and reading needs 8 bytes for each frame that is really there, and 16 MiB.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from coatkit.data import containers
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError

Samples = NDArray[np.float32]

MAX_CHANNELS = 64
"""As many as seventh-order ambisonics has; a header with more is taken for damage."""
LONGEST_ASKED = 600.0
"""Seconds of the longest sound that is read outside training, where no spec sets a limit."""
RATES = (100, 768_000)
"""Sample rates that are taken, Hz."""

# TypeError: a headerless `.raw` file; ValueError: a name the file system cannot hold.
_UNREADABLE = (soundfile.SoundFileError, OSError, RuntimeError, MemoryError, TypeError, ValueError)
_BLOCK = 1 << 21
"""Samples decoded at once, all channels together."""
_LOUDEST = 2.0**32
"""Float files may hold any scale, that of whole numbers of 32 bits too; beyond it lies damage."""
_LONGEST = 1e7
"""Seconds; a header that says more says nothing."""
_NO_SIZE = 0x7FFF_0000
"""Programs that write into a pipe cannot know a size, and put one from here up to 2**32 - 1."""
_HEADER = 128
_OGG_PAGE = 65_307
"""Bytes of the longest page."""
_SIZES = re.compile(r"^ *(?:data|SSND|Data Size|R?[Ii]ff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_FIELDS = re.compile(r"^  (Channels|Sample Rate|Block Align|Bit Width|Bytes/sec) *: (\d+)", re.MULTILINE)
_PCM = re.compile(r"Format +: 0x(?:1|3) =>")


def duration(ref: AudioRef) -> float:
    """Seconds of a stretch, from the file's header.

    Raises:
        DataError: If the file cannot be opened, holds nothing, or the stretch lies outside it; names the file.
    """
    if ref.samples is not None:
        samples, rate = _given(ref, _LONGEST)
        return float(len(samples) / rate)
    with _sound(ref, "opened as sound") as sound:
        start, stop = _frames(ref, sound.samplerate, sound.frames)
        return (stop - start) / int(sound.samplerate)


def read(ref: AudioRef, max_seconds: float) -> tuple[Samples, int]:
    """A stretch as mono float32 samples [N] and its sample rate in Hz; channels are averaged.

    Raises:
        DataError: If it cannot be decoded, is empty, longer than `max_seconds`, or holds NaN or infinite samples; names
            the file.
    """
    if ref.samples is not None:
        return _given(ref, max_seconds)
    with _sound(ref, "decoded") as sound:
        rate: int = sound.samplerate
        start, stop = _frames(ref, rate, sound.frames)
        if (stop - start) / rate > max_seconds:
            raise DataError(f"{ref}: {(stop - start) / rate:.1f} s is over the limit of {max_seconds:g} s")
        sound.seek(start)
        mono = _mono(sound, stop - start)
    # A header can promise more than the file holds; a tail of a few frames is a codec's rounding.
    if mono.size < (stop - start) - rate // 10:
        raise DataError(f"{ref}: truncated: {mono.size} of {stop - start} frames could be decoded")
    if mono.size == 0:
        raise DataError(f"{ref}: holds no sound")
    low, high = float(mono.min()), float(mono.max())  # NaN if any sample is
    if not -np.inf < low <= high < np.inf:
        raise DataError(f"{ref}: holds NaN or infinite samples")
    if max(-low, high) > _LOUDEST:
        raise DataError(f"{ref}: holds samples up to {max(-low, high):.0e}, which no sound has; it is damaged")
    return mono, rate


def _given(ref: AudioRef, max_seconds: float) -> tuple[Samples, int]:
    """Samples that are in memory already, checked."""
    assert ref.samples is not None
    given, rate = np.asarray(ref.samples[0]), int(ref.samples[1])
    if not np.issubdtype(given.dtype, np.floating):
        raise DataError(f"{ref}: samples must be floats in about [-1, 1]; divide 16-bit integers by 32768")
    if rate < 1:
        raise DataError(f"{ref}: the sample rate must be in Hz, got {ref.samples[1]}")
    if given.ndim != 1 or given.size == 0 or not np.isfinite(given).all():
        raise DataError(f"{ref}: samples must be a non-empty finite mono signal [N], got shape {given.shape}")
    if given.size / rate > max_seconds:
        raise DataError(f"{ref}: {given.size / rate:.1f} s is over the limit of {max_seconds:g} s")
    return given.astype(np.float32), rate


def resample(samples: Samples, rate: int, to: int) -> Samples:
    """Samples [N] at `rate` Hz to [N'] at `to` Hz, soxr's high quality; at least one sample."""
    if rate == to:
        return samples
    out: Samples = soxr.resample(samples, rate, to, quality="HQ").astype(np.float32, copy=False)
    return out if out.size else np.zeros(1, np.float32)


@contextmanager
def _sound(ref: AudioRef, done: str) -> Iterator[Any]:
    """An open file whose header makes sense; what goes wrong until it is closed says that it cannot be `done`."""
    try:
        if not ref.part:
            _check_kind(ref)
        with containers.opened(ref) as file, soundfile.SoundFile(file) as sound:
            _check_header(ref, sound)
            if sound.format == "OGG":
                _check_end(ref, file)
            yield sound
    except _UNREADABLE as error:
        os.close(os.open(os.devnull, os.O_RDONLY))  # an OSError when descriptors ran out, which is no fault of the row
        raise DataError(f"{ref}: cannot be {done}: {_reason(ref, error)}") from None


def _check_kind(ref: AudioRef) -> None:
    """A pipe would be waited for, and a device never ends."""
    mode = os.stat(ref.path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{ref}: cannot be opened as sound: it is no file but a pipe, socket or device")


def _check_header(ref: AudioRef, sound: Any) -> None:
    """What libsndfile lets pass, and what it writes into its log without objecting."""
    rate, channels = sound.samplerate, sound.channels
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"{ref}: its header says {rate} Hz; {RATES[0]} to {RATES[1]:,} Hz are taken")
    if channels > MAX_CHANNELS:
        raise DataError(f"{ref}: its header says {channels} channels; {MAX_CHANNELS} at most are taken")
    if sound.frames / rate > _LONGEST:
        raise DataError(f"{ref}: its header does not say how long it is; convert it again: {_CONVERT}")
    log = sound.extra_info
    field = {name: int(value) for name, value in _FIELDS.findall(log)}
    if len(field) == 5 and _PCM.search(log):
        frame = field["Channels"] * -(-field["Bit Width"] // 8)
        second = field["Sample Rate"] * field["Block Align"]
        # Some programs leave the bytes per second out.
        if field["Block Align"] != frame or field["Bytes/sec"] not in (0, second):
            raise DataError(
                f"{ref}: its header contradicts itself: {field['Channels']} channels of {field['Bit Width']} bits at"
                f" {field['Sample Rate']} Hz in {field['Block Align']} bytes a frame and {field['Bytes/sec']} a second"
            )
    for said, found in _SIZES.findall(log):
        # Some programs count their header too.
        if int(said) < _NO_SIZE and int(said) - int(found) > _HEADER:
            raise DataError(f"{ref}: truncated: {found} of {said} bytes are there")


def _check_end(ref: AudioRef, file: str | Any) -> None:
    """Ogg says its length nowhere, but marks its last page; without the mark the rest is missing."""
    if isinstance(file, str):
        with open(file, "rb") as stream:
            tail = _tail(stream)
    else:
        at = file.tell()  # libsndfile reads the same file object
        tail = _tail(file)
        file.seek(at)
    page = tail.rfind(b"OggS")
    if page < 0 or page + 5 >= len(tail) or not tail[page + 5] & 4:
        raise DataError(f"{ref}: truncated: its last page is missing")
    # The decoder leaves a page that is cut off out without a word, a second of sound. Byte 26 counts its lengths.
    body = page + 27
    count = tail[page + 26] if body <= len(tail) else len(tail)  # may be 0: some encoders end with an empty page
    if body + count + sum(tail[body : body + count]) > len(tail):
        raise DataError(f"{ref}: truncated: its last page is cut off")


def _tail(stream: Any) -> bytes:
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _OGG_PAGE))
    tail: bytes = stream.read()
    return tail


def _mono(sound: Any, frames: int) -> Samples:
    """The next `frames` frames, fewer at the end of the file."""
    step = max(1, _BLOCK // sound.channels)
    found: list[Samples] = []
    while frames > 0:
        block = sound.read(min(step, frames), dtype="float32", always_2d=True)
        if not len(block):
            break
        frames -= len(block)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of damage is told afterwards
            found.append(block[:, 0] if sound.channels == 1 else block.mean(axis=1, dtype=np.float32))
    return found[0] if len(found) == 1 else np.concatenate([*found, np.zeros(0, np.float32)])


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


_CONVERT = "ffmpeg -i IN -map a:0 OUT.flac"
_FOREIGN = (
    (re.compile(rb"....ftyp", re.DOTALL), "MP4 or M4A"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "WebM or Matroska"),
    (re.compile(rb"\x30\x26\xb2\x75"), "WMA or ASF"),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]|ADIF"), "AAC"),
    (re.compile(rb"#!AMR"), "AMR"),
    (re.compile(rb"wvpk"), "WavPack"),
    (re.compile(rb"MAC "), "Monkey's Audio"),
)
_OTHER = (
    (re.compile(rb"version https://git-lfs"), "it is a Git LFS pointer; run `git lfs pull`"),
    (
        re.compile(rb"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE),
        "it is a web page, as failed downloads leave",
    ),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf"), "it is an archive; unpack it"),
)


# What libsndfile says of a file whose name ends in .mp3, of a damaged FLAC file, and of a rate it cannot hold.
_CLEARER = {
    "File does not exist or is not a regular file (possibly a pipe?).": "it holds no frame of MP3",
    "Internal psf_fseek() failed.": "it is damaged or cut off",
    "SF_INFO struct incomplete.": "its header makes no sense",
}


def _reason(ref: AudioRef, error: BaseException) -> str:
    if isinstance(error, OSError) and not ref.part:
        if isinstance(error, FileNotFoundError) or not os.path.lexists(ref.path):
            return "there is no such file"
        return f"{error.strerror or error}"
    if not os.path.exists(ref.path):
        return "there is no such file"
    if os.path.isdir(ref.path):
        return "it is a folder"
    if os.path.getsize(ref.path) == 0:
        return "the file is empty"
    if isinstance(error, TypeError):
        return "its format has no header; convert it to WAV or FLAC"
    head = _head(ref)
    for pattern, name in _FOREIGN:
        if pattern.match(head):
            return f"{name} is not read; convert it: {_CONVERT}"
    for pattern, said in _OTHER:
        if pattern.match(head):
            return said
    said = str(error).rpartition(": ")[2].strip()
    return _CLEARER.get(said, said) or type(error).__name__


def _head(ref: AudioRef) -> bytes:
    try:
        with containers.opened(ref) as file:
            if not isinstance(file, str):
                return bytes(file.read(64))
            with open(file, "rb") as stream:
                return stream.read(64)
    except (OSError, DataError):
        return b""
