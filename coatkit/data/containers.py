"""Sounds inside other files: a slice of any file (`shard.tar#OFFSET+LENGTH`), or a cell of a table.

A slice is read where it lies and nowhere else: names in a tar file are never looked at, so none can lead out of it.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coatkit.data.rows import AudioRef
from coatkit.errors import DataError

_SLICE = re.compile(r"(\d+)\+(\d+)")
_CELL = re.compile(r"(.+?)\[(\d+)\](?:\[(\d+)\])?", re.DOTALL)
_DIGITS = 18
"""Of the longest number that is taken: an exabyte, more than any file has."""


@contextmanager
def opened(ref: AudioRef) -> Iterator[str | Any]:
    """What soundfile opens a sound by: the file's path or, inside a container, a file object of that part alone.

    Raises:
        DataError: If the container cannot be read, or the part is not one of it; names both.
    """
    if not ref.part:
        yield str(ref.path)
    elif found := _SLICE.fullmatch(ref.part):
        with _slice(ref, *_numbers(ref, *found.groups())) as file:
            yield file
    elif found := _CELL.fullmatch(ref.part):
        yield _cell(ref, found[1], *_numbers(ref, found[2], *([found[3]] if found[3] else [])))
    else:
        raise DataError(f"{ref}: a part of a file is OFFSET+LENGTH in bytes, or COLUMN[ROW] of a table")


def _numbers(ref: AudioRef, *texts: str) -> list[int]:
    for text in texts:
        if len(text) > _DIGITS:
            raise DataError(f"{ref.path}: there is no place {text:.40} in it")
    return [int(text) for text in texts]


def _slice(ref: AudioRef, offset: int, length: int) -> io.BufferedReader:
    try:
        # A pipe would be waited for.
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EMFILE:
            raise  # no fault of the row
        raise DataError(f"{ref.path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{ref.path}: is no file")
        if length == 0:
            raise DataError(f"{ref}: a slice of 0 bytes")
        if offset + length > found.st_size:
            raise DataError(f"{ref}: the slice ends after byte {found.st_size}, where the file ends")
    except DataError:
        os.close(descriptor)
        raise
    return io.BufferedReader(_Slice(descriptor, offset, length))


def _cell(ref: AudioRef, column: str, row: int, item: int | None = None) -> Any:
    from coatkit.data.formats.tables import open_table  # pyarrow is needed by those alone who have tables

    data, path = open_table(ref.path).cell(column, row, item)
    if data is not None:
        if not data.size:
            raise DataError(f"{ref}: holds 0 bytes")
        return io.BufferedReader(_Buffer(memoryview(data).cast("B")))
    # Not every table of `datasets` holds the bytes: some leave the sounds where they were.
    if not os.path.isfile(beside := ref.path.parent / path):
        raise DataError(f"{ref}: holds no bytes but the path {path!a:.200}, and there is no such file")
    return str(beside)


class _Part(io.RawIOBase):
    """`length` bytes as a file. Seeking stays inside: what it raises, libsndfile's callbacks can only print."""

    def __init__(self, length: int) -> None:
        self.length, self.at = length, 0

    @abstractmethod
    def fill(self, view: memoryview) -> int:
        """Put bytes from `self.at` on into `view`, which is no longer than what is left; how many there were."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        self.at = min(max(0, base + offset), self.length)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        got = self.fill(view[: self.length - self.at])
        self.at += got
        return got


class _Buffer(_Part):
    """A file of bytes that are in memory, or mapped; they are not copied."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(len(data))
        self.data = data

    def fill(self, view: memoryview) -> int:
        view[:] = self.data[self.at : self.at + len(view)]
        return len(view)


class _Slice(_Part):
    """Bytes of an open file from `offset` on, as a file; closes it."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__(length)
        self.descriptor, self.offset = descriptor, offset

    def fill(self, view: memoryview) -> int:
        return os.preadv(self.descriptor, [view], self.offset + self.at)

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()
