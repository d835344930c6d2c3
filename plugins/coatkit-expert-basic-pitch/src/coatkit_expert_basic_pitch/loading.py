"""Weights of the network: strict loading from a safetensors file, and the random control."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coatkit import AssetError
from coatkit_expert_basic_pitch.network import Network

SHIPPED = Path(__file__).parent / "weights" / "basic_pitch.safetensors"


def read(network: Network, path: Path) -> None:
    """Fill the network with the tensors of a file.

    Raises:
        AssetError: If the file is missing, is not safetensors, or does not hold exactly the network's tensors; names
            the file and the tensors.
    """
    try:
        found = load_file(path)
    except FileNotFoundError as error:
        raise AssetError(f"basic-pitch: there is no weights file {path}") from error
    except (SafetensorError, OSError) as error:
        raise AssetError(f"basic-pitch: {path} is not a readable safetensors file: {error}") from error
    wanted = network.state_dict()
    problems = [f"missing {key}" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} has shape {tuple(found[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & found.keys())
        if found[key].shape != wanted[key].shape
    ]
    if problems:
        raise AssetError(f"basic-pitch: {path} does not fit the network: {'; '.join(problems)}")
    network.load_state_dict(found)


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
        AssetError: As `read`.
    """
    with torch.random.fork_rng(devices=[]):  # building a layer draws numbers that are thrown away
        network = Network()
    read(network, SHIPPED if weights in ("default", "random") else Path(weights).expanduser())
    if weights == "random":
        randomise(network)
    return network.eval().requires_grad_(False)
