"""Parity of coatkit-expert-spidr with spidr 0.2.0, on random weights.

Upstream's checkpoint is written as its training writes one, and loaded with its own loader. A sound is scaled with a
layer norm over all of it, as upstream's data set does it, and goes through alone, as upstream's script for features
does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ["spidr", "torch", "numpy"]
RATE = 16_000
LIMITS = {"features": 1e-5, "layer 6": 1e-5, "upstream's batch": 1e-5}
NOTE = (
    "Random weights. Ours encodes all sounds in one batch, upstream each alone, and for 'upstream's batch' all in one "
    "padded batch with its attention mask. The released package asks for Python 3.12; its model code runs unchanged "
    "on 3.11."
)

Encode = Callable[[list[np.ndarray]], list[dict[str, np.ndarray]]]


def _write(path: Path) -> None:
    """A checkpoint as upstream's training writes it, with random tensors of which no two could be swapped unseen."""
    import torch
    from spidr.config import SpidRConfig
    from spidr.models import build_model

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build_model(cfg=SpidRConfig()).requires_grad_(False)
    for name, value in model.student.named_parameters():
        if value.ndim == 1:
            value += 0.2 * torch.randn_like(value)
        elif "qkv" in name:
            value *= 2  # attention that chooses
    for part in (model.feature_extractor, model.feature_projection):
        for value in part.parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn_like(value)
    position = {"epoch": torch.zeros(1, dtype=torch.long), "step": torch.zeros(1, dtype=torch.long)}
    torch.save({"model": model.state_dict(), "optimizer": {}, "scheduler": {}, "scaler": {}, **position}, path)


def upstream(folder: Path, extras: bool = True) -> Encode:
    """The student's output for each sound; with extras also that of layer 6, and of a padded batch."""
    import torch
    import torch.nn.functional as F
    from spidr.config import DEFAULT_CONV_LAYER_CONFIG
    from spidr.models import build_model
    from torch.nn.utils.rnn import pad_sequence

    path = folder / "weights.pt"
    if not path.is_file():
        _write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no config.json lies beside it: the defaults are spidr_base
        model: Any = build_model(model_type="spidr", checkpoint=path).eval()

    def frames(samples: int) -> int:
        for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG:
            samples = (samples - kernel) // stride + 1
        return samples

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        scaled = [F.layer_norm(torch.from_numpy(samples), samples.shape) for samples in heard]
        found = []
        for samples in scaled:
            projected = model.feature_projection(model.feature_extractor(samples[None]))
            arrays = {"features": model.student(projected)[0].numpy()}
            if extras:
                outputs = model.student.get_intermediate_outputs(projected, before_residual=False)
                arrays["layer 6"] = outputs[5][0].numpy()
            found.append(arrays)
        if extras:
            counts = torch.tensor([frames(len(samples)) for samples in scaled])
            projected = model.feature_projection(model.feature_extractor(pad_sequence(scaled, batch_first=True)))
            mask = (torch.arange(projected.shape[1]) < counts[:, None])[:, None, None]
            for arrays, values, count in zip(found, model.student(projected, mask), counts.tolist(), strict=True):
                arrays["upstream's batch"] = values[:count].numpy()
        return found

    return encode


def ours(folder: Path, extras: bool = True) -> Encode:
    """The expert, one batch of all sounds."""
    import torch

    import coatkit

    weights = str(folder / "weights.pt")
    experts = {"features": coatkit.load_expert("spidr", weights=weights)}
    if extras:
        experts["layer 6"] = coatkit.load_expert("spidr", weights=weights, layer=6)

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        audio = coatkit.AudioBatch.from_arrays(heard, RATE)
        found: list[dict[str, np.ndarray]] = [{} for _ in heard]
        for key, expert in experts.items():
            features = expert.encode(audio)
            for arrays, values, length in zip(found, features.values, features.lengths.tolist(), strict=True):
                arrays[key] = values[:length].numpy()
        for arrays in found if extras else ():
            arrays["upstream's batch"] = arrays["features"]
        return found

    return encode
