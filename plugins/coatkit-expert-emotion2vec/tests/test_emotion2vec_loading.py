"""The emotion2vec expert's options and weights: strict, repeatable, never downloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from coatkit import AssetError, AudioBatch
from coatkit_expert_emotion2vec import WEIGHTS, coatkit_manifests
from coatkit_expert_emotion2vec.expert import Emotion2vec
from coatkit_expert_emotion2vec.loading import name_as_upstream, read
from coatkit_expert_emotion2vec.network import SIZES, Network
from coatkit_expert_emotion2vec.options import Options

AUDIO = "modality_encoders.AUDIO."
Tensors = dict[str, torch.Tensor]


def loaded(**options: Any) -> Emotion2vec:
    expert = Emotion2vec(**options)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


def names_and_shapes(variant: Any) -> Tensors:
    """What the network needs, by upstream's names; one stored number each, so that a file of all of them is small."""
    with torch.device("meta"):
        network = Network(SIZES[variant])
    name_as_upstream(network)
    return {name: torch.tensor(0.01).expand(value.shape) for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return names_and_shapes("base")


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


# --- weights


def test_names_and_sizes_are_the_published_ones(tensors: Tensors) -> None:
    # emotion2vec_base.pt holds 93,790,988 numbers: these, and the 619,776 of the decoder. Of emotion2vec_plus_large,
    # 185 tensors are known by name and shape: these, and the classifier's two.
    assert sum(value.numel() for value in tensors.values()) == 93_790_988 - 619_776
    assert len(tensors) == 183
    large = {name: tuple(value.shape) for name, value in names_and_shapes("plus-large").items()}
    assert large["blocks.7.attn.qkv.weight"] == (3_072, 1_024)
    assert large["blocks.0.mlp.fc2.bias"] == (1_024,)
    for name, shape in (
        ("alibi_scale", (1, 1, 16, 1, 1)),
        ("extra_tokens", (1, 10, 1_024)),
        ("local_encoder.conv_layers.0.0.weight", (512, 1, 10)),
        ("local_encoder.conv_layers.6.2.1.bias", (512,)),
        ("project_features.1.weight", (512,)),
        ("project_features.2.weight", (1_024, 512)),
        ("relative_positional_encoder.5.0.weight", (1_024, 64, 19)),
        ("context_encoder.norm.weight", (1_024,)),
        ("context_encoder.blocks.3.attn.proj.weight", (1_024, 1_024)),
        ("context_encoder.blocks.3.norm2.weight", (1_024,)),
    ):
        assert large[AUDIO + name] == shape


def test_layouts_that_upstream_reads_are_taken(tensors: Tensors, tmp_path: Path) -> None:
    one = tensors | {"blocks.7.norm2.bias": torch.arange(768.0)}
    decoder = {AUDIO + "decoder.blocks.0.0.weight": torch.zeros(2), AUDIO + "decoder.proj.bias": torch.zeros(3)}
    classifier = {"proj.weight": torch.zeros(9, 768), "proj.bias": torch.zeros(9)}
    contents = {
        "pretrained": {"args": None, "cfg": {}, "model": one | decoder, "extra_state": {}},
        "teacher": {"model": one | {"_ema": {"blocks.0.norm1.bias": torch.zeros(768)}}},
        "plus": {"model": {f"d2v_model.{name}": value for name, value in one.items()} | classifier},
        "plain": one,
        "nested": {"state_dict": {"model": {f"module.{name}": value for name, value in one.items()}}},
    }
    for name, content in contents.items():
        found = read(Path(saved(tmp_path / f"{name}.pt", content)))
        assert found.keys() == one.keys(), name
        assert found["blocks.7.norm2.bias"].tolist() == list(range(768)), name
    expert = loaded(weights=str(tmp_path / "plus.pt"), variant="plus-seed")
    assert expert.network is not None
    assert expert.network.blocks[7].norm2.bias.tolist() == list(range(768))
    assert expert.network.blocks[6].norm2.bias.tolist() == [pytest.approx(0.01)] * 768


def test_misfit_weights_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    odd = dict(tensors)
    odd["mask_emb"] = odd.pop("blocks.7.norm2.bias")
    odd["blocks.0.mlp.fc1.weight"] = torch.zeros(768, 3_072)
    odd[AUDIO + "relative_positional_encoder.6.0.bias"] = odd.pop(AUDIO + "relative_positional_encoder.1.0.bias")
    with pytest.raises(AssetError) as caught:
        loaded(weights=saved(tmp_path / "odd.pt", {"model": odd}))
    for part in (
        "odd.pt",
        "missing blocks.7.norm2.bias",
        "unexpected mask_emb",
        f"missing {AUDIO}relative_positional_encoder.1.0.bias",
        f"unexpected {AUDIO}relative_positional_encoder.6.0.bias",
        "blocks.0.mlp.fc1.weight has shape (768, 3072), expected (3072, 768)",
    ):
        assert part in str(caught.value)


def test_a_tensor_that_is_there_twice_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    twice = tensors | {"d2v_model.blocks.0.norm1.bias": torch.zeros(768)}
    with pytest.raises(AssetError, match=r"unexpected d2v_model\.blocks\.0\.norm1\.bias"):
        loaded(weights=saved(tmp_path / "twice.pt", twice))


def test_a_checkpoint_of_another_size_is_named(tmp_path: Path) -> None:
    large = saved(tmp_path / "large.pt", {"model": names_and_shapes("plus-large")})
    with pytest.raises(AssetError, match=r"large\.pt has features of width 1024, expected 768; set `variant: plus-lar"):
        loaded(weights=large)


def test_absent_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no weights file .*gone\.pt"):
        loaded(weights=str(tmp_path / "gone.pt"))
    (tmp_path / "bad.pt").write_bytes(b"not a tensor in sight")
    with pytest.raises(AssetError, match=r"bad\.pt cannot be read as weights"):
        loaded(weights=str(tmp_path / "bad.pt"))
    for name, content in (("list", [torch.zeros(1)]), ("empty", {"model": {}}), ("other", {"epoch": 3})):
        with pytest.raises(AssetError, match=rf"{name}\.pt holds no tensors by name, at its top or under 'state_dict'"):
            loaded(weights=saved(tmp_path / f"{name}.pt", content))


@pytest.mark.parametrize("variant", WEIGHTS)
def test_missing_download_names_the_command(variant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=rf"{WEIGHTS[variant].name}(.|\n)*coatkit fetch emotion2vec"):
        loaded(variant=variant)


def test_random_weights_are_finite_and_repeatable() -> None:
    state = torch.get_rng_state()
    sound = (0.1 * np.random.default_rng(0).standard_normal(4_000)).astype(np.float32)
    batch = AudioBatch.from_arrays([sound], 16_000)
    first, second = (loaded(weights="random").encode(batch).values for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 0
    assert torch.equal(state, torch.get_rng_state())


def test_fingerprint_follows_the_weights_only(tensors: Tensors, tmp_path: Path) -> None:
    same, again = (saved(tmp_path / f"{name}.pt", {"model": tensors}) for name in ("same", "again"))
    other = saved(tmp_path / "other.pt", {"model": tensors | {"blocks.7.norm2.bias": torch.zeros(768)}})
    print_of = {path: loaded(weights=path).fingerprint() for path in (same, again, other)}
    assert print_of[same] == print_of[again] != print_of[other]
    # The variants of one size are one network.
    assert loaded(weights=same, variant="plus-base").fingerprint() == print_of[same]


# --- options and manifest


@pytest.mark.parametrize(
    "options", [{"variant": "large"}, {"variant": "plus_base"}, {"weights": ""}, {"layer": 3}, {"variant": None}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options(**options)


def test_options_name_the_assets_they_need() -> None:
    (manifest,) = coatkit_manifests()
    needed = [Options(variant=variant).assets() for variant in WEIGHTS]
    assert sum(needed, ()) == tuple(asset.name for asset in manifest.assets)
    assert Options() == Options(variant="base")
    assert Options(weights="random").assets() == Options(weights="./emotion2vec.pt").assets() == ()


def test_assets_name_one_commit_and_one_file() -> None:
    for variant, asset in WEIGHTS.items():
        repository, _, rest = asset.source.removeprefix("hub:").partition("@")
        commit, _, file = rest.partition("#")
        assert repository == f"emotion2vec/emotion2vec_{variant.replace('-', '_')}"
        assert len(commit) == 40
        assert file == ("emotion2vec_base.pt" if variant == "base" else "model.pt")
        assert (asset.sha256 is None) == (asset.size is None)


def test_listing_and_checking_import_no_torch() -> None:
    code = (
        "import sys, coatkit_expert_emotion2vec as m; m.coatkit_manifests(); "
        "import coatkit_expert_emotion2vec.options as o; o.Options(); "
        "assert not {'torch', 'transformers', 'funasr'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
