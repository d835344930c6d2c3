"""A table's rows to rows: which column holds the sound, the question, the answer."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from coatkit.data.formats.common import TRANSCRIBE, exchange, failing, with_common_names
from coatkit.data.formats.tables import Table, class_names, has_bytes, is_bytes, is_list, open_table
from coatkit.data.rows import AudioRef, Fail, Message, Row, Rows, make_row, read_turns, sound_at
from coatkit.errors import DataError

USUAL = {
    "audio": ("audio", "audios"),
    "messages": ("messages", "conversations"),
    "question": ("question", "instruction", "prompt", "query"),
    "answer": ("answer", "response", "output", "text", "transcript", "transcription", "sentence", "caption", "label"),
    "id": ("id",),
    "start": ("start",),
    "end": ("end",),
}
"""What a row is made of to the columns that are looked for, the first that is there."""
_HEAD = 1 << 20
_WHOLE = 64 << 20


class TableRows(Rows):
    """Rows of one or several tables with the same columns.

    Args:
        path: What was opened, for messages.
        files: The tables, in order.
        question: What to ask about a row without a question.
        columns: `audio`, `messages`, `question`, `answer`, `id`, `start`, `end` to the column each is in.

    Raises:
        DataError: If a table cannot be read, is empty, or lacks a column; names it and what there is.
    """

    def __init__(
        self, path: Path, files: Sequence[Path], question: str | None, columns: Mapping[str, str] | None
    ) -> None:
        self.path, self.files, self.question = path, list(files), question or TRANSCRIBE
        tables = [open_table(file) for file in self.files]
        for table in tables:
            if table.schema.names != tables[0].schema.names:
                raise DataError(f"{table.path}: its columns are not those of {tables[0].path.name}")
        self.ends = list(accumulate(table.rows for table in tables))
        if not self.ends or not self.ends[-1]:
            raise DataError(f"{path}: holds no row")
        self.columns = _columns(tables[0], columns or {})
        self.classes = class_names(tables[0].schema)
        kind = tables[0].schema.field(self.columns["audio"]).type if "audio" in self.columns else pa.null()
        self.embedded, self.several = has_bytes(kind), is_list(kind)
        self.bytes = [field.name for field in tables[0].schema if is_bytes(field.type)]

    def __len__(self) -> int:
        return self.ends[-1]

    def where(self, index: int) -> str:
        table, at = self._place(index)
        return f"{table}[{at}]"

    def row(self, index: int) -> Row:
        file, at = self._place(index)
        where = f"{file}[{at}]"
        fail = failing(where)
        cells = open_table(file).row(at)
        for column, names in self.classes.items():
            if isinstance(number := cells.get(column), int):
                cells[column] = names[number] if 0 <= number < len(names) else None
        own = {part: cells.pop(column) for part, column in self.columns.items()}
        cells = {column: value for column, value in cells.items() if column not in self.bytes}
        audios = self._sounds(own, file, at, fail)
        row_id = f"{file.name}[{at}]" if own.get("id") is None else own["id"]
        name, messages = self._turns(own, fail)
        # What a question or answer was called may be filtered by.
        kept = {column: own[part] for part, column in self.columns.items() if part in ("question", "answer")}
        labels = with_common_names(cells | {key: value for key, value in kept.items() if value is not None})
        return make_row(row_id, messages, audios, where, labels, name=name)

    def fingerprint(self) -> str:
        """SHA-256 of the files, the columns and the question, in hex; of samples of files over 64 MiB.

        The sounds are in them, so they can be as large as all sounds together.
        """
        digest = hashlib.sha256(repr((sorted(self.columns.items()), self.question)).encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                if size <= _WHOLE:
                    digest.update(stream.read())
                    continue
                for i in range(64):
                    stream.seek(i * (size - _HEAD) // 63)
                    digest.update(stream.read(_HEAD))
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[Path, int]:
        number = bisect.bisect_right(self.ends, index)
        return self.files[number], index - (self.ends[number - 1] if number else 0)

    def _turns(self, own: Mapping[str, Any], fail: Fail) -> tuple[str, list[Message]]:
        if "messages" not in self.columns:
            asks, says = self.columns.get("question", "question"), self.columns["answer"]
            asked = self.question if own.get("question") is None else own["question"]
            if asked is self.question and own.get("audio") is None:
                raise fail("has no question and no sound to ask about")
            return "messages", exchange(_said(asked), _said(own["answer"]), (asks, says), fail)
        name, turns = self.columns["messages"], own["messages"]
        if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
            # `datasets` keeps a list of structs as a struct of lists when it is declared as Sequence({...}).
            turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
        first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
        keys = ("from", "value") if "from" in first else ("role", "content")
        learn = "loss" if "loss" in first else "learn"
        return name, read_turns(turns, fail, name=name, keys=keys, roles=SPEAKERS, learn=learn)

    def _sounds(self, own: Mapping[str, Any], file: Path, at: int, fail: Fail) -> tuple[AudioRef, ...]:
        value, column = own.get("audio"), self.columns.get("audio", "audio")
        start, end = own.get("start"), own.get("end")
        if value is None:
            return ()
        if self.several and (start is not None or end is not None):
            raise fail("'start' and 'end' go with one sound, not with a list")
        found = []
        for i, one in enumerate(value if self.several else [value]):
            name = f"{column}[{i}]" if self.several else column
            times = (start, end)
            if isinstance(one, dict) and self.several:
                times = (one.get("start"), one.get("end"))
            if self.embedded:
                ref = sound_at(file.name, *times, name, file.parent, fail)
                part = f"{column}[{at}]" + (f"[{i}]" if self.several else "")
                found.append(replace(ref, path=file, part=part))
                continue
            path = one.get("path") if isinstance(one, dict) else one
            if not isinstance(path, str):
                raise fail(f"'{name}' must be a path, found {type(path).__name__}")
            found.append(sound_at(path, *times, name, file.parent, fail))
        return tuple(found)


SPEAKERS = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def _said(value: Any) -> Any:
    """Numbers are fine answers; what else is not text is told by who takes it."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _columns(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    """The column each part of a row is in."""
    there = table.schema.names
    if wrong := [part for part in given if part not in USUAL]:
        raise DataError(f"{table.path}: columns.{wrong[0]} is no part of a row; there are {', '.join(USUAL)}")
    if wrong := [part for part, column in given.items() if column not in there]:
        raise DataError(f"{table.path}: columns.{wrong[0]}: there is no column {given[wrong[0]]!r}; {_list(there)}")
    found = dict(given)
    for part, names in USUAL.items():
        usual = [name for name in names if name in there and name not in found.values()]
        if part not in found and usual:
            found[part] = usual[0]
    if "audio" not in given and {"audio", "audios"} <= set(there):
        raise DataError(
            f"{table.path}: has the columns audio and audios; name the one with the sounds as columns.audio"
        )
    embedded = [field.name for field in table.schema if _is_sound(field.type)]
    if "audio" not in found and len(embedded) == 1:
        found["audio"] = embedded[0]
    if "audio" not in found and embedded:
        raise DataError(f"{table.path}: several columns hold sounds, {', '.join(embedded)}; name one as columns.audio")
    if "answer" in given or "question" in given:
        if "messages" in given:
            raise DataError(f"{table.path}: columns.messages goes without columns.question and columns.answer")
        found.pop("messages", None)
    if "messages" in found:
        found.pop("question", None)
        found.pop("answer", None)
    elif "answer" not in found:
        raise DataError(
            f"{table.path}: no column is known to hold the answer; name it as columns.answer; {_list(there)}"
        )
    if "audio" not in found:
        found.pop("start", None)
        found.pop("end", None)
    return found


def _is_sound(kind: Any) -> bool:
    """Whether a type is a sound, or a list of them, as `datasets` keeps it: a struct of bytes and path."""
    kind = kind.value_type if is_list(kind) else kind
    return pa.types.is_struct(kind) and {"bytes", "path"} == {field.name for field in kind}


def _list(names: Sequence[str]) -> str:
    return f"the columns are {', '.join(names)}"
