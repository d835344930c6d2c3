"""Which reader opens which file: formats by name, and finding out the format of a file or folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from coatkit.data.rows import Rows
from coatkit.errors import DataError

READERS = {
    "coatkit": "coatkit.data.rows:JsonlRows",
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
    given: dict[str, Any] = {"question": question, "columns": columns}
    options = {key: value for key, value in given.items() if value}
    try:
        rows: Rows = getattr(importlib.import_module(module), cls)(path, **options)
    except TypeError:
        raise DataError(f"{path}: rows in the format {name!r} take no {' or '.join(options)}") from None
    return rows


def detect(path: Path) -> str:
    """The format of a file or folder, by its name and its first row.

    Raises:
        DataError: If it is none coatkit reads.
    """
    return "coatkit"
