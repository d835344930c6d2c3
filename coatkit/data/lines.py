"""Where the rows of a text file lie: the lines of JSONL or the values of one JSON list, gzip-compressed or not."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from coatkit.errors import DataError
from coatkit.files import from_json, without_waiting

Offsets = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

_BLOCK = 1 << 24
_GZIP = b"\x1f\x8b"
_HEAD = 1 << 22
_UNPACKED_LIMIT = 16 << 30
_LIST_LIMIT = 1 << 30


def opened(path: Path) -> IO[bytes]:
    """A file that can be read at any place. A gzip file cannot: its text goes to an unnamed temporary file first.

    Raises:
        OSError: If it cannot be opened.
        DataError: If it is a damaged gzip file, or one that unpacks to over 16 GiB.
    """
    file = open(path, "rb", buffering=0, opener=without_waiting)  # noqa: SIM115, closed with the rows that hold it
    if os.pread(file.fileno(), 2, 0) != _GZIP:
        return file
    unpacked: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    size = 0
    try:
        with file, gzip.GzipFile(fileobj=file) as packed:
            while block := packed.read(_BLOCK):
                size += len(block)
                if size > _UNPACKED_LIMIT:
                    raise DataError(f"{path}: unpacks to over {_UNPACKED_LIMIT >> 30} GiB; unpack it yourself")
                unpacked.write(block)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is no whole gzip file: {error}") from None
    unpacked.seek(0)
    return unpacked


def offsets(path: Path, file: IO[bytes]) -> Offsets:
    """Line number (from 0), start and stop in bytes of every row, [R] each.

    A file that begins with `[` is one JSON list; it is parsed once, here, and only its values' places are kept.

    Raises:
        DataError: If a list is not valid JSON, or over 1 GiB.
    """
    if _after_mark(os.pread(file.fileno(), 4096, 0)).lstrip().startswith(b"["):
        found = _values(path, file)
        if found is not None:
            return found
    return _lines(file)


def peek(path: Path, count: int = 20) -> list[Any]:
    """The JSON values of the first rows, as far as the first 4 MiB hold whole ones; wrong rows are passed over.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb", opener=without_waiting) as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        try:
            head = gzip.GzipFile(fileobj=file).read(_HEAD) if packed else file.read(_HEAD)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return []
    text = _after_mark(head).decode(errors="replace")
    found: list[Any] = []
    if text.lstrip().startswith("["):
        at, decoder = text.index("[") + 1, json.JSONDecoder()
        try:
            while len(found) < count:
                value, at = decoder.raw_decode(text, _skip(text, at, " \t\r\n,"))
                found.append(value)
        except (ValueError, RecursionError):
            pass
        if found:
            return found
    for line in text.split("\n"):
        try:
            found += [from_json(line)] if line.strip() else []
        except ValueError:
            continue
        if len(found) == count:
            break
    return found


def _after_mark(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")


def _skip(text: str, at: int, what: str) -> int:
    while at < len(text) and text[at] in what:
        at += 1
    return at


def _lines(file: IO[bytes]) -> Offsets:
    """Every line that is not blank."""
    found, size = [], 0
    while block := os.pread(file.fileno(), _BLOCK, size):
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


def _values(path: Path, file: IO[bytes]) -> Offsets | None:
    """Every value of the list that is the whole file; None if the list is only its first line."""
    size = os.fstat(file.fileno()).st_size
    if size > _LIST_LIMIT:
        raise DataError(
            f"{path}: a JSON list of over {_LIST_LIMIT >> 30} GiB, which must be parsed whole; write one row a line"
        )
    try:
        text = b"".join(os.pread(file.fileno(), _BLOCK, at) for at in range(0, size, _BLOCK)).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: byte {error.start}") from None
    decoder, plain, space = json.JSONDecoder(), text.isascii(), " \t\r\n"
    lines, starts, stops = [], [], []
    seen = at = line = byte = 0

    def place(to: int) -> int:
        """Byte of a character; moves on from the last one asked for."""
        nonlocal seen, byte, line
        byte += to - seen if plain else len(text[seen:to].encode())
        line += text.count("\n", seen, to)
        seen = to
        return byte

    try:
        at = _skip(text, text.index("[") + 1, space)
        while text[at : at + 1] != "]":
            starts.append(place(at))
            lines.append(line)
            at = decoder.raw_decode(text, at)[1]
            stops.append(place(at))
            at = _skip(text, at, space)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1, space)
            elif text[at : at + 1] != "]":
                raise ValueError("expected ',' or ']'")
        if text[at + 1 :].strip():
            if "\n" not in text[: at + 1].strip():
                return None
            raise ValueError("there is text after the list")
    except (ValueError, RecursionError) as error:
        place(max(seen, min(at, len(text))))
        raise DataError(f"{path}:{line + 1}: not a valid JSON list: {error}") from None
    return np.array(lines, np.int64), np.array(starts, np.int64), np.array(stops, np.int64)
