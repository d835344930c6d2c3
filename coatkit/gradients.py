"""Which teachers pull apart: each loss's own gradient on what all of them share.

Looked at now and then, when a spec asks for it (`gradients_every`). Nothing of the training changes by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatkit.data.steps import Batch
from coatkit.errors import RunError
from coatkit.files import without_links
from coatkit.model import CoatModel, whose
from coatkit.spec import Spec, StageSpec
from coatkit.thinking import answer_tokens


def shared_parameters(model: CoatModel) -> list[nn.Parameter]:
    """What learns outside the heads, in a fixed order: every loss reaches it."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("heads.")]


def refuse_sharded(spec: Spec) -> None:
    """Refuse what needs a gradient of its own for each loss or part, where parameters are sharded.

    Raises:
        RunError: Naming the key.
    """
    if spec.gradients_every:
        raise RunError("gradients_every: losses cannot be told apart where parameters are sharded; set it to 0")
    for stage in spec.stages:
        if not all(stage.lr.values()):
            raise RunError(
                f"stage {stage.name!r}: lr: no part can rest (rate 0) where parameters are sharded; train with DDP"
            )


def look_into(
    file: Path,
    step: int,
    stage: StageSpec,
    model: CoatModel,
    batches: Sequence[Batch | None],
    weights: Mapping[str, float],
) -> None:
    """Add what `look` finds at a step, on the first of its batches that has rows, to a file of lines."""
    batch = next(b for b in batches if b is not None)
    seen = look(model, batch, stage.active, weights)
    with open(file, "a", encoding="utf-8", opener=without_links) as stream:
        stream.write(json.dumps({"step": step, "stage": stage.name, **seen}, ensure_ascii=False) + "\n")


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
        if total.requires_grad and shared:  # in a stage where heads alone learn, nothing is shared
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
