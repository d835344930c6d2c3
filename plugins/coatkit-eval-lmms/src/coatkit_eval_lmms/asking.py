"""From a request of lmms-eval to a row: how long its answer may be, where it ends, its sounds. Needs no lmms-eval."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from coatkit import AUDIO_TAG, AudioRef, DataError, Message, PluginError, Row
from coatkit.data.audio import LONGEST_ASKED, read

Samples = NDArray[np.float32]
WINDOW = 16
"""Batches that are decoded and sorted by length together: sounds of that many are in memory at once."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, None),
    "top_p": (1, None),
    "top_k": (0, 1, None),
    "num_beams": (1, None),
}


@dataclass(frozen=True)
class How:
    """How requests are answered.

    Attributes:
        max_new_tokens: Longest answer.
        until: The answer ends before the first of these.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()

    def cut(self, answer: str) -> str:
        """The answer up to where it ends."""
        return answer[: min([at for end in self.until if (at := answer.find(end)) >= 0], default=len(answer))]


def how(kwargs: Mapping[str, Any], most: int) -> tuple[How, dict[str, Any]]:
    """A task's `generation_kwargs` as far as greedy decoding has a use for them, and those it has none for.

    Args:
        most: Tokens for a task that sets no `max_new_tokens`.

    Raises:
        PluginError: If `max_new_tokens` is no positive number, or `until` no text or texts.
    """
    left = dict(kwargs)
    tokens, until = left.pop("max_new_tokens", most), left.pop("until", None)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise PluginError(f"generation_kwargs: max_new_tokens must be a positive whole number, got {tokens!r}")
    ends = [until] if isinstance(until, str) else list(until or ())
    if not all(isinstance(end, str) for end in ends):
        raise PluginError(f"generation_kwargs: until must be a text or a list of texts, got {until!r}")
    changed = {k: v for k, v in left.items() if v not in _NEUTRAL.get(k, ())}
    return How(tokens, tuple(end for end in ends if end)), changed


@dataclass(frozen=True)
class Request:
    """One question of lmms-eval.

    Attributes:
        place: Of the request in the list that came.
        row: The question with its sounds, decoded.
        seconds: Of all its sounds.
    """

    place: int
    row: Row
    seconds: float


def request(place: int, text: str, visuals: Any, where: str, crop: float | None = None) -> tuple[Request, int]:
    """A request with its sounds decoded, and how many of them were cut.

    Args:
        text: The question. Its `<audio>` tags say where the sounds go; without tags they go before it.
        visuals: What the task's `doc_to_visual` gave: a list of sounds, or nothing.
        where: Task and document, for messages.
        crop: Seconds of a sound that are heard; None for all.

    Raises:
        DataError: If something is no sound or cannot be decoded, or the tags do not match; names `where`.
    """
    found = [one for one in (visuals if isinstance(visuals, list | tuple) else [visuals]) if one is not None]
    sounds, cut, seconds = [], 0, 0.0
    for i, one in enumerate(found):
        samples, rate = samples_of(one, f"{where}, sound {i + 1}")
        if crop is not None and len(samples) > round(crop * rate):
            samples, cut = samples[: round(crop * rate)], cut + 1
        seconds += len(samples) / rate
        sounds.append(AudioRef(Path(f"{where}, sound {i + 1}"), samples=(samples, rate)))
    tags = text.count(AUDIO_TAG)
    if tags not in (0, len(sounds)):
        raise DataError(f"{where}: the question has {tags} {AUDIO_TAG} tags for {len(sounds)} sound(s)")
    content = text if tags else AUDIO_TAG * len(sounds) + text
    if not content.replace(AUDIO_TAG, "").strip():
        raise DataError(f"{where}: the question is empty")
    return Request(place, Row(where, (Message("user", content),), tuple(sounds), where), seconds), cut


def samples_of(sound: Any, where: str) -> tuple[Samples, int]:
    """A sound as tasks give it, mono [N] in about [-1, 1], and its sample rate in Hz.

    Args:
        sound: A path; a dictionary of `array` and `sampling_rate`, of `bytes`, or of `path`; or torchcodec's decoder.

    Raises:
        DataError: If it is none of these, or cannot be decoded; names `where`.
    """
    if isinstance(sound, str | Path):
        return read(AudioRef(Path(sound)), LONGEST_ASKED)
    if hasattr(sound, "get_all_samples"):
        decoded = sound.get_all_samples()
        return _mono(np.asarray(decoded.data), where), int(decoded.sample_rate)
    if isinstance(sound, dict):
        if sound.get("array") is not None and sound.get("sampling_rate"):
            return _mono(np.asarray(sound["array"]), where), int(sound["sampling_rate"])
        if sound.get("bytes"):
            try:
                samples, rate = soundfile.read(io.BytesIO(sound["bytes"]), dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
                raise DataError(f"{where}: cannot be decoded: {error}") from None
            return _mono(samples.T, where), int(rate)
        if sound.get("path"):
            return read(AudioRef(Path(sound["path"])), LONGEST_ASKED)
    raise DataError(f"{where}: {type(sound).__name__} is no sound; coatkit hears sounds, and sees no images or videos")


def _mono(samples: NDArray[Any], where: str) -> Samples:
    """Samples [N] or [channels, N]; integers become fractions of full scale."""
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min or -np.iinfo(samples.dtype).max)
    if samples.ndim == 2:
        samples = samples.mean(0 if samples.shape[0] <= samples.shape[1] else 1)
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise DataError(f"{where}: no finite signal [N] or [channels, N], but of shape {samples.shape}")
    return samples.astype(np.float32)


def batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Requests of like length together, longest first, as `coatkit eval` asks them."""
    order = sorted(requests, key=lambda r: (-r.seconds, -len(r.row.messages[0].content), r.place))
    for at in range(0, len(order), size):
        yield order[at : at + size]
