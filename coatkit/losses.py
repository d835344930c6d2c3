"""Masked losses shared by experts: every one is a mean over valid positions, so that batches can be re-weighted
exactly. And the response's cross-entropy, in little memory.

Shapes: prediction and target [A, L, d], mask [A, L] bool. Sums run in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


CHUNK_VALUES = 1 << 26
"""Logits held at once: 256 MB in float32."""


def projected_cross_entropy(hidden: Tensor, labels: Tensor, project: nn.Module) -> Tensor:
    """Cross-entropy of tokens summed, in nats, without ever holding all logits.

    With a 150 k vocabulary the logits of a few thousand answer tokens are gigabytes, and as much again for their
    gradient. Long answers are taken in chunks; a frozen projection's gradient is made chunk by chunk on the way
    forward, and one that learns is computed a second time on the way back.

    Args:
        hidden: [N, d] states.
        labels: [N] int64 token of each state.
        project: From states to logits [N, V].
    """
    learns = any(p.requires_grad for p in project.parameters())
    vocabulary = next(p.shape[0] for p in project.parameters())
    size = max(1, CHUNK_VALUES // vocabulary)
    if hidden.requires_grad and not learns and torch.is_grad_enabled():
        summed: Tensor = _FrozenCrossEntropy.apply(hidden, labels, project, size)
        return summed
    if labels.numel() <= size:
        return _cross_entropy(hidden, labels, project)
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, tokens in zip(torch.split(hidden, size), torch.split(labels, size), strict=True):
        total = total + checkpoint(_cross_entropy, states, tokens, project, use_reentrant=False)
    return total


def _cross_entropy(hidden: Tensor, labels: Tensor, project: nn.Module) -> Tensor:
    return F.cross_entropy(project(hidden).float(), labels, reduction="sum")


class _FrozenCrossEntropy(torch.autograd.Function):
    """The sum and its gradient in one pass: d loss / d logits is softmax - onehot, made in the logits' own memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, project: nn.Module, size: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        for states, tokens in zip(torch.split(hidden, size), torch.split(labels, size), strict=True):
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                logits = project(states)
            # A linear map's output is not needed on its way back; another module's may be.
            values = logits.detach().to(torch.float32, copy=not isinstance(project, nn.Linear))
            top, right = values.amax(-1, keepdim=True), values.gather(-1, tokens[:, None])
            mass = values.sub_(top).exp_().sum(-1, keepdim=True)
            total += (mass.log() + top - right).sum()
            values.div_(mass).scatter_add_(-1, tokens[:, None], values.new_full((len(tokens), 1), -1.0))
            logits.backward(values.to(logits.dtype))  # not autograd.grad, with which torch's counters fail
            assert states.grad is not None
            gradients.append(states.grad)
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        return (saved * gradient).to(saved.dtype), None, None, None
