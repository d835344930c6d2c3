"""Weights of the network: strict loading from a safetensors file, and the random control."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from coatkit import fill_weights, read_weights
from coatkit_expert_basic_pitch.network import Network

SHIPPED = Path(__file__).parent / "weights" / "basic_pitch.safetensors"


def randomise(network: Network) -> None:
    """Draw the learned layers anew, always the same way; the constant-Q kernels are no learned layer and stay."""
    generator = torch.Generator().manual_seed(0)
    network.norm_scale.fill_(1.0)
    network.norm_shift.fill_(0.0)
    for layer in (network.contour1, network.contour2):
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def build(weights: str) -> Network:
    """A frozen float32 network on the CPU with the weights that the option of that name asks for.

    Raises:
        AssetError: If the file is missing, damaged, or does not hold exactly the network's tensors.
    """
    with torch.random.fork_rng(devices=[]):  # building a layer draws numbers that are thrown away
        network = Network()
    path = SHIPPED if weights in ("default", "random") else Path(weights).expanduser()
    fill_weights("basic-pitch", path, network, read_weights("basic-pitch", path))
    if weights == "random":
        randomise(network)
    network.fold()
    return network.eval().requires_grad_(False)
