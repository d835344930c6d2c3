"""Which teachers pull apart: each loss's own gradient on what all of them share.

Looked at now and then, when a spec asks for it (`gradients_every`). Nothing of the training changes by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from coatkit.data.steps import Batch
from coatkit.model import CoatModel, whose
from coatkit.thinking import answer_tokens


def shared_parameters(model: CoatModel) -> list[nn.Parameter]:
    """What learns outside the heads, in a fixed order: every loss reaches it."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")]


def look(model: CoatModel, batch: Batch, active: Sequence[str], weights: Mapping[str, float]) -> dict[str, Any]:
    """Norms and cosines of the gradients of `ce` and of every active expert's weighted loss, for one batch.

    The random state is put back, and no gradient is left behind, so that training goes on as if nobody had looked.

    Args:
        batch: With rows; its losses are means over its own answers and positions.
        weights: Of `ce` and the experts, as in the stage.

    Returns:
        `norms` by loss; `cosines` by pair, `a|b`, in [-1, 1]: below 0 they pull apart. A loss without gradient here
        (rows of text have no expert's) is left out.
    """
    shared = shared_parameters(model)
    devices = sorted({p.device.index or 0 for p in shared if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        losses = model(batch, active)
    means = losses.means(answer_tokens(batch.inputs.labels), int(batch.inputs.think_lengths.sum()))
    totals: dict[str, Tensor] = {}
    for term, mean in means.items():
        name, part = whose(term), weights[whose(term)] * mean
        totals[name] = totals[name] + part if name in totals else part
    found: dict[str, Tensor] = {}
    for name, total in totals.items():
        if total.requires_grad:
            parts = torch.autograd.grad(total, shared, retain_graph=True, allow_unused=True)
            if any(part is not None for part in parts):
                zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(shared, parts, strict=True))
                found[name] = torch.cat([g.detach().float().flatten() for g in zeros])
    norms = {name: float(gradient.norm()) for name, gradient in found.items()}
    cosines = {
        f"{a}|{b}": float(found[a] @ found[b]) / (norms[a] * norms[b])
        for a, b in combinations(found, 2)
        if norms[a] > 0 and norms[b] > 0
    }
    return {"rows": batch.inputs.row_ids, "norms": norms, "cosines": cosines}
