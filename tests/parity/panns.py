"""Parity of coatkit-expert-panns with the panns-inference package: random but equal weights on both sides."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PACKAGES = ["panns-inference", "torchlibrosa", "torch"]
RATE = 32_000
LIMITS = {"features": 1e-4, "events": 1e-4}
NOTE = (
    "Random weights, drawn so that a swapped tensor shows. `events` are the probabilities of the 527 classes that "
    "upstream's `SoundEventDetection` returns. It fails on sounds shorter than 0.31 s, which ours follows with zeros."
)

SEGMENT, SHORTEST = 32, 9_920
Encode = Callable[[list[np.ndarray]], list[dict[str, np.ndarray] | None]]


def upstream(folder: Path, extras: bool = True) -> Encode:
    """z where `fc_audioset` reads it, and the frame-wise probabilities of `SoundEventDetection.inference`.

    With extras each sound goes alone, for upstream's padding reaches into a sound's last segments. Without, upstream
    takes the faster of its two ways: one by one, or all in one batch padded to the longest.
    """
    import torch

    _move_home(folder)
    from panns_inference import SoundEventDetection
    from panns_inference.models import Cnn14_DecisionLevelMax

    path = folder / "weights.pt"
    if not path.exists():
        network = Cnn14_DecisionLevelMax(32_000, 1_024, 320, 64, 50, 14_000, 527)
        _draw(network)
        # As upstream's training writes it, but for the sampler, which upstream's own reader refuses by now.
        torch.save({"iteration": 600_000, "model": network.state_dict()}, path)
    with contextlib.redirect_stdout(sys.stderr):  # it tells where its weights are, where `serve` answers
        detector = SoundEventDetection(checkpoint_path=str(path), device="cpu")
    assert len(detector.labels) == 527, "upstream read another list of labels"
    features: list[torch.Tensor] = []
    if extras:
        detector.model.fc_audioset.register_forward_pre_hook(lambda _, given: features.append(given[0]))

    def one_by_one(heard: list[np.ndarray]) -> None:
        for samples in heard:
            detector.inference(samples[None])

    def padded(heard: list[np.ndarray]) -> None:
        batch = np.zeros((len(heard), max(map(len, heard))), np.float32)
        for row, samples in zip(batch, heard, strict=True):
            row[: len(samples)] = samples
        detector.inference(batch)

    quickest: dict[tuple[int, ...], Callable[[list[np.ndarray]], None]] = {}

    def timed(heard: list[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
        lengths = tuple(map(len, heard))
        if lengths not in quickest:  # found out where sounds of these lengths are met first, and not timed after that
            took = {}
            for way in (one_by_one, padded, one_by_one, padded):
                start = time.perf_counter()
                way(heard)
                took[way] = time.perf_counter() - start
            quickest[lengths] = min(took, key=took.__getitem__)
        quickest[lengths](heard)
        return [None] * len(heard)

    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
        found: list[dict[str, np.ndarray] | None] = []
        for samples in heard:
            if len(samples) < SHORTEST:
                found.append(None)
                continue
            features.clear()
            events = detector.inference(samples[None])[0]
            found.append({"features": features[0][0].numpy(), "events": events})
        return found

    return encode if extras else timed


def ours(folder: Path, extras: bool = True) -> Encode:
    """The expert's features, and the probabilities of its classifier repeated over the frames as upstream does."""
    import torch

    import coatkit

    expert = coatkit.load_expert("panns", weights=str(folder / "weights.pt"))

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
        made = expert.encode(coatkit.AudioBatch.from_arrays(heard, RATE))
        found: list[dict[str, np.ndarray] | None] = []
        for samples, values, length in zip(heard, made.values, made.lengths.tolist(), strict=True):
            arrays = {"features": values[:length].numpy()}
            if extras:
                events = torch.sigmoid(expert.event_logits(values[:length])).numpy()
                frame = np.arange(len(samples) // 320 + 1)
                arrays["events"] = events[np.minimum(frame // SEGMENT, length - 1)]
            found.append(arrays)
        return found

    return encode


def _move_home(folder: Path) -> None:
    """Give upstream a home with the list of labels it looks for there: without it, importing it runs wget."""
    shipped = Path(__file__).resolve().parents[2] / "plugins/coatkit-expert-panns/src/coatkit_expert_panns/labels"
    place = folder / "home" / "panns_data"
    place.mkdir(parents=True, exist_ok=True)
    (place / "class_labels_indices.csv").write_bytes((shipped / "class_labels_indices.csv").read_bytes())
    os.environ["HOME"] = str(place.parent)


def _draw(network) -> None:  # type: ignore[no-untyped-def]  # a torch module; torch is not imported here
    """Random weights that keep features of order 1, and norms that are not all ones and zeros."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.2, generator=generator)
                module.bias.uniform_(-0.2, 0.2, generator=generator)
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.8, 1.2, generator=generator)
            elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.2, 0.2, generator=generator)
        network.bn0.running_mean.sub_(40.0)  # levels are decibels, -100 in silence
        network.bn0.running_var.mul_(400.0)
