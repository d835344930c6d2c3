"""Weights files: read without running code, and filled in without leaving a tensor out."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coatkit import AssetError, fill_weights, read_weights


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tensors_come_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    assert torch.equal(read_weights("mine", path)["a"], tensors["a"])


def test_a_file_of_the_older_format_comes_back(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert read_weights("mine", tmp_path / "w.pt")["a"].tolist() == [0, 1, 2]


def test_a_compressed_file_comes_back(tmp_path: Path) -> None:
    """As some hosts pack files again; mapped into memory it would be read as noise."""
    torch.save({"a": torch.zeros(5000)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as stored, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "packed.pt").stat().st_size < 5000
    assert read_weights("mine", tmp_path / "packed.pt")["a"].eq(0).all()


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what memory a process holds")
def test_what_is_not_used_is_not_read(tmp_path: Path) -> None:
    used, unused = torch.arange(1000.0), torch.ones(1 << 25)
    torch.save({"model": {"w": used}, "optimizer": {"w": unused}}, tmp_path / "w.pt")
    before = own_memory()
    found = read_weights("mine", tmp_path / "w.pt")
    assert own_memory() - before < 1 << 25  # where the optimizer's state is four times that
    assert torch.equal(found["model"]["w"], used)


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
    before = (tmp_path / "w.pt").read_bytes()
    read_weights("mine", tmp_path / "w.pt")["a"].add_(1)
    assert (tmp_path / "w.pt").read_bytes() == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    torch.save({"a": torch.zeros(5000), "b": torch.ones(5000)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(AssetError, match=r"mine: .*w.pt cannot be read as weights: \S"):
        read_weights("mine", tmp_path / "w.pt")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("pwned", "w"))


def zipped(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b"not a tensor in sight"),
        ("a.pt", b"not a tensor in sight"),
        ("a.pt", b""),
        ("a.pt", pickle.dumps({"a": Evil()})),
        ("a.pt", b"PK\x03\x04" + b"\0" * 64),
        ("a.pt", zipped({"archive/data.pkl": pickle.dumps({"a": Evil()}), "archive/version": b"3"})),
        ("a.pt", zipped({"notes.txt": b"not a tensor in sight"})),
    ],
)
def test_damaged_and_dangerous_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError, match=rf"mine: .*{name} cannot be read as weights: \S"):
        read_weights("mine", tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"mine: there is no weights file .*gone\.pt"):
        read_weights("mine", tmp_path / "gone.pt")


def test_every_misfit_is_named() -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(AssetError) as caught:
        fill_weights("mine", Path("w.pt"), module, {"weight": torch.zeros(3, 3), "step": 4})
    for part in ("mine: w.pt", "missing bias", "unexpected step", "weight has shape (3, 3), expected (3, 2)"):
        assert part in str(caught.value)
    fill_weights("mine", Path("w.pt"), module, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert module.weight.detach().eq(1).all()
