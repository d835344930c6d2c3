"""Rows of a JSONL manifest: checked messages, the sounds they refer to, and free labels.

A row: `{"id": ..., "messages": [{"role": "user", "content": "<audio>What is heard?"}, {"role": "assistant", ...}],
"audio": "a.flac", "start": 0.0, "end": 2.5, ...}`. Several sounds go in `audios`, a list of paths or of
`{"path", "start", "end"}`. Each `<audio>` tag in a user message places one sound, in order; a row with sounds and no
tag gets its tags at the start of the first user message. `"learn": false` in an assistant's message keeps the loss off
it. Times are seconds. Other keys are kept as labels.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from coatkit.data.lines import offsets, opened
from coatkit.errors import DataError
from coatkit.files import file_sha256, from_json

AUDIO_TAG = "<audio>"
ROOTS = "COATKIT_AUDIO_ROOTS"
"""Variable with the folders that sounds of rows have to be in, split by colons; any place where it is not set."""
_ROLES = {role: role for role in ("system", "user", "assistant")}
_SLICE = re.compile(r"(.+)#(\d+\+\d+)", re.DOTALL)
_CELL = re.compile(r"(.+)#(.+\[\d+\])", re.DOTALL)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

Fail = Callable[[str], DataError]
"""From what is wrong to an error that names the row's place."""


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
        samples: Mono samples [N] in about [-1, 1] and their sample rate in Hz, in place of a file; `path` names them.
    """

    path: Path
    start: float | None = None
    end: float | None = None
    part: str = ""
    samples: tuple[Any, int] | None = field(default=None, compare=False, repr=False)

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

    @property
    def question(self) -> str:
        """The last thing the user says, without audio tags."""
        return next(m.content for m in reversed(self.messages) if m.role == "user").replace(AUDIO_TAG, "")

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
    """A file with one JSON value on each line, or one JSON list; gzip-compressed or not.

    Only the rows' offsets are held, so millions of rows cost little.

    Raises:
        DataError: If the file cannot be read or is empty; and, on access, if a line is wrong (names line and field).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = opened(path)
            self._lines, self._starts, self._stops = offsets(path, self._file)
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
            return from_json(self.text(index))
        except ValueError as error:
            # Of a row, which is one line, json would say that it is wrong in line 1.
            raise DataError(f"{self.where(index)}: not valid JSON: {str(error).replace('line 1 ', '')}") from None


class JsonlRows(LineRows):
    """Rows in coatkit's own JSONL; the module's docstring shows one."""

    def row(self, index: int) -> Row:
        return parse_row(self.data(index), self.where(index), self.path.parent)


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
    row_id = extra.pop("id", None)
    messages = read_turns(extra.pop("messages", None), fail)
    return make_row(row_id, messages, read_sounds(extra, folder, fail), where, extra)


def read_turns(
    turns: Any,
    fail: Fail,
    *,
    name: str = "messages",
    keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = _ROLES,
    learn: str = "learn",
) -> list[Message]:
    """Check the turns of a row.

    Args:
        name: Their key, for messages.
        keys: Key of a turn's role and of its text.
        roles: What the roles are called to what they are.
        learn: Key that says whether an assistant's turn is learnt.
    """
    if not isinstance(turns, list) or not turns:
        raise fail(f"'{name}' must be a non-empty list of {{{', '.join(keys)}}}")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        role, content = (turn.get(keys[0]), turn.get(keys[1])) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in roles:
            raise fail(f"{name}[{i}].{keys[0]} is {role!r}; expected one of {', '.join(roles)}")
        content = text_of(content, f"{name}[{i}].{keys[1]}", fail)
        if turn.get("loss") is not None and learn != "loss":
            raise fail(f"{name}[{i}].loss is a key of ms-swift: set the source's format to ms-swift, or write 'learn'")
        marked = turn.get(learn)
        if marked not in (None, False, True):
            raise fail(f"{name}[{i}].{learn} must be true or false, found {marked!r}")
        messages.append(Message(roles[role], content, marked is None or bool(marked)))
    return messages


