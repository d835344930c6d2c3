"""Reading PANNs checkpoints: upstream's layout in both of torch's file formats, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coatkit import AssetError, AudioBatch
from coatkit_expert_panns import front_end, loading
from coatkit_expert_panns.expert import Panns
from coatkit_expert_panns.network import Network


def loaded(weights: str) -> Panns:
    expert = Panns(weights=weights)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


def features(expert: Panns) -> Tensor:
    sound = (0.1 * np.random.default_rng(0).standard_normal(12_000)).astype(np.float32)
    with torch.no_grad():
        return expert.encode(AudioBatch.from_arrays([sound], 32_000)).values


def sampler() -> dict[str, Any]:
    """State of upstream's `BalancedTrainSampler`, as its training writes it: arrays, and numbers of arrays."""
    indexes = [np.arange(5), np.arange(3, dtype=np.int32)]
    return {"indexes_per_class": indexes, "queue": [1, 0], "pointers_of_classes": [np.int64(2), 0]}


def hollow() -> dict[str, Tensor]:
    """Tensors of the right names and shapes that take no room in a file, but for the front end's."""
    with torch.device("meta"):
        wanted = Network().state_dict()
    tensors = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in wanted.items()}
    real, imaginary = front_end.windowed_fourier()
    tensors["spectrogram_extractor.stft.conv_real.weight"] = real
    tensors["spectrogram_extractor.stft.conv_imag.weight"] = imaginary
    return tensors


def read(path: Path) -> Network:
    """The part of loading that reads and checks."""
    with torch.device("meta"):
        network = Network()
    network.to_empty(device="cpu")
    loading._fill(network, path)
    return network


@pytest.fixture(scope="module")
def random() -> Panns:
    return loaded("random")


def test_upstream_checkpoint_equals(random: Panns, tmp_path: Path) -> None:
    assert random.network is not None
    path = tmp_path / "600000_iterations.pth"
    content = {"iteration": 600_000, "model": random.network.state_dict(), "sampler": sampler()}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # as in 2020
    expert = loaded(str(path))
    assert torch.equal(features(expert), features(random))
    assert expert.fingerprint() == random.fingerprint()
    assert expert.network is not None
    expert.network.fc_audioset.bias[3] += 1e-3
    assert expert.fingerprint() != random.fingerprint()


def test_random_features_are_of_order_one(random: Panns) -> None:
    assert 0.1 < features(random).std() < 10


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("top", ["model", "bare"])
def test_layouts(tmp_path: Path, zipped: bool, top: str) -> None:
    content: Any = hollow()
    if top == "model":
        content = {"iteration": 1, "model": content, "sampler": sampler()}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    network = read(tmp_path / "weights.pth")
    assert not network.fc1.weight.any()
    assert torch.equal(network.spectrogram_extractor.stft.conv_real.weight, front_end.windowed_fourier()[0])


def test_arrays_of_old_numpy_are_read(tmp_path: Path) -> None:
    # NumPy 1 called its module numpy.core, and that name stands in files from before 2024.
    torch.save({"model": hollow(), "sampler": sampler()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    written = (tmp_path / "w.pth").read_bytes()
    assert b"cnumpy._core.multiarray\n" in written
    (tmp_path / "old.pth").write_bytes(written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    read(tmp_path / "old.pth")


def test_no_code_is_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": hollow(), "sampler": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(AssetError, match=r"weights\.pth cannot be read as weights"):
        read(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_reading_leaves_torch_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": hollow()}, tmp_path / "weights.pth")
    read(tmp_path / "weights.pth")
    assert set(torch.serialization.get_safe_globals()) == before


def test_misfit_weights_are_refused(tmp_path: Path) -> None:
    tensors = hollow()
    tensors["extra"] = tensors.pop("fc1.bias")
    tensors["fc_audioset.weight"] = torch.zeros(1).expand(10, 2_048)
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    with pytest.raises(AssetError) as caught:
        loaded(str(tmp_path / "odd.pth"))
    for part in ("odd.pth", "missing fc1.bias", "unexpected extra", "fc_audioset.weight has shape (10, 2048)"):
        assert part in str(caught.value)


def test_another_front_end_is_refused(tmp_path: Path) -> None:
    tensors = hollow()
    tensors["spectrogram_extractor.stft.conv_imag.weight"] = -front_end.windowed_fourier()[1]
    torch.save({"model": tensors}, tmp_path / "other.pth")
    with pytest.raises(AssetError, match=r"other\.pth: .*conv_imag\.weight is not the Fourier transform .*off by 2"):
        loaded(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"model": [1]}, [1], {"model": {}}])
def test_other_files_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(AssetError, match=r"other\.pth holds no tensors under 'model'"):
        read(tmp_path / "other.pth")


def test_absent_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no weights file .*gone\.pth"):
        loaded(str(tmp_path / "gone.pth"))
    torch.save({"model": hollow()}, tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:2_000_000])
    with pytest.raises(AssetError, match=r"bad\.pth cannot be read as weights"):
        loaded(str(tmp_path / "bad.pth"))


def test_weights_that_were_not_fetched_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match="coatkit fetch panns"):
        loaded("default")
