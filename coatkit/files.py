"""Files: their identity, what is in them, and writing them so that a half-written one never stands under its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_text(path: Path, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file: a pipe would be waited for and a device read without end.

    Raises:
        OSError: If it cannot be read, or is no regular file.
        ValueError: If it is no UTF-8 and `errors` is `strict`.
    """
    with open(path, encoding="utf-8", errors=errors, opener=without_waiting) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return stream.read()


def without_waiting(path: str, flags: int) -> int:
    """An opener that does not wait for someone to write into a pipe; like this, reading an empty one is an error."""
    return os.open(path, flags | os.O_NONBLOCK)


def without_links(path: str, flags: int) -> int:
    """An opener for what is written into a folder that somebody else may have made: a link there could lead to any file
    of the user's.

    Raises:
        OSError: If a link stands under the name (ELOOP).
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def from_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: If it is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes the place of `path`, synced, when the block ends without an error.

    Its name differs in every process, so that two that write the same file do not mix.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch(exist_ok=False)
        rights = partial.stat().st_mode
        yield partial
        partial.chmod(rights)  # as in `let_read`
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def let_read(folder: Path, like: Path) -> None:
    """Give the weights below a folder the rights of another new file: safetensors lets their writer alone read them."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(like.stat().st_mode)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
