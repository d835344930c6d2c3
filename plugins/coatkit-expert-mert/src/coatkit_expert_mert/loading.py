"""Building the network and filling it strictly: from the hub's file, a local checkpoint, or a fixed seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize

from coatkit import AssetError, fill_weights, read_weights, require
from coatkit_expert_mert import NAME, WEIGHTS
from coatkit_expert_mert.network import CONVOLUTIONS, SAMPLE_RATE, WIDTH
from coatkit_expert_mert.options import LAYERS

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "intermediate_size": 3_072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "do_stable_layer_norm": False,
    "feat_proj_layer_norm": True,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_bias": False,
    "conv_dim": [512] * len(CONVOLUTIONS),
    "conv_kernel": [kernel for kernel, _ in CONVOLUTIONS],
    "conv_stride": [stride for _, stride in CONVOLUTIONS],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "conv_pos_batch_norm": False,
}
"""What decides the computation of MERT-v1-95M, by the names of its config.json, which are HubertConfig's."""
_MERT_ONLY: dict[str, Any] = {"feature_extractor_cqt": False, "deepnorm": False, "sample_rate": SAMPLE_RATE}
"""More of its config.json, which HubertConfig does not know."""
_PREPROCESSOR: dict[str, Any] = {"sampling_rate": SAMPLE_RATE, "do_normalize": True}

_UNUSED = ("masked_spec_embed",)
"""Tensors of the hub's file that only training uses."""
_RENAMED = {
    "encoder.pos_conv_embed.conv.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv_embed.conv.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
}
"""The two spellings of weight normalisation: the hub's file has the older one, a model saved today the newer one."""


def build(weights: str, highest: int) -> Any:
    """A frozen float32 HubertModel on the CPU, with the layers up to `highest` only.

    Args:
        weights: As the option of that name.
        highest: The highest layer in use, 0 to 12.

    Raises:
        AssetError: If the weights are missing, damaged or do not fit; names the file and the keys.
    """
    # Late: it costs seconds, and listing or checking must not pay them.
    from transformers import HubertConfig, HubertModel

    # With no masking probability there is no `masked_spec_embed`.
    config = HubertConfig(**SIZES, mask_time_prob=0.0, mask_feature_prob=0.0, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        if weights == "random":
            torch.manual_seed(0)
            network = HubertModel(config)
        else:
            # No values are drawn for tensors that the file will fill.
            with torch.device("meta"):
                network = HubertModel(config)
            network.to_empty(device="cpu")
            path = require(NAME, WEIGHTS) if weights == "default" else checkpoint(Path(weights).expanduser())
            fill_weights(NAME, path, network, read(path))
    # The product of weight normalisation never changes here; kept as two factors it is made again in every call.
    parametrize.remove_parametrizations(network.encoder.pos_conv_embed.conv, "weight")
    del network.encoder.layers[highest:]
    return network.float().eval().requires_grad_(False)


def read(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by their names in HubertModel.

    Raises:
        AssetError: If it cannot be read, or does not hold named values.
    """
    found = read_weights(NAME, path)
    if not isinstance(found, Mapping):
        raise AssetError(f"{NAME}: {path} holds a {type(found).__name__}, expected tensors by name")
    kept = {name: value for name, value in found.items() if name not in _UNUSED}
    # Where both spellings are there, the older one stays and is refused as unexpected.
    return {_RENAMED[n] if n in _RENAMED and _RENAMED[n] not in kept else n: value for n, value in kept.items()}


def checkpoint(path: Path) -> Path:
    """The weights file that a local path means: itself, or for a folder the one in it, once its settings are checked.

    Raises:
        AssetError: If a folder lacks a file, or its settings are not those of MERT-v1-95M; names the file and the keys.
    """
    if not path.is_dir():
        return path
    config = _settings(path / "config.json")
    _check(path / "config.json", config, SIZES | _MERT_ONLY)
    # Scores are scaled down before the softmax and up again: no difference on paper, but never compared here.
    if config.get("attention_relax", -1) > 0:
        raise AssetError(_refusal(path / "config.json", f"attention_relax is {config['attention_relax']}, expected -1"))
    if (path / "preprocessor_config.json").exists():
        _check(path / "preprocessor_config.json", _settings(path / "preprocessor_config.json"), _PREPROCESSOR)
    for name in ("model.safetensors", "pytorch_model.bin"):  # in the order of transformers
        if (path / name).is_file():
            return path / name
    raise AssetError(f"{NAME}: {path} holds neither model.safetensors nor pytorch_model.bin")


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AssetError(f"{NAME}: there is no {path}; without it, give the path of the weights file itself") from error
    except (OSError, ValueError) as error:
        raise AssetError(f"{NAME}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise AssetError(f"{NAME}: {path} holds a {type(found).__name__}, expected settings by name")
    return found


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A key that is left out has MERT-v1-95M's value: they are the defaults of its configuration class."""
    other = [
        f"{key} is {found[key]!r}, expected {value!r}"
        for key, value in wanted.items()
        if found.get(key, value) != value
    ]
    if other:
        raise AssetError(_refusal(path, "; ".join(other)))


def _refusal(path: Path, problems: str) -> str:
    return f"{NAME}: {path} is not of MERT-v1-95M, the only size this expert computes: {problems}"
