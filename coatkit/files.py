"""Files: their identity, and writing them so that a half-written one never stands under its name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes the place of `path`, synced, when the block ends without an error.

    Its name differs in every process, so that two that write the same file do not mix.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        rights = partial.stat().st_mode
        yield partial
        partial.chmod(rights)  # safetensors puts a file in its place that its writer alone may read
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there."""
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
