"""Building the network and filling it strictly: from a checkpoint in upstream's layout, or a fixed seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatkit import AssetError, fill_weights, read_weights, require
from coatkit_expert_emotion2vec import NAME, WEIGHTS, Variant
from coatkit_expert_emotion2vec.network import SIZES, Network, Size

_AUDIO = "modality_encoders.AUDIO."
_RENAMED: tuple[tuple[str, Any], ...] = (
    (r"stem\.(\d+)\.weight", _AUDIO + r"local_encoder.conv_layers.\1.0.weight"),
    (r"stem\.(\d+)\.norm\.", _AUDIO + r"local_encoder.conv_layers.\1.2.1."),
    (r"project_norm\.", _AUDIO + "project_features.1."),
    (r"project\.", _AUDIO + "project_features.2."),
    (r"positional\.(\d+)\.", lambda found: f"{_AUDIO}relative_positional_encoder.{int(found[1]) + 1}.0."),
    (r"(extra_tokens|alibi_scale)$", _AUDIO + r"\1"),
    (r"norm\.", _AUDIO + "context_encoder.norm."),
    (r"prenet\.", _AUDIO + "context_encoder.blocks."),
)
"""How a name of the network begins, and a name of upstream's."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which upstream's loader looks for the tensors, one within the other."""
_PREFIXES = ("module.", "d2v_model.")
"""What names begin with where the model was wrapped: for data-parallel training, or with a classifier."""
_UNUSED = (_AUDIO + "decoder.", "proj.", "_ema.")
"""Tensors that features do not need: the decoder of pre-training, the classifier of emotion2vec+, the EMA teacher."""


def build(weights: str, variant: Variant) -> Network:
    """A frozen float32 network on the CPU.

    Args:
        weights: As the option of that name.
        variant: As the option of that name.

    Raises:
        AssetError: If the weights are missing, damaged or do not fit; names the file and the tensors.
    """
    size = SIZES[variant]
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Network(size)
        name_as_upstream(network)
    else:
        with torch.device("meta"):  # no values are drawn for tensors that the file will fill
            network = Network(size)
        network.to_empty(device="cpu")
        name_as_upstream(network)
        path = require(NAME, WEIGHTS[variant]) if weights == "default" else Path(weights).expanduser()
        found = read(path)
        _check_size(path, found, size)
        fill_weights(NAME, path, network, found)
    return network.eval().requires_grad_(False)


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds for the network, by upstream's names without what wrapped models put before them.

    Raises:
        AssetError: If it cannot be read, or holds no tensors where upstream's loader looks for them.
    """
    found = read_weights(NAME, path)
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and key in found:
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise AssetError(
            f"{NAME}: {path} holds no tensors by name, at its top or under {', '.join(map(repr, _WRAPPERS))}; expected "
            "a checkpoint of emotion2vec as upstream publishes it"
        )
    kept: dict[str, Any] = {}
    for full, value in found.items():
        name = str(full)
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if not f"{name}.".startswith(_UNUSED):
            # A tensor that is there twice keeps its full name, and is refused as unexpected.
            kept[name if name not in kept else str(full)] = value
    return kept


def name_as_upstream(network: Network) -> None:
    """Let a network give and take its state by upstream's names, so that errors name what the file holds."""
    theirs = {ours: _rename(ours) for ours in network.state_dict()}
    ours = {theirs: ours for ours, theirs in theirs.items()}

    def given(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        _replace(state, theirs)

    def taken(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        _replace(state, ours)

    network.register_state_dict_post_hook(given)  # type: ignore[no-untyped-call]  # torch gives them no types
    network.register_load_state_dict_pre_hook(taken)  # type: ignore[no-untyped-call]


def _rename(name: str) -> str:
    for pattern, beginning in _RENAMED:
        if re.match(pattern, name):
            name = re.sub(pattern, beginning, name, count=1)
            break
    return re.sub(r"\.(fc[12])\.", r".mlp.\1.", name)


def _replace(state: dict[str, Any], names: Mapping[str, str]) -> None:
    held = list(state.items())
    state.clear()
    state.update((names[name], value) for name, value in held)


def _check_size(path: Path, found: Mapping[str, Any], size: Size) -> None:
    """Say so in one line where a checkpoint is of another variant; all its shapes would be listed otherwise."""
    width = getattr(found.get(_AUDIO + "extra_tokens"), "shape", (size.width,))[-1]
    others = [name for name, other in SIZES.items() if other.width == width]
    if width != size.width and others:
        raise AssetError(
            f"{NAME}: {path} has features of width {width}, expected {size.width}; set `variant: {others[-1]}` "
            "if it is meant"
        )
