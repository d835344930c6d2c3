"""Which reader opens which file: formats by name, and finding out the format of a file or folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from coatkit.data.lines import peek
from coatkit.data.rows import Rows
from coatkit.errors import DataError
from coatkit.files import without_waiting

READERS = {
    "coatkit": "coatkit.data.rows:JsonlRows",
    "ms-swift": "coatkit.data.formats.ms_swift:MsSwiftRows",
    "sharegpt": "coatkit.data.formats.sharegpt:SharegptRows",
    "nemo": "coatkit.data.formats.nemo:NemoRows",
    "lhotse": "coatkit.data.formats.lhotse:LhotseRows",
    "datasets": "coatkit.data.formats.datasets:DatasetsRows",
    "parquet": "coatkit.data.formats.parquet:ParquetRows",
    "mixture": "coatkit.data.mixture:MixtureRows",
}
"""Format to `module:Class` of its reader, made with `(path)` and, where it takes them, `question` and `columns`."""


def open_rows(
    path: Path, format: str = "auto", *, question: str | None = None, columns: Mapping[str, str] | None = None
) -> Rows:
    """Rows of a file or folder.

    Args:
        format: A name in `READERS`; `auto` looks at the name and the first row.
        question: What to ask about rows that hold a transcript or label alone.
        columns: For tables: `audio`, `question`, `answer`, ... to the column it is in.

    Raises:
        DataError: If it cannot be opened, or the format is unknown or does not take the options; names the file.
    """
    name = detect(path) if format == "auto" else format
    if name not in READERS:
        near = get_close_matches(name, READERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(READERS)}"
        raise DataError(f"{path}: there is no format {name!r}{hint}")
    module, _, cls = READERS[name].partition(":")
    reader = getattr(importlib.import_module(module), cls)
    given: dict[str, Any] = {"question": question, "columns": columns}
    options = {key: value for key, value in given.items() if value}
    if wrong := [key for key in options if key not in signature(reader).parameters]:
        raise DataError(f"{path}: rows in the format {name!r} take no {' and no '.join(wrong)}")
    rows: Rows = reader(path, **options)
    return rows


def detect(path: Path) -> str:
    """The format of a file or folder, by its name and its first rows.

    Where rows fit several formats, the one that says more: a message with `loss` is ms-swift's.

    Raises:
        DataError: If it is none coatkit reads; says what was found and what each format needs.
    """
    if path.is_dir():
        for format, pattern in _FOLDERS:
            if next(path.glob(pattern), None) is not None:
                return format
        raise DataError(f"{path}: the folder holds neither Parquet files nor what `datasets` saves with save_to_disk")
    try:
        with open(path, "rb", opener=without_waiting) as file:
            head = file.read(8)
        if head.startswith(b"PAR1"):
            return "mixture" if _is_mixture(path) else "parquet"
        if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            return "datasets"
        rows = [row for row in peek(path) if isinstance(row, dict)]
    except (OSError, ValueError):
        return "coatkit"  # whose own errors say what is wrong with it
    for format, _, fits in _ROWS:
        if any(fits(row) for row in rows):
            return format
    seen = list(dict.fromkeys(key for row in rows for key in row))
    if not seen:
        return "coatkit"
    needs = "".join(f"\n  {format}: {what}" for format, what, _ in _ROWS)
    raise DataError(
        f"{path}: rows with the keys {', '.join(map(ascii, seen[:20]))} are in no known format. A row needs,"
        f" in{needs}\n  Name the format in the spec if the first rows alone are odd."
    )


_FOLDERS = (
    ("datasets", "state.json"),
    ("datasets", "dataset_dict.json"),
    ("parquet", "*.parquet"),
    ("parquet", "*/*.parquet"),
)


def _is_ms_swift(row: dict[str, Any]) -> bool:
    turns = row.get("messages")
    if "messages" not in row:
        return "response" in row
    return isinstance(turns, list) and any(isinstance(turn, dict) and turn.get("loss") is not None for turn in turns)


_ROWS: tuple[tuple[str, str, Callable[[dict[str, Any]], bool]], ...] = (
    ("ms-swift", "messages with loss, or query and response", _is_ms_swift),
    ("coatkit", "messages (role, content), and audio or audios", lambda row: "messages" in row),
    ("sharegpt", "conversations (from, value), and audios", lambda row: "conversations" in row),
    ("lhotse", "recording and supervisions", lambda row: "recording" in row or "tracks" in row),
    ("nemo", "audio_filepath, and text or answer", lambda row: "audio_filepath" in row),
)
"""Formats of JSON rows, what one needs, and whether a row is in it; the first that fits is taken."""


def _is_mixture(path: Path) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        return b"coatkit.mixture" in (pyarrow.parquet.read_metadata(path).metadata or {})
    except (OSError, ValueError, pyarrow.ArrowException):
        return False
