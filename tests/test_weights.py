"""Weights files: read without running code, and filled in without leaving a tensor out."""

import pickle
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


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("pwned", "w"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b"not a tensor in sight"),
        ("a.pt", b"not a tensor in sight"),
        ("a.pt", b""),
        ("a.pt", pickle.dumps({"a": Evil()})),
        ("a.pt", b"PK\x03\x04" + b"\0" * 64),
    ],
)
def test_damaged_and_dangerous_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AssetError, match=rf"mine: .*{name} cannot be read as weights: \w"):
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
