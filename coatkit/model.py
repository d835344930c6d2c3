"""Backbone, heads and experts as one module, whose forward gives every loss term of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coatkit.align import align
from coatkit.data.steps import Batch
from coatkit.protocols import Backbone, Expert, Head


@dataclass
class Losses:
    """Loss terms of one batch as sums, so that they can be normalised over all batches of a step.

    Attributes:
        sums: `ce` and `EXPERT.TERM` to the sum over answer tokens or thinking positions, with gradient.
        counts: `ce` and each expert to what its sums run over.
    """

    sums: dict[str, Tensor]
    counts: dict[str, int]


class CoatModel(nn.Module):
    """What is trained. Experts are held outside the module tree: they are frozen and are not saved.

    Args:
        backbone: Loaded.
        heads: One for each expert, by the expert's name.
        experts: Loaded; may be empty when only answering.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head], experts: Mapping[str, Expert]) -> None:
        super().__init__()
        self.net = backbone.model
        self.heads = nn.ModuleDict(heads)
        self._outside = (backbone, dict(experts))

    @property
    def backbone(self) -> Backbone:
        return self._outside[0]

    @property
    def experts(self) -> dict[str, Expert]:
        return self._outside[1]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the names a stage's `lr` may use; each expert's head is `heads.NAME`."""
        found = dict(self.backbone.parts())
        for name, head in self.heads.items():
            found[f"heads.{name}"] = list(head.parameters())
        return found

    def forward(self, batch: Batch, active: Sequence[str]) -> Losses:
        """Loss terms of a prepared batch.

        Args:
            batch: Inputs and the same sounds at the experts' sample rates.
            active: Experts that teach now; the others' heads are not run.
        """
        out = self.backbone.forward(batch.inputs)
        losses = Losses({"ce": out.ce_sum}, {"ce": out.ce_count})
        if out.thinking is None or out.audio is None:
            return losses
        device = out.thinking.device
        mask, lengths = batch.inputs.think_mask.to(device), batch.inputs.think_lengths.to(device)
        rate = self.backbone.preparer.thinking_rate
        count = int(lengths.sum())
        for name in active:
            expert = self.experts[name]
            with torch.no_grad():
                audio = batch.audio[expert.sample_rate].to(device)
                audio.backbone = out.audio if expert.uses_backbone else None
                target = align(expert.encode(audio), lengths, rate, expert.upsampling)
            predicted = self.heads[name](out.thinking.float(), mask).float()
            for term, value in expert.loss(predicted, target, mask).items():
                losses.sums[f"{name}.{term}"] = value * count
            losses.counts[name] = count
        return losses
