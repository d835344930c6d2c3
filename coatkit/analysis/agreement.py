"""How far a head's prediction agrees with what its expert hears, in numbers over one sound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coatkit.readout import Readout

MEANING = {
    "cosine": "mean cosine between prediction and target",
    "cosine of the mean": "the same for the target's own mean over this sound in place of a prediction",
    "variance explained": "1 - squared error / target's variance over this sound; 0 is the mean's",
    "BCE": "binary cross-entropy of the readout's probabilities, nats",
    "least BCE": "that of the target against itself",
    "frame F1": "of what is present (from the threshold on) at each position, micro-averaged",
    "present": "how many are present in the target, and in the prediction",
}
"""What each number is."""


def of_features(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Cosines and the variance explained of features [M, dim], M at least 1.

    A feature that is far from zero all the time makes any prediction look good by its cosine, so the target's mean over
    the sound is scored beside it: what is heard shows in what a prediction gains over that.

    Returns:
        `cosine`, `cosine of the mean`, and `variance explained` where the target changes at all.
    """
    mean = target.mean(0, keepdim=True)
    found = {
        "cosine": float(cosines(predicted, target).mean()),
        "cosine of the mean": float(cosines(mean.expand_as(target), target).mean()),
    }
    total = float((target - mean).square().sum())
    if len(target) > 1 and total > 1e-12 * target.numel():
        found["variance explained"] = 1 - float((predicted - target).square().sum()) / total
    return found


def cosines(predicted: Tensor, target: Tensor) -> Tensor:
    """[M] cosine at each position; 0 where one of the two is all zeros."""
    return torch.nn.functional.cosine_similarity(predicted.double(), target.double(), dim=-1).float()


def of_readouts(predicted: Readout, target: Readout) -> dict[str, float]:
    """Agreement of two readouts of one sound, values [M, C].

    Frequencies are counted by semitone: a semitone is present where any of its channels is.

    Returns:
        `BCE` and `least BCE` where values are probabilities; `frame F1`, NaN where nothing is present in either; and
        `present`, `predicted present`: positions x channels that are.
    """
    found = {}
    if target.unit == "probability":
        p, t = predicted.values.clamp(1e-7, 1 - 1e-7), target.values.clamp(0, 1)
        found["BCE"] = float(torch.nn.functional.binary_cross_entropy(p, t))
        found["least BCE"] = float(torch.nn.functional.binary_cross_entropy(t.clamp(1e-7, 1 - 1e-7), t))
    one, other = (_notes(readout) >= target.threshold for readout in (predicted, target))
    both, either = int((one & other).sum()), int(one.sum()) + int(other.sum())
    found["frame F1"] = 2 * both / either if either else math.nan
    found["present"], found["predicted present"] = int(other.sum()), int(one.sum())
    return found


def _notes(readout: Readout) -> Tensor:
    """[M, C] values; [M, semitones] with the largest of each semitone's channels where channels are frequencies."""
    if not readout.hertz:
        return readout.values
    semitone = (12 * torch.log2(torch.tensor(readout.hertz, dtype=torch.float64) / 440.0)).round().long()
    index = semitone - semitone.min()
    out = torch.full((len(readout.values), int(index.max()) + 1), -math.inf)
    return out.scatter_reduce(1, index.expand(len(readout.values), -1), readout.values.float(), "amax")
