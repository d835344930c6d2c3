"""Building the network and filling it strictly: from upstream's file, a local checkpoint, or a fixed seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatkit import AssetError, fill_weights, read_weights, require
from coatkit_expert_spidr import NAME, WEIGHTS
from coatkit_expert_spidr.network import CONVOLUTIONS, WIDTH
from coatkit_expert_spidr.options import LAYERS

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "intermediate_size": 3_072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_activation": "gelu",
    "conv_bias": False,
    "conv_dim": [512] * len(CONVOLUTIONS),
    "conv_kernel": [kernel for kernel, _ in CONVOLUTIONS],
    "conv_stride": [stride for _, stride in CONVOLUTIONS],
    "num_conv_pos_embeddings": 5,
    "conv_pos_kernel_size": 19,
    "num_conv_pos_embedding_groups": 16,
}
"""SpidR's sizes, by the names of Data2VecAudioConfig."""

_UNUSED = re.compile(r"(teacher|heads|codebooks)\..*|mask_embedding|current_step")
"""Names of what only training uses: upstream's files hold it beside the student."""
_RENAMED = (
    (r"^encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.", r"student.pos_conv_embed.convs.\1."),
    (r"^encoder\.", "student."),
    (r"\.attention\.out_proj\.", ".attention.proj."),
    (r"\.attention\.[qkv]_proj\.", ".attention.qkv."),
)
"""Patterns in the names of Data2VecAudioModel, and what upstream has there."""
_FUSED = ("q_proj", "k_proj", "v_proj")
"""What upstream keeps in one tensor, in this order."""


def build(weights: str, layer: int) -> Any:
    """A frozen float32 Data2VecAudioModel on the CPU, with the layers up to `layer` only.

    Args:
        weights: As the option of that name.
        layer: The highest layer in use, 1 to 12.

    Raises:
        AssetError: If the weights are missing, damaged or do not fit; names the file and its tensors.
    """
    # Late: it costs seconds, and listing or checking must not pay them.
    from transformers import Data2VecAudioConfig, Data2VecAudioModel

    # With no masking probability there is no `masked_spec_embed`.
    config = Data2VecAudioConfig(**SIZES, mask_time_prob=0.0, mask_feature_prob=0.0, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        if weights == "random":
            torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed GPUs too, which is not undone
            network = _student(Data2VecAudioModel(config))
        else:
            # No values are drawn for tensors that the file will fill.
            with torch.device("meta"):
                network = _student(Data2VecAudioModel(config))
            network.to_empty(device="cpu")
            path = require(NAME, WEIGHTS) if weights == "default" else Path(weights).expanduser()
            with upstream_layout(network):
                fill_weights(NAME, path, network, read(path))
    del network.encoder.layers[layer:]
    return network.float().eval().requires_grad_(False)


def read(path: Path) -> dict[str, Any]:
    """The student's part of a checkpoint, by upstream's names.

    The tensors are under `model`, as upstream's training writes them, or at the top, as it also takes them.

    Raises:
        AssetError: If it cannot be read, or does not hold named values.
    """
    found = read_weights(NAME, path)
    if isinstance(found, Mapping):
        found = found.get("model", found)
    if not isinstance(found, Mapping):
        raise AssetError(f"{NAME}: {path} holds a {type(found).__name__}, expected tensors by name")
    # Training on several devices puts `module.` before every name.
    named = {str(name).removeprefix("module."): value for name, value in found.items()}
    return {name: value for name, value in named.items() if not _UNUSED.fullmatch(name)}


def _student(network: Any) -> Any:
    """The same model without the biases of queries, keys and values, which SpidR has not."""
    for layer in network.encoder.layers:
        for part in _FUSED:
            getattr(layer.attention, part).register_parameter("bias", None)
    return network


@contextmanager
def upstream_layout(network: Any) -> Iterator[None]:
    """Inside, the network's state is given and taken under upstream's names and shapes, so that what is wrong with a
    file is said in the file's own words."""
    hooks = (
        network.register_state_dict_post_hook(_to_upstream),
        network.register_load_state_dict_pre_hook(_from_upstream),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _upstream_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _place(name: str) -> int:
    """Where a tensor stands in upstream's fused one: 0, 1 or 2; -1 for one that stands alone."""
    return next((i for i, part in enumerate(_FUSED) if part in name), -1)


def _to_upstream(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """Rename and fuse the tensors of a state, in place; called by `state_dict`."""
    gathered: dict[str, list[str]] = {}
    for name in sorted(state, key=_place):
        gathered.setdefault(_upstream_name(name), []).append(name)
    made = {
        new: torch.cat([state[n] for n in names]) if len(names) > 1 else state[names[0]]
        for new, names in gathered.items()
    }
    state.clear()
    state.update(made)


def _from_upstream(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """The reverse, in place; called by `load_state_dict`."""
    names = {name: _upstream_name(name) for name, _ in module.named_parameters()}
    given = {new: state.pop(new) for new in set(names.values()) & state.keys()}
    for name, new in names.items():
        if new in given:
            state[name] = given[new] if _place(name) < 0 else given[new].chunk(len(_FUSED))[_place(name)]
