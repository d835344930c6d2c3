"""lhotse's cuts: MonoCut and MultiCut of recordings in files, as `CutSet.to_file` writes them (`.jsonl`, `.jsonl.gz`).

The answer is what the cut's supervisions say, in the order of their times; the question is ours or the spec's. The
custom fields `question` and `answer` of a cut come before these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coatkit.data.formats.common import JsonRows, exchange, failing, is_number, keys_of, seconds, with_common_names
from coatkit.data.rows import Fail, Row, make_row, sound_at

_ROUNDING = 0.1
"""Seconds by which a supervision may reach out of its cut."""
_SINGLE = ("language", "speaker", "gender")


class LhotseRows(JsonRows):
    """Rows that are lhotse's cuts."""

    @staticmethod
    def parse(data: Any, where: str, folder: Path, question: str) -> Row:
        fail = failing(where)
        keys = keys_of(data, "'recording' and 'supervisions'", fail)
        if "tracks" in keys or keys.get("type") in ("MixedCut", "PaddingCut"):
            raise fail("'type' is MixedCut or PaddingCut, whose sound is in no file; write it with lhotse's save_audio")
        start = seconds(keys.get("start"), "'start'", fail)
        length = seconds(keys.get("duration"), "'duration'", fail)
        if length is None:
            raise fail("'duration' is missing")
        end = (start or 0.0) + length
        sound = sound_at(_source(keys, fail), start, end, "recording.sources[0].source", folder, fail)
        custom = keys.get("custom") or {}
        if not isinstance(custom, dict):
            raise fail("'custom' must be an object")
        spoken = _supervisions(keys, fail)
        said, name = custom.get("answer"), "custom.answer"
        if said is None:
            said, name = _text(spoken, length, fail), "supervisions.text"
        asked = question if custom.get("question") is None else custom["question"]
        labels = {**custom, "duration": length}
        for key in _SINGLE:
            found = [one.get(key) for one in spoken]
            if found and isinstance(found[0], str) and all(one == found[0] for one in found):
                labels[key] = found[0]
        messages = exchange(asked, said, ("custom.question", name), fail)
        return make_row(keys.get("id"), messages, (sound,), where, with_common_names(labels))


def _source(cut: dict[str, Any], fail: Fail) -> str:
    """The one file of a cut's recording, all of whose channels are heard."""
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise fail("'recording' is missing: a cut of features alone holds no sound")
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise fail(
            "'recording.sources' must be a list of one; write recordings of several files with lhotse's save_audio"
        )
    if (kind := sources[0].get("type")) != "file":
        raise fail(f"recording.sources[0].type is {kind!r}; only sound in a file is read, write it with save_audio")
    path = sources[0].get("source")
    if not isinstance(path, str):
        raise fail(f"recording.sources[0].source must be a path, found {type(path).__name__}")
    transforms = recording.get("transforms") or []
    if not isinstance(transforms, list):
        raise fail("'recording.transforms' must be a list")
    names = [one.get("name") if isinstance(one, dict) else one for one in transforms]
    # Sounds are resampled to what the model hears in any case; anything else changes the sound.
    if other := [name for name in names if name != "Resample"]:
        raise fail(f"recording.transforms holds {other[0]!r}, which is not done here; write the cut with save_audio")
    heard = cut.get("channel", 0)
    heard, there = heard if isinstance(heard, list) else [heard], sources[0].get("channels", [0])
    if not isinstance(there, list) or len(heard) != len(there):
        raise fail(
            f"'channel' is {cut.get('channel')!r} of {there!r}: channels are averaged here; write it with save_audio"
        )
    return path


def _supervisions(cut: dict[str, Any], fail: Fail) -> list[dict[str, Any]]:
    found = cut.get("supervisions")
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise fail("'supervisions' must be a list of objects")
    return sorted(found, key=lambda one: float(one["start"]) if is_number(one.get("start")) else 0.0)


def _text(spoken: list[dict[str, Any]], length: float, fail: Fail) -> str:
    texts = []
    for i, one in enumerate(spoken):
        if one.get("text") is None:
            continue
        if not isinstance(one["text"], str):
            raise fail(f"supervisions[{i}].text must be text, found {type(one['text']).__name__}")
        start, lasts = one.get("start", 0), one.get("duration", 0)
        if not is_number(start) or not is_number(lasts):
            raise fail(f"supervisions[{i}].start and .duration must be seconds")
        if start < -_ROUNDING or start + lasts > length + _ROUNDING:
            raise fail(
                f"supervisions[{i}] is from {start:g} to {start + lasts:g} s, outside the cut's {length:g} s, so"
                " its text is not all heard; cut with lhotse's trim_to_supervisions"
            )
        texts.append(one["text"].strip())
    if not any(texts):
        raise fail("'supervisions' holds no text, and 'custom' no answer")
    return " ".join(texts)
