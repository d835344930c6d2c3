"""Masked losses shared by experts: every one is a mean over valid positions, so that batches can be re-weighted
exactly.

Shapes: prediction and target [A, L, d], mask [A, L] bool. Sums run in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of [A, L, ...] values over the positions in `mask` and over all trailing dimensions.

    Raises:
        ValueError: If the mask is empty or its shape is not that of the first two dimensions.
    """
    if values.shape[:2] != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not match values {tuple(values.shape)}")
    kept = values[mask]
    if kept.numel() == 0:
        raise ValueError("the mask selects no position")
    return kept.float().mean()


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over valid positions and features (paper section 3, representational experts).

    Raises:
        ValueError: If the shapes differ; broadcasting would hide an expert whose `dim` is wrong.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} does not match target {tuple(target.shape)}")
    return masked_mean((predicted.float() - target.float()) ** 2, mask)


def masked_bce(logits: Tensor, probability: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of logits against soft targets in [0, 1], in nats."""
    return masked_mean(F.binary_cross_entropy_with_logits(logits.float(), probability.float(), reduction="none"), mask)


def masked_focal_bce(
    logits: Tensor, probability: Tensor, mask: Tensor, *, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    """Focal binary cross-entropy against soft targets, in nats.

    The focal factor of Lin et al. (2017) for a soft target t is |t - p| ** gamma, which is (1 - p_t) ** gamma at t in
    {0, 1}; it quiets the many easy silent bins of a pitch map.

    Args:
        gamma: Focusing strength; 0 gives plain BCE.
        alpha: Weight of the positive class in [0, 1], or None for none.
    """
    logits, probability = logits.float(), probability.float()
    bce = F.binary_cross_entropy_with_logits(logits, probability, reduction="none")
    weight = (probability - torch.sigmoid(logits)).abs() ** gamma
    if alpha is not None:
        weight = weight * (alpha * probability + (1 - alpha) * (1 - probability))
    return masked_mean(weight * bce, mask)
