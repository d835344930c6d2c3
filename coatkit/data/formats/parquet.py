"""Parquet files as data hubs have them: sounds in a column of bytes and path; one file, or a folder of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from coatkit.data.formats.columns import TableRows
from coatkit.errors import DataError

_SHARD = re.compile(r"(.+?)-\d+-of-\d+")


class ParquetRows(TableRows):
    """Rows of a Parquet file, or of all those in a folder, by name.

    Raises:
        DataError: If a folder has no such file, or files of several splits.
    """

    def __init__(self, path: Path, question: str | None = None, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(path, _files(path) if path.is_dir() else [path], question, columns)


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.parquet"))
    if not found:
        inner = sorted({str(file.parent.relative_to(folder)) for file in folder.glob("*/*.parquet")})
        hint = f"; there are some in {', '.join(inner[:5])}" if inner else ""
        raise DataError(f"{folder}: holds no .parquet file{hint}")
    splits = sorted({match[1] for file in found if (match := _SHARD.fullmatch(file.stem))})
    if len(splits) > 1:
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}; put one split's files, or links, in a folder")
    return found
