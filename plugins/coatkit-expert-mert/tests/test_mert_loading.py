"""The MERT expert's options and weights: strict, repeatable, never downloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import HubertConfig, HubertModel

from coatkit import AssetError
from coatkit_expert_mert import coatkit_manifests
from coatkit_expert_mert.expert import Mert
from coatkit_expert_mert.options import Options


def loaded(**options: Any) -> Mert:
    expert = Mert(**options)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The hub file's names and shapes; one stored number each, so that a file of all of them is small."""
    with torch.device("meta"):
        model = HubertModel(HubertConfig())
    found = {name: torch.tensor(0.01).expand(value.shape) for name, value in model.state_dict().items()}
    positional = "encoder.pos_conv_embed.conv."
    found[positional + "weight_g"] = found.pop(positional + "parametrizations.weight.original0")
    found[positional + "weight_v"] = found.pop(positional + "parametrizations.weight.original1")
    return found


def saved(path: Path, tensors: Any) -> str:
    torch.save(tensors, path)
    return str(path)


# --- weights


def test_a_fitting_file_is_taken(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    # The refusals below would be worth little if this file were refused too.
    expert = loaded(weights=saved(tmp_path / "mert.bin", tensors))
    assert len(tensors) == 211
    assert not any(p.requires_grad for p in expert.network.parameters())
    assert all(p.dtype == torch.float32 and (p.ndim == 0 or p.isfinite().all()) for p in expert.network.parameters())


def test_misfit_weights_are_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    odd = dict(tensors)
    odd["head.weight"] = odd.pop("encoder.layers.11.final_layer_norm.bias")
    odd["feature_projection.projection.weight"] = torch.zeros(768, 848)
    odd["encoder.layer_norm.weight"] = odd["encoder.layer_norm.weight"].tolist()
    with pytest.raises(AssetError) as caught:
        # Also what the chosen layer does not need must be there: the file is checked as a whole.
        loaded(weights=saved(tmp_path / "odd.bin", odd), layers=3)
    for part in (
        "odd.bin",
        "missing encoder.layers.11.final_layer_norm.bias",
        "missing encoder.layer_norm.weight",
        "unexpected head.weight",
        "feature_projection.projection.weight has shape (768, 848), expected (768, 512)",
    ):
        assert part in str(caught.value)


def test_both_spellings_of_weight_normalisation_at_once_are_refused(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = "encoder.pos_conv_embed.conv."
    both = tensors | {name + "parametrizations.weight.original0": tensors[name + "weight_g"]}
    with pytest.raises(AssetError, match=r"unexpected encoder\.pos_conv_embed\.conv\.weight_g"):
        loaded(weights=saved(tmp_path / "both.bin", both))


def test_absent_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no weights file .*gone\.bin"):
        loaded(weights=str(tmp_path / "gone.bin"))
    for name in ("bad.bin", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not a tensor in sight")
        with pytest.raises(AssetError, match=rf"{name} cannot be read as weights"):
            loaded(weights=str(tmp_path / name))
    with pytest.raises(AssetError, match=r"list\.bin holds a list"):
        loaded(weights=saved(tmp_path / "list.bin", [torch.zeros(1)]))


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no .*config\.json; without it, give the path of the weights file"):
        loaded(weights=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AssetError, match=r"config\.json cannot be read as JSON"):
        loaded(weights=str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(AssetError, match=r"config\.json holds a list"):
        loaded(weights=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        loaded(weights=str(tmp_path))


def test_missing_download_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=r"pytorch_model\.bin(.|\n)*coatkit fetch mert"):
        loaded()


def test_fingerprint_follows_what_the_features_depend_on(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = {"encoder.layers.11.feed_forward.output_dense.bias": torch.full((768,), 0.5)}
    plain, last = saved(tmp_path / "plain.bin", tensors), saved(tmp_path / "last.bin", tensors | changed)

    def print_of(weights: str, layers: Any) -> str:
        return loaded(weights=weights, layers=layers).fingerprint()

    prints = {print_of(plain, 12), print_of(last, 12), print_of(plain, [2, 12])}
    assert len(prints) == 3
    # Layer 12 has no part in hidden state 2, nor has the file's name.
    assert print_of(plain, 2) == print_of(last, [2])


# --- options and manifest


@pytest.mark.parametrize(
    ("layers", "indices"), [(12, (12,)), (0, (0,)), ([9, 3], (3, 9)), ((1, 2), (1, 2)), ("average", tuple(range(13)))]
)
def test_layers_that_mean_something(layers: Any, indices: tuple[int, ...]) -> None:
    options = Options(layers=layers)
    assert options.indices == indices
    assert Options(**options.model_dump(mode="json")) == options


@pytest.mark.parametrize("layers", [13, -1, True, 6.0, "6", "last", [], [1, 1], [1, 13], [True], None])
def test_layers_that_mean_nothing_are_refused(layers: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Options(layers=layers)
    assert caught.value.error_count() == 1
    assert "is not a number from 0 to 12, a list of different ones, or 'average'" in str(caught.value)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="layer\n"):
        Options(layer=3)


def test_options_name_the_assets_they_need() -> None:
    (manifest,) = coatkit_manifests()
    assert Options().assets() == tuple(asset.name for asset in manifest.assets)
    assert Options(weights="random").assets() == Options(weights="./mert.bin").assets() == ()


def test_manifest_is_true() -> None:
    (manifest,) = coatkit_manifests()
    assert manifest.target == f"{Mert.__module__}:{Mert.__qualname__}"
    assert (manifest.sample_rate, manifest.frame_rate, manifest.dim) == (Mert.sample_rate, Mert.frame_rate, Mert.dim)
    assert manifest.weights_licence == "CC-BY-NC-4.0"
    assert {asset.licence for asset in manifest.assets} == {"CC-BY-NC-4.0"}


def test_listing_and_checking_import_no_torch() -> None:
    code = (
        "import sys, coatkit_expert_mert as m; m.coatkit_manifests(); import coatkit_expert_mert.options as o; "
        "o.Options(); assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
