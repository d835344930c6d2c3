"""Backbone, heads and experts as one module, whose forward gives every loss term of a batch."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coatkit.align import align
from coatkit.data.steps import Batch
from coatkit.errors import PluginError, foreign_code
from coatkit.precision import exact_float32
from coatkit.protocols import AudioBatch, Backbone, BackboneAudio, Expert, Features, Head


@dataclass
class Losses:
    """Loss terms of one batch as sums, so that they can be normalised over all batches of a step.

    Attributes:
        sums: `ce` and `EXPERT.TERM` to the sum over answer tokens or thinking positions, with gradient.
        nothing: Zero, with a gradient of zeros for all that learns where processes must reduce the same gradients.
    """

    sums: dict[str, Tensor]
    nothing: Tensor

    def means(self, answers: int, thinking: int) -> dict[str, Tensor]:
        """The terms divided by the counts they run over, which may be those of a whole step: `ce` by answer tokens, the
        others by thinking positions."""
        return {k: v / max(1, answers if k == "ce" else thinking) for k, v in self.sums.items()}


def whose(term: str) -> str:
    """The expert that a loss term belongs to, or `ce`: the name its weight goes by."""
    return term.partition(".")[0]


def _named(expert: str, method: str, rows: Sequence[str]) -> AbstractContextManager[None]:
    """Say whose code failed, where, and on which rows; an expert may be anybody's."""

    def describe(error: Exception) -> str:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"expert {expert!r}: {method} failed at {frame.filename}:{frame.lineno}: {type(error).__name__}: {error}"
            f"\n  in a batch of rows {', '.join(rows)}"
        )

    return foreign_code(describe)


def check_features(features: Features, audio: AudioBatch, expert: Expert) -> None:
    """Refuse features that are not what the expert declares.

    Raises:
        ValueError: Saying what was expected.
    """
    if not isinstance(features, Features):
        raise ValueError(f"encode must give Features, not {type(features).__name__}")
    sounds, shape = len(audio), tuple(features.values.shape)
    if len(shape) != 3 or shape[0] != sounds or shape[2] != expert.dim:
        raise ValueError(f"encode gave values {shape}; expected [{sounds}, frames, {expert.dim}] for dim {expert.dim}")
    lengths = features.lengths
    if tuple(lengths.shape) != (sounds,) or bool((lengths < 0).any()) or bool((lengths > shape[1]).any()):
        raise ValueError(f"encode gave lengths {lengths.tolist()} for {sounds} sounds of {shape[1]} frames at most")
    if abs(features.frame_rate - expert.frame_rate) > 1e-6 * expert.frame_rate:
        raise ValueError(
            f"encode gave {features.frame_rate} frames per second, the expert declares {expert.frame_rate}"
        )

    heard = lengths.double().cpu() / features.frame_rate + features.offset
    missed = (heard - audio.seconds.cpu()).abs()
    if expert.hears_all and bool((missed > max(2 / features.frame_rate, 0.1)).any()):
        worst = int(missed.argmax())
        raise ValueError(
            f"encode's frames cover {float(heard[worst]):.2f} s of a sound of {float(audio.seconds[worst]):.2f} s;"
            " if the encoder hears only part of it, say so with the class attribute hears_all = False"
        )


class CoatModel(nn.Module):
    """What is trained. Experts are held outside the module tree: they are frozen and are not saved.

    Args:
        backbone: Loaded.
        heads: One for each expert, by the expert's name.
        experts: Loaded; may be empty when only answering.

    Raises:
        PluginError: If an expert has a name that torch or the losses need for themselves.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, Head], experts: Mapping[str, Expert]) -> None:
        super().__init__()
        self.net = backbone.model
        if taken := [name for name in heads if name == "ce" or hasattr(nn.ModuleDict(), name)]:
            raise PluginError(
                f"experts.{taken[0]}: this name is needed inside coatkit; give the expert another, and name it in 'use'"
            )
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

    def forward(self, batch: Batch | None, active: Sequence[str], *, together: bool = False) -> Losses:
        """Loss terms of a prepared batch.

        Args:
            batch: Inputs and the same sounds at the experts' sample rates; None in a process that has no row.
            active: Experts that teach now; the others' heads are not run.
            together: Whether other processes wait for the gradient of every parameter: one without sounds, or without
                rows, then gives zeros.
        """
        losses = Losses({}, self._nothing(together))
        if batch is None:
            return losses
        out = self.backbone.forward(batch.inputs)
        losses.sums["ce"] = out.ce_sum
        if out.thinking is None or out.audio is None:
            return losses
        device = out.thinking.device
        count = int(batch.inputs.think_lengths.sum())
        mask = batch.inputs.think_mask.to(device, non_blocking=True)
        lengths = batch.inputs.think_lengths.to(device, non_blocking=True)
        for name in active:
            expert = self.experts[name]
            target = self.target(name, batch, out.audio, lengths)
            with _named(name, "head", batch.inputs.row_ids):
                predicted = self.predict(name, out.thinking.float(), mask)
            with exact_float32(device), _named(name, "loss", batch.inputs.row_ids):
                terms = expert.loss(predicted, target, mask)
                if not isinstance(terms, dict) or any(value.ndim for value in terms.values()):
                    raise ValueError("loss must give a dict of names to scalar tensors")
            for term, value in terms.items():
                losses.sums[f"{name}.{term}"] = value * count
        return losses

    def predict(self, name: str, states: Tensor, mask: Tensor) -> Tensor:
        """What a head makes of float32 thinking states [A, M, d_model]: [A, M, dim], float32.

        Its products are in the backbone's type, in training and when one only looks.
        """
        dtype = self.backbone.dtype
        with torch.autocast(states.device.type, dtype=dtype, enabled=dtype != torch.float32):
            made: Tensor = self.heads[name](states, mask)
        return made.float()

    @torch.no_grad()
    def target(self, name: str, batch: Batch, heard: BackboneAudio, lengths: Tensor) -> Tensor:
        """What an expert makes of the batch's sounds, at the thinking positions: [A, M, dim]; stored or computed."""
        expert, device = self.experts[name], lengths.device
        if name in batch.stored:
            return batch.stored[name].to(device, non_blocking=True)
        audio = batch.audio[expert.sample_rate].to(device)
        audio.backbone = heard if expert.uses_backbone else None
        # A teacher works in float32, whatever the backbone's type.
        with exact_float32(device), _named(name, "encode", batch.inputs.row_ids):
            features = expert.encode(audio)
            check_features(features, audio, expert)
            return align(features, lengths, self.backbone.preparer.thinking_rate, expert.upsampling)

    @torch.no_grad()
    def targets(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """What experts make of a batch's sounds, each [A, M, dim]; none where the batch has no sound."""
        out = self.backbone.forward(batch.inputs)
        if out.thinking is None or out.audio is None:
            return {}
        lengths = batch.inputs.think_lengths.to(out.thinking.device)
        return {name: self.target(name, batch, out.audio, lengths) for name in names}

    def _nothing(self, together: bool) -> Tensor:
        # What is still sharded at this point belongs to units that every process runs.
        learning = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)] if together else []
        zero = torch.zeros((), device=next(self.parameters()).device)
        return sum((p.flatten()[0].float() * 0.0 for p in learning), zero)
