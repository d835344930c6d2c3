"""Weights of the network: strict loading of upstream's checkpoint, and the random control."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import coatkit_expert_panns as plugin
from coatkit import AssetError, fill_weights, read_weights, require
from coatkit_expert_panns import front_end
from coatkit_expert_panns.network import Network
from coatkit_expert_panns.options import CHECKPOINT

_KERNELS = ("spectrogram_extractor.stft.conv_real.weight", "spectrogram_extractor.stft.conv_imag.weight")
_LARGEST_ERROR = 1e-5
"""Of a kernel's values, which are at most 1; upstream computes them to 1e-7."""

# Checkpoints that upstream's training writes hold the state of its sampler too, as arrays of NumPy. These build arrays
# and nothing else. Their module had another name before NumPy 2.
_BUILDERS: dict[str, Any] = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.int64(0).__reduce__()[0]}
_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "uint8", "float32", "float64")),
    *((f, f"numpy.{core}.multiarray.{name}") for name, f in _BUILDERS.items() for core in ("core", "_core")),
]


def build(weights: str, device: torch.device) -> Network:
    """A frozen float32 network on a device, with the weights that the option of that name asks for.

    Raises:
        AssetError: If the file is missing or damaged, or is not a checkpoint of this network.
    """
    with torch.device("meta"):  # initial values would be drawn and thrown away
        network = Network()
    network.to_empty(device="cpu")
    if weights == "random":
        with torch.no_grad():
            _randomise(network)
    else:
        path = _fetched() if weights == "default" else Path(weights).expanduser()
        _fill(network, path)
    network.eval().requires_grad_(False).to(device)
    network.prepare()
    return network


def _fetched() -> Path:
    (manifest,) = plugin.coatkit_manifests()
    (asset,) = (asset for asset in manifest.assets if asset.name == CHECKPOINT)
    return require(manifest.name, asset)


def _fill(network: Network, path: Path) -> None:
    with torch.serialization.safe_globals(_ARRAYS):
        content = read_weights("panns", path)
    tensors = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise AssetError(
            f"panns: {path} holds no tensors under 'model'; expected a checkpoint of PANNs Cnn14_DecisionLevelMax, "
            f"such as {CHECKPOINT}"
        )
    fill_weights("panns", path, network, tensors)
    # The spectrum is computed by FFT, so the front end in the file must be the one this stands for.
    for name, kernel in zip(_KERNELS, front_end.windowed_fourier(), strict=True):
        error = float((network.get_parameter(name).detach() - kernel).abs().max())
        if not error <= _LARGEST_ERROR:
            raise AssetError(
                f"panns: {path}: {name} is not the Fourier transform of a Hann window of 1,024 samples (off by "
                f"{error:.1e}); this expert reads checkpoints of Cnn14_DecisionLevelMax at 32 kHz only"
            )


def _randomise(network: Network) -> None:
    """Random weights, always the same: the front end as in a checkpoint, features of order 1 on sounds."""
    generator = torch.Generator().manual_seed(0)
    for name, kernel in zip(_KERNELS, front_end.windowed_fourier(), strict=True):
        network.get_parameter(name).copy_(kernel)
    network.get_parameter("logmel_extractor.melW").copy_(front_end.mel_bank())
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    # Levels are decibels: -100 in silence, about -20 in loud sound.
    assert network.bn0.running_mean is not None
    assert network.bn0.running_var is not None
    network.bn0.running_mean.fill_(-40.0)
    network.bn0.running_var.fill_(400.0)
