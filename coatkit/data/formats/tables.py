"""Tables on disk, read through pyarrow: Arrow files as `datasets` writes them, and Parquet.

Sounds in them are bytes in a column. A row is read without its bytes; a sound's bytes are read when it is opened, by
the sound's cell. Arrow files are mapped into memory, so both cost nothing but their pages. Parquet cannot be entered in
the middle of a row group: rows are kept a row group at a time, and sounds are read onwards from the last one asked for.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coatkit.errors import DataError
from coatkit.files import from_json

_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
_STREAM_BUFFER = 1 << 20
_CELLS_AT_ONCE = 4
_KEPT = 8
"""Row groups and places in row groups that a process keeps, over all Parquet files."""


class Table(ABC):
    """One file.

    Attributes:
        path: The file.
        schema: Its columns.
        rows: Number of rows.

    Raises:
        DataError: If it cannot be read; names the file.
    """

    path: Path
    schema: pa.Schema
    rows: int

    @abstractmethod
    def row(self, index: int) -> dict[str, Any]:
        """A row as plain data, True in place of bytes; what JSON does not have (a time, a decimal) as text."""

    @abstractmethod
    def value(self, column: str, index: int) -> Any:
        """One cell as pyarrow's scalar."""

    def cell(self, column: str, index: int, item: int | None) -> tuple[Any, str]:
        """The sound in one cell, or in one item of the list in it.

        Returns:
            Its bytes as a buffer, or None; and the path beside them, or nothing.

        Raises:
            DataError: If there is no such cell, or it holds no sound.
        """
        name = f"{self.path}#{column}[{index}]" + ("" if item is None else f"[{item}]")
        if not 0 <= index < self.rows:
            raise DataError(f"{name}: the table has {self.rows} rows")
        if self.schema.get_field_index(column) < 0:
            raise DataError(f"{name}: the table has no such column, or several of it")
        found = self._guarded(name, self.value, column, index)
        if item is not None and found.is_valid:
            if not is_list(found.type):
                raise DataError(f"{name}: the cell holds no list")
            if not 0 <= item < len(found.values):
                raise DataError(f"{name}: the list has {len(found.values)} sounds")
            found = found.values[item]
        path = ""
        if found.is_valid and pa.types.is_struct(found.type):
            there = [field.name for field in found.type]
            beside = found["path"] if there.count("path") == 1 else None
            path = str(beside.as_py() or "") if beside is not None and pa.types.is_string(beside.type) else ""
            found = found["bytes"] if there.count("bytes") == 1 else pa.scalar(None)
        if found.is_valid and is_binary(found.type):
            return found.as_buffer(), path
        if not path:
            raise DataError(f"{name}: holds neither the bytes of a sound nor a path")
        return None, path

    def _guarded(self, name: str, read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except _UNREADABLE as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{name}: cannot be read: {why:.200}") from None

    def _one_of_each(self, schema: pa.Schema) -> pa.Schema:
        for field in schema:
            list(_leaves(field.type))  # reads every name, which fails if one is not UTF-8
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{self.path}: several columns have the same name: {', '.join(schema.names)}")
        return schema


class ArrowTable(Table):
    """An Arrow file or stream, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[pa.RecordBatch] = self._guarded(str(path), self._open)
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self.rows = int(self.starts[-1])
        self.checked: set[int] = set()

    def _open(self) -> list[pa.RecordBatch]:
        source = pa.memory_map(str(self.path))
        if source.read_at(6, 0) == b"ARROW1":
            file = pa.ipc.open_file(source)
            self.schema = self._one_of_each(file.schema)
            return [file.get_batch(i) for i in range(file.num_record_batches)]
        stream = pa.ipc.open_stream(source)
        self.schema = self._one_of_each(stream.schema)
        return list(stream)

    def _batch(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch a row is in, and its place there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        batch = self.batches[number]
        if number not in self.checked:
            batch.validate(full=True)  # a damaged file's offsets would be followed anywhere
            self.checked.add(number)
        return batch, index - int(self.starts[number])

    def row(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = self._guarded(f"{self.path}[{index}]", self._row, index)
        return found

    def _row(self, index: int) -> dict[str, Any]:
        batch, at = self._batch(index)
        return {field.name: plain(batch.column(i)[at], field.name) for i, field in enumerate(self.schema)}

    def value(self, column: str, index: int) -> Any:
        batch, at = self._batch(index)
        return batch.column(column)[at]


class ParquetTable(Table):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: pq.ParquetFile = self._guarded(str(path), self._open)
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        if min(groups, default=0) < 0:
            raise DataError(f"{path}: cannot be read: a row group of {min(groups)} rows")
        self.starts = np.cumsum([0, *groups])
        self.rows = int(self.starts[-1])
        self.leaves: list[str] = self._guarded(str(path), self._leaves)

    def _open(self) -> pq.ParquetFile:
        # A buffer makes it read page after page, not a row group's sounds at once.
        file = pq.ParquetFile(str(self.path), buffer_size=_STREAM_BUFFER, pre_buffer=False)
        self.schema = self._one_of_each(file.schema_arrow)
        return file

    def _leaves(self) -> list[str]:
        """What a row is read from: all but bytes, unless a column has nothing else that tells null from a sound."""
        found: list[str] = []
        first = 0
        for field in self.schema:
            kinds = list(_leaves(field.type))
            paths = [self.file.schema.column(first + i).path for i in range(len(kinds))]
            light = [path for path, kind in zip(paths, kinds, strict=True) if not is_binary(kind)]
            found += light or paths
            first += len(kinds)
        return found

    def row(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = self._guarded(f"{self.path}[{index}]", self._row, index)
        return found

    def _row(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        found = _recent(_groups, (self, group))
        if found is None:
            found = self.file.read_row_group(group, columns=self.leaves, use_threads=False)
        _keep(_groups, (self, group), found)
        at = index - int(self.starts[group])
        return {name: plain(found.column(i)[at], name) for i, name in enumerate(found.column_names)}

    def value(self, column: str, index: int) -> Any:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        at = index - int(self.starts[group])
        place = _recent(_places, (self, column))
        if place is None or place[0] != group or at < place[1]:
            rest = self.file.iter_batches(_CELLS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False)
            place = (group, 0, next(rest, None), rest)
        _, start, batch, rest = place
        while batch is not None and at >= start + batch.num_rows:
            start, batch = start + batch.num_rows, next(rest, None)
        if batch is None:
            raise OSError("a row group ends early")
        _keep(_places, (self, column), (group, start, batch, rest))
        return batch.column(0)[at - start]


_groups: dict[Any, Any] = {}
_places: dict[Any, Any] = {}


def _recent(kept: dict[Any, Any], key: Any) -> Any:
    """Take out what was kept; a place that cannot be read on from must not stay."""
    return kept.pop(key, None)


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]
    kept[key] = value


def open_table(path: Path) -> Table:
    """A table, kept open by this process until the file changes.

    Raises:
        DataError: If it is none.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: is no file")
        # Another process must not share the place in a file.
        return _opened(path, found.st_size, found.st_mtime_ns, os.getpid())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(maxsize=256)
def _opened(path: Path, size: int, changed: int, process: int) -> Table:
    with path.open("rb", buffering=0) as file:
        parquet = file.read(4) == b"PAR1"
    return ParquetTable(path) if parquet else ArrowTable(path)


def is_binary(kind: Any) -> bool:
    """Whether a type is bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_list(kind: Any) -> bool:
    """Whether a type is a list."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def has_bytes(kind: Any) -> bool:
    """Whether a type is bytes, or has them inside."""
    return any(is_binary(leaf) for leaf in _leaves(kind))


def is_bytes(kind: Any) -> bool:
    """Whether a type is nothing but bytes, as in a list of them."""
    return all(is_binary(leaf) for leaf in _leaves(kind))


def class_names(schema: pa.Schema) -> Mapping[str, list[str]]:
    """Names of the classes of each column that `datasets` declared a ClassLabel."""
    try:
        features = from_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            str(name): [str(one) for one in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def plain(value: Any, name: str) -> Any:
    """A scalar as plain data; bytes as True, and left out of structs.

    Raises:
        ValueError: If it is text that is not UTF-8, or a time that Python cannot hold; names the column.
    """
    if not value.is_valid:
        return None
    if is_binary(value.type):
        return True
    if pa.types.is_struct(value.type):
        return {field.name: plain(value[i], name) for i, field in enumerate(value.type) if not is_binary(field.type)}
    if is_list(value.type):
        return [plain(one, name) for one in value.values]
    try:
        found = value.as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"column {name!r}: {error}") from None
    return found if isinstance(found, str | bool | int | float) else str(found)


def _leaves(kind: Any) -> Iterator[Any]:
    if pa.types.is_struct(kind):
        for field in kind:
            if field.name is not None:
                yield from _leaves(field.type)
    elif is_list(kind):
        yield from _leaves(kind.value_type)
    elif isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(kind.storage_type)
    elif pa.types.is_map(kind):
        yield from _leaves(kind.key_type)
        yield from _leaves(kind.item_type)
    else:
        yield kind
