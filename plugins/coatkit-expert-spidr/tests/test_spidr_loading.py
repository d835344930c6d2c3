"""The SpidR expert's options and weights: strict, repeatable, never downloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from coatkit import AssetError
from coatkit_expert_spidr import coatkit_manifests
from coatkit_expert_spidr.expert import Spidr
from coatkit_expert_spidr.options import Options

Tensors = dict[str, torch.Tensor]


def loaded(**options: Any) -> Spidr:
    expert = Spidr(**options)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """The names and shapes of the student in upstream's file; one stored number each keeps a file of them small."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        block = f"feature_extractor.conv_layers.{i}"
        shapes[f"{block}.conv.weight"] = (512, 512 if i else 1, kernel)
        shapes |= {f"{block}.layer_norm.weight": (512,), f"{block}.layer_norm.bias": (512,)}
    shapes |= {f"feature_projection.layer_norm.{kind}": (512,) for kind in ("weight", "bias")}
    shapes |= {"feature_projection.projection.weight": (768, 512), "feature_projection.projection.bias": (768,)}
    for i in range(5):
        block = f"student.pos_conv_embed.convs.{i}"
        shapes |= {f"{block}.weight": (768, 48, 19), f"{block}.bias": (768,)}
    norms = ["student"]
    for i in range(12):
        block = f"student.layers.{i}"
        norms += [block, f"{block}.final"]
        shapes |= {f"{block}.attention.qkv.weight": (2304, 768)}
        for part, size in (
            ("attention.proj", (768, 768)),
            ("feed_forward.intermediate_dense", (3072, 768)),
            ("feed_forward.output_dense", (768, 3072)),
        ):
            shapes |= {f"{block}.{part}.weight": size, f"{block}.{part}.bias": size[:1]}
    for norm in norms:
        place = norm.replace(".final", ".final_") if norm.endswith("final") else f"{norm}."
        shapes |= {f"{place}layer_norm.{kind}": (768,) for kind in ("weight", "bias")}
    return {name: torch.tensor(0.01 + i / 1e5).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


# --- weights


def test_every_layout_of_upstream_is_taken(tensors: Tensors, tmp_path: Path) -> None:
    # The refusals below would be worth little if these files were refused too.
    step = {"current_step": torch.zeros(1, dtype=torch.int64), "mask_embedding": torch.zeros(768)}
    unused = {
        f"teacher.{name.removeprefix('student.')}": v for name, v in tensors.items() if name.startswith("student.")
    }
    unused |= {"heads.7.0.weight": torch.zeros(256, 768), "codebooks.7.codebook": torch.zeros(256, 768), **step}
    several = {f"module.{name}": value for name, value in (tensors | unused).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "student.safetensors")
    places = [
        saved(
            tmp_path / "spidr_base.pt", {"model": tensors | unused, "optimizer": {"state": {}}, "step": torch.ones(1)}
        ),
        saved(tmp_path / "final.pt", tensors | unused),
        saved(tmp_path / "module.pt", {"model": several}),
        str(tmp_path / "student.safetensors"),
    ]
    experts = [loaded(weights=place, layer=2) for place in places]
    assert len({expert.fingerprint() for expert in experts}) == 1
    for parameter in experts[0].network.parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()


def test_misfit_weights_are_refused_in_the_words_of_the_file(tensors: Tensors, tmp_path: Path) -> None:
    odd: dict[str, Any] = dict(tensors)
    del odd["student.layers.11.attention.qkv.weight"]
    odd["student.layers.0.attention.qkv.bias"] = torch.zeros(2304)
    odd["student.pos_conv_embed.convs.3.weight"] = torch.zeros(768, 48, 20)
    odd["student.layer_norm.weight"] = odd["student.layer_norm.weight"].tolist()
    odd["teacherly.bias"] = torch.zeros(1)
    with pytest.raises(AssetError) as caught:
        # Also what the chosen layer does not need must be there: the file is checked as a whole.
        loaded(weights=saved(tmp_path / "odd.pt", {"model": odd}), layer=3)
    for part in (
        "odd.pt",
        "missing student.layers.11.attention.qkv.weight",
        "missing student.layer_norm.weight",
        "unexpected student.layers.0.attention.qkv.bias",
        "unexpected teacherly.bias",
        "student.pos_conv_embed.convs.3.weight has shape (768, 48, 20), expected (768, 48, 19)",
    ):
        assert part in str(caught.value)


def test_absent_and_damaged_weights_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no weights file .*gone\.pt"):
        loaded(weights=str(tmp_path / "gone.pt"))
    whole = Path(saved(tmp_path / "whole.pt", tensors)).read_bytes()
    for name, content in (("bad.pt", b"not a tensor in sight"), ("cut.pt", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AssetError, match=rf"{name} cannot be read as weights"):
            loaded(weights=str(tmp_path / name))
    for name, content in (("list.pt", [torch.zeros(1)]), ("inner.pt", {"model": [torch.zeros(1)]})):
        with pytest.raises(AssetError, match=rf"{name} holds a list, expected tensors by name"):
            loaded(weights=saved(tmp_path / name, content))


def test_missing_download_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=r"spidr_base\.pt(.|\n)*coatkit fetch spidr"):
        loaded()


def test_the_fetched_file_is_used(tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    place = tmp_path / "assets/spidr/spidr_base.pt"
    place.parent.mkdir(parents=True)
    torch.save({"model": tensors}, place)
    assert loaded(layer=1).fingerprint() == loaded(layer=1, weights=str(place)).fingerprint()


def test_fingerprint_follows_what_the_features_depend_on(tensors: Tensors, tmp_path: Path) -> None:
    changed = {"student.layers.11.feed_forward.output_dense.bias": torch.full((768,), 0.5)}
    plain, last = saved(tmp_path / "plain.pt", tensors), saved(tmp_path / "last.pt", tensors | changed)

    def print_of(weights: str, layer: int) -> str:
        return loaded(weights=weights, layer=layer).fingerprint()

    assert len({print_of(plain, 12), print_of(last, 12), print_of(plain, 2), print_of(plain, 3)}) == 4
    # Layer 12 has no part in layer 2, nor has the file's name.
    assert print_of(plain, 2) == print_of(last, 2)


def test_random_weights_are_repeatable_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first, second = (loaded(weights="random", layer=1).fingerprint() for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


# --- options and manifest


@pytest.mark.parametrize(
    "options", [{"layer": 0}, {"layer": 13}, {"layer": 6.0}, {"layer": True}, {"layers": 3}, {"weights": ""}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        Options(**options)


def test_options_name_the_assets_they_need() -> None:
    (manifest,) = coatkit_manifests()
    assert Options().assets() == tuple(asset.name for asset in manifest.assets)
    assert Options(weights="random").assets() == Options(weights="./final.pt").assets() == ()


def test_manifest_is_true() -> None:
    (manifest,) = coatkit_manifests()
    assert manifest.target == f"{Spidr.__module__}:{Spidr.__qualname__}"
    assert (manifest.sample_rate, manifest.frame_rate, manifest.dim) == (Spidr.sample_rate, Spidr.frame_rate, Spidr.dim)
    assert manifest.weights_licence == "CC-BY-NC-4.0"
    assert {asset.licence for asset in manifest.assets} == {"CC-BY-NC-4.0"}


def test_listing_and_checking_import_no_torch() -> None:
    code = (
        "import sys, coatkit_expert_spidr as s; s.coatkit_manifests(); import coatkit_expert_spidr.options as o; "
        "o.Options(); assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