def text_of(value: Any, name: str, fail: Fail) -> str:
    """A field that must be text, of whole characters."""
    if not isinstance(value, str):
        raise fail(f"{name} must be text, found {type(value).__name__}")
    if not _encodable(value):
        raise fail(f"{name} holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return value


def make_row(
    row_id: Any,
    messages: Sequence[Message],
    audios: tuple[AudioRef, ...],
    where: str,
    labels: dict[str, Any],
    *,
    name: str = "messages",
) -> Row:
    """A row of turns and sounds that were read, its turns' order and its tags checked.

    Raises:
        DataError: Naming `where` and the turn.
    """

    def fail(what: str) -> DataError:
        return DataError(f"{where}: {what}")

    messages = list(messages)
    for i, message in enumerate(messages):
        if AUDIO_TAG in message.content and message.role != "user":
            raise fail(f"{name}[{i}]: {AUDIO_TAG} may stand in user messages only")
    if not any(m.role == "user" for m in messages):
        raise fail(f"'{name}' needs a user turn")
    if next(m.role for m in messages if m.role != "system") != "user":
        raise fail(f"'{name}' must start with the user, after an optional system message")
    for i, (message, after) in enumerate(pairwise(messages)):
        if message.role == after.role:
            raise fail(f"{name}[{i}] and {name}[{i + 1}] are both from the {message.role}")
    tags = sum(m.content.count(AUDIO_TAG) for m in messages)
    if tags == 0 and audios:
        first = next(i for i, m in enumerate(messages) if m.role == "user")
        messages[first] = Message("user", AUDIO_TAG * len(audios) + messages[first].content)
    elif tags != len(audios):
        raise fail(f"{tags} {AUDIO_TAG} tags in the messages but {len(audios)} sounds")
    given = "" if row_id is None else str(row_id)
    given = (given if _encodable(given) else ascii(given)) or f"line {where.rpartition(':')[2]}"
    return Row(given, tuple(messages), audios, where, labels)


def learning(row: Row, learn: str) -> Row:
    """The row with the answers marked that are learnt.

    Args:
        learn: `all`, or `last` for the last assistant message alone. What a row itself leaves out stays out.

    Raises:
        DataError: If it leaves out every answer.
    """
    answers = [i for i, m in enumerate(row.messages) if m.role == "assistant"]
    wanted = answers if learn == "all" else answers[-1:]
    if answers and not any(row.messages[i].learn for i in wanted):
        raise row.fail(f"the row keeps the loss off {'every' if learn == 'all' else 'its last'} answer")
    if wanted == answers:
        return row
    messages = tuple(replace(m, learn=i in wanted) for i, m in enumerate(row.messages))
    return replace(row, messages=messages)


def read_sounds(extra: dict[str, Any], folder: Path, fail: Fail) -> tuple[AudioRef, ...]:
    """Check a row's sounds, and take their keys out of `extra`."""
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
        if unknown := [key for key in entry if key not in ("path", "start", "end")]:
            raise fail(f"'{name}' has unknown keys {', '.join(map(ascii, unknown))}; known: path, start, end")
        found.append(sound_at(entry["path"], entry.get("start"), entry.get("end"), name, folder, fail))
    return tuple(found)


def sound_at(path: str, start: Any, end: Any, name: str, folder: Path, fail: Fail) -> AudioRef:
    """A stretch of a file, or of `FILE#OFFSET+LENGTH` or `TABLE#COLUMN[ROW]`.

    Args:
        start: Seconds, or None.
        name: The field, for messages.
        folder: What relative paths are relative to.

    Where the variable `COATKIT_AUDIO_ROOTS` names folders, the file has to be in one of them, seen through links.
    """
    if not path or not _encodable(path) or "\0" in path:
        raise fail(f"'{name}' is no file name: {path!a:.80}")
    if _ADDRESS.match(path):
        raise fail(f"'{name}' is an address, {path!a:.80}; fetch it first, coatkit reads files")
    times: list[float | None] = []
    for key, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise fail(f"'{key}' of {name} must be seconds, found {value!r}")
        if value is not None and not 0 <= value < 1e7:
            raise fail(f"'{key}' of {name} is {value}; seconds must be finite and not negative")
        times.append(None if value is None else float(value))
    if times[1] is not None and times[1] <= (times[0] or 0.0):
        raise fail(f"'end' of {name} ({times[1]} s) is not after its 'start' ({times[0] or 0.0} s)")
    inside = (_SLICE.fullmatch(path) or _CELL.fullmatch(path)) if "#" in path else None
    if inside and not os.path.lexists(folder / path):  # a file may really be called so
        ref = AudioRef(folder / inside[1], times[0], times[1], inside[2])
    else:
        ref = AudioRef(folder / path, times[0], times[1])
    if allowed := os.environ.get(ROOTS):
        real = os.path.realpath(ref.path)
        if not any(Path(real).is_relative_to(os.path.realpath(root)) for root in allowed.split(os.pathsep) if root):
            said = f"{path!a:.80}" if real == str(ref.path) else f"{path!a:.80}, which leads to {real!a:.200}"
            raise fail(f"'{name}' is outside {ROOTS} ({allowed}): {said}; add its folder there, or leave the row out")
    return ref


def _encodable(text: str) -> bool:
    """JSON may hold half a surrogate pair, which no tokenizer, file name or log file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
