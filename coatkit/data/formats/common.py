"""What readers of several formats share: rows of JSON, questions we ask, labels under their common names."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coatkit.data.rows import Fail, LineRows, Message, Row, text_of
from coatkit.errors import DataError
from coatkit.files import file_sha256

TRANSCRIBE = "Transcribe the speech."
"""What a row that holds a transcript alone is asked; ours."""
_LANGUAGE = ("lang", "locale", "source_lang")
_DURATION = ("seconds", "audio_duration")
_NOT_HEARD = ("images", "videos", "tools")


class JsonRows(LineRows):
    """Rows of a foreign format, one JSON object each.

    Args:
        question: What to ask about a row that holds a transcript alone.
    """

    def __init__(self, path: Path, question: str | None = None) -> None:
        self.question = question or TRANSCRIBE
        super().__init__(path)

    def row(self, index: int) -> Row:
        return self.parse(self.data(index), self.where(index), self.path.parent, self.question)

    def fingerprint(self) -> str:
        """SHA-256 of the file, the format and the question, in hex."""
        means = f"{type(self).__name__}\0{self.question}\0{file_sha256(self.path)}"
        return hashlib.sha256(means.encode()).hexdigest()

    @staticmethod
    @abstractmethod
    def parse(data: Any, where: str, folder: Path, question: str) -> Row:
        """One row's value to a checked row; paths are relative to `folder`.

        Raises:
            DataError: Naming `where` and the field.
        """


def failing(where: str) -> Fail:
    """Errors that begin with a row's place."""
    return lambda what: DataError(f"{where}: {what}")


def keys_of(data: Any, needs: str, fail: Fail) -> dict[str, Any]:
    """A copy of a row's keys and values."""
    if not isinstance(data, dict):
        raise fail(f"a row must be an object with {needs}, found {data!a:.40}")
    return dict(data)


def refuse_unheard(keys: Mapping[str, Any], fail: Fail) -> None:
    """Pictures, films and tools change what an answer means, so they are not passed over."""
    for key in _NOT_HEARD:
        if keys.get(key):
            raise fail(f"'{key}' cannot be used: a row is text and sounds; take the row out")


def exchange(question: Any, answer: Any, names: tuple[str, str], fail: Fail) -> list[Message]:
    """A question and its answer as turns."""
    asked, said = (text_of(value, f"'{name}'", fail) for value, name in zip((question, answer), names, strict=True))
    return [Message("user", asked), Message("assistant", said)]


def first_of(keys: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first name whose value is there; the last if none is."""
    return next((name for name in names if keys.get(name) is not None), names[-1])


def with_common_names(labels: dict[str, Any]) -> dict[str, Any]:
    """Labels, with `language` and `duration` (seconds) from the names other formats have for them."""
    for name, others, fits in (("language", _LANGUAGE, _is_text), ("duration", _DURATION, is_number)):
        if labels.get(name) is None and (found := [labels[key] for key in others if fits(labels.get(key))]):
            labels[name] = found[0]
    return labels


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def seconds(value: Any, name: str, fail: Fail) -> float | None:
    """A time in seconds, or None where it is not given."""
    if value is None:
        return None
    if not is_number(value) or value < 0 or not math.isfinite(value):
        raise fail(f"{name} must be seconds, found {value!a:.40}")
    return float(value)
