"""Rows of a JSONL manifest: checked messages, the sounds they refer to, and free labels.

A row: `{"id": ..., "messages": [{"role": "user", "content": "<audio>What is heard?"}, {"role": "assistant", ...}],
"audio": "a.flac", "start": 0.0, "end": 2.5, ...}`. Several sounds go in `audios`, a list of paths or of
`{"path", "start", "end"}`. Each `<audio>` tag in a user message places one sound, in order; a row with sounds and no
tag gets its tags at the start of the first user message. Times are seconds. Other keys are kept as labels.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatkit.errors import DataError
from coatkit.files import file_sha256

AUDIO_TAG = "<audio>"
_ROLES = ("system", "user", "assistant")
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        learn: For an assistant's turn: whether cross-entropy is taken on it.
    """

    role: str
    content: str
    learn: bool = True


@dataclass(frozen=True)
class AudioRef:
    """A stretch of a sound file; `start` and `end` in seconds, None for the file's own.

    Attributes:
        part: Where in `path` the sound file is, when that is a container: `OFFSET+LENGTH` in bytes, as in
            `shard.tar#512+32044`; or a cell of a table, as in `rows.parquet#audio[17]`. Empty: `path` is the sound.
    """

    path: Path
    start: float | None = None
    end: float | None = None
    part: str = ""

    def __str__(self) -> str:
        return f"{self.path}#{self.part}" if self.part else str(self.path)


@dataclass(frozen=True)
class Row:
    """One checked row.

    Attributes:
        id: The row's id, or `line N`.
        messages: Turns; the audio tags in them match `audios` in number and order.
        audios: The sounds.
        where: `file:line`, for messages.
        labels: Every other key of the row.
    """

    id: str
    messages: tuple[Message, ...]
    audios: tuple[AudioRef, ...] = ()
    where: str = "row"
    labels: dict[str, Any] = field(default_factory=dict)

    def fail(self, what: str) -> DataError:
        """An error that names this row."""
        return DataError(f"{self.where} (row {self.id}): {what}")


class Rows(Sequence[Row]):
    """Rows that can be read in any order, from a file or a folder; made anew from `path` in every worker process.

    A reader of a format subclasses it. Opening must cost offsets, not rows: manifests hold millions.

    Attributes:
        path: What was opened.
    """

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Row:
        """Read and check one row, 0 <= index < len.

        Raises:
            DataError: If it is wrong; names the file, the line and the field.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """`file:line` of a row, or what says the same in this format."""

    def fingerprint(self) -> str:
        """SHA-256 of the rows' text, in hex: of the file as it is."""
        return file_sha256(self.path)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(int(index) % len(self))


class LineRows(Rows):
    """A file with one JSON value on each line. Only the lines' offsets are held, so millions of rows cost little.

    Raises:
        DataError: If the file cannot be read or is empty; and, on access, if a line is wrong (names line and field).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self._lines, self._starts, self._stops = _line_offsets(self._file)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not len(self._lines):
            raise DataError(f"{path}: the file {'holds no row' if path.stat().st_size else 'is empty'}")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        LineRows.__init__(self, state["path"])

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self.path}:{int(self._lines[index]) + 1}"

    def text(self, index: int) -> bytes:
        """One line as it is in the file."""
        start, stop = int(self._starts[index]), int(self._stops[index])
        # Not a memory map: a file that shrinks while it is mapped kills the process.
        return os.pread(self._file.fileno(), stop - start, start)

    def data(self, index: int) -> Any:
        """The JSON value of one line."""
        try:
            return json.loads(self.text(index))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(index)}: not valid JSON: {error}") from None


class JsonlRows(LineRows):
    """Rows in coatkit's own JSONL; the module's docstring shows one."""

    def row(self, index: int) -> Row:
        return parse_row(self.data(index), self.where(index), self.path.parent)


def _line_offsets(file: FileIO) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number, start and stop of every line that is not blank."""
    found, size = [], 0
    while block := file.read(_BLOCK):
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
        size += len(block)
    ends = np.concatenate([*found, np.zeros(0, np.int64)])
    starts, stops = np.concatenate([[0], ends + 1]), np.concatenate([ends, [size]])
    # Blank lines are no rows. Only short ones are looked at: no row is short.
    keep = np.ones(len(starts), bool)
    for i in np.flatnonzero(stops - starts < 64):
        keep[i] = bool(os.pread(file.fileno(), int(stops[i] - starts[i]), int(starts[i])).strip())
    if keep.all():
        return np.arange(len(starts)), starts, stops
    return np.flatnonzero(keep), starts[keep], stops[keep]


