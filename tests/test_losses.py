"""Masked losses against references written in numpy, one element at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coatkit import losses
from coatkit.losses import masked_bce, masked_focal_bce, masked_mean, masked_mse, projected_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def squared(prediction: float, target: float) -> float:
    return (prediction - target) ** 2


def cross_entropy(logit: float, target: float) -> float:
    """-t log p - (1 - t) log(1 - p), with log(1 + e^x) written so that it does not overflow."""
    softplus = max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))
    return softplus - target * logit


def focal(logit: float, target: float, gamma: float, alpha: float | None = None) -> float:
    p = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    weight = abs(target - p) ** gamma
    if alpha is not None:
        weight *= alpha * target + (1 - alpha) * (1 - target)
    return weight * cross_entropy(logit, target)


def by_hand(element: Callable[[float, float], float], predicted: Tensor, target: Tensor, mask: Tensor) -> float:
    found = []
    for a, i in np.ndindex(*mask.shape):
        if mask[a, i]:
            pairs = zip(predicted[a, i].tolist(), target[a, i].tolist(), strict=True)
            found += [element(p, t) for p, t in pairs]
    return sum(found) / len(found)


def batch(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, soft targets in [0, 1] and a ragged mask."""
    random = torch.Generator().manual_seed(seed)
    predicted = scale * torch.randn(3, 5, 4, generator=random)
    target = torch.rand(3, 5, 4, generator=random)
    target[0, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    return predicted, target, torch.arange(5) < torch.tensor([5, 2, 1])[:, None]


CASES: dict[str, tuple[Loss, Callable[[float, float], float]]] = {
    "mse": (masked_mse, squared),
    "bce": (masked_bce, cross_entropy),
    "focal": (masked_focal_bce, lambda p, t: focal(p, t, 2.0)),
    "focal, gamma 0.5": (lambda p, t, m: masked_focal_bce(p, t, m, gamma=0.5), lambda p, t: focal(p, t, 0.5)),
    "focal, alpha 0.25": (lambda p, t, m: masked_focal_bce(p, t, m, alpha=0.25), lambda p, t: focal(p, t, 2.0, 0.25)),
}
every_loss = pytest.mark.parametrize(("loss", "element"), CASES.values(), ids=CASES)


@every_loss
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_equals_the_reference(loss: Loss, element: Callable[[float, float], float], scale: float) -> None:
    predicted, target, mask = batch(scale=scale)
    assert float(loss(predicted, target, mask)) == pytest.approx(by_hand(element, predicted, target, mask), rel=1e-5)


@every_loss
def test_what_lies_outside_the_mask_has_no_part(loss: Loss, element: Callable[[float, float], float]) -> None:
    predicted, target, mask = batch()
    predicted.requires_grad_(True)
    value = loss(predicted, target, mask)
    value.backward()
    other = torch.where(mask[..., None], predicted.detach(), 1e4).requires_grad_(True)
    other_value = loss(other, torch.where(mask[..., None], target, 0.5), mask)
    other_value.backward()
    assert torch.equal(value, other_value)
    assert predicted.grad is not None
    assert torch.equal(predicted.grad, other.grad)
    assert (predicted.grad[~mask] == 0).all()
    assert (predicted.grad[mask] != 0).all()


@every_loss
def test_a_step_down_the_gradient_lowers_the_loss(loss: Loss, element: Callable[[float, float], float]) -> None:
    predicted, target, mask = batch()
    predicted.requires_grad_(True)
    before = loss(predicted, target, mask)
    before.backward()
    assert loss(predicted - 0.1 * predicted.grad, target, mask) < before
    assert target.grad is None


@every_loss
def test_half_precision_is_summed_in_float32(loss: Loss, element: Callable[[float, float], float]) -> None:
    predicted, target = torch.full((1, 4000, 1), 0.5), torch.zeros(1, 4000, 1)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    got = loss(predicted.bfloat16(), target.bfloat16(), mask)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(element(0.5, 0.0), rel=1e-5)


def test_a_mean_of_half_precision_is_taken_in_float32() -> None:
    values = torch.full((1, 4000, 1), 0.5, dtype=torch.bfloat16)
    values[0, 0] = 1.5
    got = masked_mean(values, torch.ones(1, 4000, dtype=torch.bool))
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(0.5 + 1 / 4000, rel=1e-6)


@every_loss
def test_an_empty_mask_is_refused(loss: Loss, element: Callable[[float, float], float]) -> None:
    predicted, target, mask = batch()
    with pytest.raises(ValueError, match="the mask selects no position"):
        loss(predicted, target, torch.zeros_like(mask))


@every_loss
def test_a_mask_of_another_shape_is_refused(loss: Loss, element: Callable[[float, float], float]) -> None:
    predicted, target, mask = batch()
    with pytest.raises(ValueError, match=r"mask \(3, 4\) does not match values \(3, 5, 4\)"):
        loss(predicted, target, mask[:, :4])


@every_loss
def test_targets_of_another_width_are_refused(loss: Loss, element: Callable[[float, float], float]) -> None:
    """A width of 1 would broadcast without a word."""
    predicted, target, mask = batch()
    with pytest.raises(ValueError, match=r"match|same as"):
        loss(predicted, target[..., :1], mask)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.1, 40))
def test_gamma_zero_is_plain_cross_entropy(seed: int, scale: float) -> None:
    predicted, target, mask = batch(seed, scale)
    plain = masked_bce(predicted, target, mask)
    torch.testing.assert_close(masked_focal_bce(predicted, target, mask, gamma=0.0), plain)
    # A factor of at most 1 can only quieten, and more so the larger gamma is.
    once, twice = (masked_focal_bce(predicted, target, mask, gamma=g) for g in (1.0, 2.0))
    assert twice <= once <= plain


def test_a_perfect_prediction_costs_nothing() -> None:
    _, target, mask = batch()
    assert masked_mse(target, target, mask) == 0
    assert masked_focal_bce(torch.logit(target[1:]), target[1:], mask[1:]) < 1e-10


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 30])
def test_cross_entropy_in_chunks_is_the_whole(monkeypatch: pytest.MonkeyPatch, tokens: int, learns: bool) -> None:
    random = torch.Generator().manual_seed(tokens)
    project = nn.Linear(6, 50)
    project.requires_grad_(learns)
    hidden = torch.randn(tokens, 6, generator=random, requires_grad=True)
    labels = torch.randint(50, (tokens,), generator=random)
    whole = F.cross_entropy(project(hidden), labels, reduction="sum")
    wanted = torch.autograd.grad(3 * whole, [hidden, *(project.parameters() if learns else ())])
    monkeypatch.setattr(losses, "CHUNK_VALUES", 8 * 50 + 3)
    found = projected_cross_entropy(hidden, labels, project)
    torch.testing.assert_close(found, whole)
    (3 * found).backward()
    made = [hidden.grad, *(p.grad for p in project.parameters() if learns)]
    for gradient, expected in zip(made, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(projected_cross_entropy(hidden, labels, project), whole)


def test_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_VALUES", 10 * 40)
    seen = []

    class Projection(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.append(input.shape[0])
            return super().forward(input)

    project = Projection(3, 40).requires_grad_(False)
    hidden = torch.randn(25, 3, requires_grad=True)
    projected_cross_entropy(hidden, torch.zeros(25, dtype=torch.long), project).backward()
    assert seen == [10, 10, 5]  # each chunk once: the way back computes none again