def parse_row(data: Any, where: str, folder: Path) -> Row:
    """Check one row's data; paths are relative to `folder`.

    Raises:
        DataError: Naming `where` and the field.
    """

    def fail(what: str) -> DataError:
        return DataError(f"{where}: {what}")

    if not isinstance(data, dict):
        raise fail(f"a row must be an object with 'messages', found {str(data)[:40]!r}")
    extra = dict(data)
    found_id = extra.pop("id", None)
    row_id = "" if found_id is None else str(found_id)
    row_id = (row_id if _encodable(row_id) else ascii(row_id)) or f"line {where.rpartition(':')[2]}"
    turns = extra.pop("messages", None)
    if not isinstance(turns, list) or not turns:
        raise fail("'messages' must be a non-empty list of {role, content}")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in _ROLES:
            raise fail(f"messages[{i}].role is {role!r}; expected one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise fail(f"messages[{i}].content must be text, found {type(content).__name__}")
        if not _encodable(content):
            raise fail(f"messages[{i}].content holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
        if AUDIO_TAG in content and role != "user":
            raise fail(f"messages[{i}]: {AUDIO_TAG} may stand in user messages only")
        messages.append(Message(role, content))
    if not any(m.role == "user" for m in messages):
        raise fail("'messages' needs a user turn")
    if next(m.role for m in messages if m.role != "system") != "user":
        raise fail("'messages' must start with the user, after an optional system message")
    for i, (message, after) in enumerate(pairwise(messages)):
        if message.role == after.role:
            raise fail(f"messages[{i}] and messages[{i + 1}] are both from the {message.role}")
    audios = _audios(extra, folder, fail)
    tags = sum(m.content.count(AUDIO_TAG) for m in messages)
    if tags == 0 and audios:
        first = next(i for i, m in enumerate(messages) if m.role == "user")
        messages[first] = Message("user", AUDIO_TAG * len(audios) + messages[first].content)
    elif tags != len(audios):
        raise fail(f"{tags} {AUDIO_TAG} tags in the messages but {len(audios)} sounds")
    return Row(row_id, tuple(messages), audios, where, extra)


def _audios(extra: dict[str, Any], folder: Path, fail: Any) -> tuple[AudioRef, ...]:
    one, many = extra.pop("audio", None), extra.pop("audios", None)
    start, end = extra.pop("start", None), extra.pop("end", None)
    if one is not None and many:
        raise fail("give either 'audio' or 'audios', not both")
    if many is not None and not isinstance(many, list):
        raise fail("'audios' must be a list")
    if one is None and (start is not None or end is not None):
        raise fail("'start' and 'end' go with 'audio'; with 'audios' write {\"path\", \"start\", \"end\"} in the list")
    if one is not None and not isinstance(one, str):
        raise fail(f"'audio' must be a path, found {type(one).__name__}")
    entries: list[Any] = [{"path": one, "start": start, "end": end}] if one is not None else list(many or [])
    found: list[AudioRef] = []
    for i, entry in enumerate(entries):
        name = "audio" if one is not None else f"audios[{i}]"
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
            raise fail(f"'{name}' must be a path, or an object with 'path'")
        if not _encodable(entry["path"]) or "\0" in entry["path"]:
            raise fail(f"'{name}' is no file name: {entry['path']!a:.80}")
        if unknown := [key for key in entry if key not in ("path", "start", "end")]:
            raise fail(f"'{name}' has unknown keys {', '.join(map(ascii, unknown))}; known: path, start, end")
        times: list[float | None] = []
        for key in ("start", "end"):
            value = entry.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise fail(f"'{key}' of {name} must be seconds, found {value!r}")
            if value is not None and not 0 <= value < 1e7:
                raise fail(f"'{key}' of {name} is {value}; seconds must be finite and not negative")
            times.append(None if value is None else float(value))
        if times[1] is not None and times[1] <= (times[0] or 0.0):
            raise fail(f"'end' of {name} ({times[1]} s) is not after its 'start' ({times[0] or 0.0} s)")
        found.append(AudioRef(folder / entry["path"], times[0], times[1]))
    return tuple(found)


def _encodable(text: str) -> bool:
    """JSON may hold half a surrogate pair, which no tokenizer, file name or log file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
