"""What a trained model thinks while it listens: its states, what the heads make of them, and what the experts hear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coatkit import build, checkpoint
from coatkit.data.audio import LONGEST_ASKED
from coatkit.data.rows import Row
from coatkit.data.steps import Batch, load_batch
from coatkit.errors import AssetError
from coatkit.features import elsewhere
from coatkit.model import CoatModel
from coatkit.protocols import Backbone, Expert, Head, Output
from coatkit.readout import Readout
from coatkit.spec_file import LoadedSpec


@dataclass(frozen=True)
class Heard:
    """One sound as the model thinks of it; all tensors on the CPU, float32, without padding.

    Attributes:
        rate: Thinking positions per second, Hz.
        states: [M, d_model] final-layer states at the thinking positions; M is 0 where there is no block.
        predicted: By expert, [M, dim] of its head.
        target: By expert, [M, dim] that it gives itself; empty unless asked for.
        readout: By expert that has terms for its features: the prediction, read out.
        target_readout: The same for the targets.
    """

    rate: float
    states: Tensor
    predicted: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    readout: dict[str, Readout] = field(default_factory=dict)
    target_readout: dict[str, Readout] = field(default_factory=dict)


@dataclass(frozen=True)
class Thought:
    """One row's thinking.

    Attributes:
        row_id: The row's.
        sounds: One for each of its sounds, in order.
        last: [d_model] state where the answer begins (the pre-generation state); None where the backbone gives none.
    """

    row_id: str
    sounds: tuple[Heard, ...]
    last: Tensor | None


class Mind:
    """Backbone, heads and experts of a run, to look at what is thought.

    Attributes:
        model: With a head for every expert.
        unheard: Experts that cannot be run here, and why; their heads still predict.
    """

    def __init__(self, model: CoatModel, unheard: dict[str, str]) -> None:
        self.model, self.unheard = model.eval(), unheard

    @classmethod
    def of_run(cls, loaded: LoadedSpec, backbone: Backbone, learnt: Path | None) -> Mind:
        """The heads and experts of a run's spec around its backbone.

        Args:
            learnt: The checkpoint that the backbone has; None before training.

        Raises:
            PluginError: If an expert or a head cannot be made.
            RunError: If the checkpoint does not fit.
        """
        device = str(next(backbone.model.parameters()).device)
        experts: dict[str, Expert] = {}
        heads: dict[str, Head] = {}
        unheard = {}
        for name in loaded.spec.experts if loaded.spec.thinking is not None else ():
            stored = elsewhere(loaded, name)
            if stored is not None:
                unheard[name] = "it was run in another interpreter"
            try:
                experts[name] = build.expert_of(loaded, name, stored, backbone, device)
            except AssetError as error:
                unheard[name] = str(error)
                chosen = loaded.chosen[f"experts.{name}"]
                experts[name] = build.bound_expert(chosen.component, chosen.options, backbone)
            heads[name] = build.head_of(loaded, name, backbone, experts[name].dim, device)
        model = CoatModel(backbone, heads, experts)
        if learnt is not None:  # the heads alone: the backbone has its own already
            checkpoint.load_model(learnt, model, frozenset(), ignore="net.")
        return cls(model, unheard)

    @torch.no_grad()
    def think(self, rows: Sequence[Row], *, targets: bool = False) -> list[Thought]:
        """What is thought about rows, in one pass over all of them.

        Args:
            rows: A last message from the assistant is left out.
            targets: Run the experts too, for comparison.

        Raises:
            DataError: If a row's sound cannot be read or heard; names the row.
            PluginError: If an expert fails; names it.
        """
        if not rows:
            return []
        heard = [name for name in self.model.experts if targets and name not in self.unheard]
        rates = {self.model.experts[name].sample_rate for name in heard}
        backbone = self.model.backbone
        batch = load_batch(rows, backbone.preparer, rates, LONGEST_ASKED, train=False)
        out = backbone.forward(batch.inputs)
        found = self._sounds(batch, out, heard)
        by_row: list[list[Heard]] = [[] for _ in rows]
        for sound, row in zip(found, batch.inputs.audio_row.tolist(), strict=True):
            by_row[row].append(sound)
        last = [None] * len(rows) if out.last is None else list(out.last.float().cpu())
        return [Thought(row.id, tuple(s), state) for row, s, state in zip(rows, by_row, last, strict=True)]

    def _sounds(self, batch: Batch, out: Output, heard: Sequence[str]) -> list[Heard]:
        lengths, rate = batch.inputs.think_lengths, self.model.backbone.preparer.thinking_rate
        if out.thinking is None or out.audio is None:
            return [Heard(rate, torch.zeros(0, self.model.backbone.hidden_size)) for _ in lengths]
        device = out.thinking.device
        mask, states = batch.inputs.think_mask.to(device), out.thinking.float()
        predicted = {name: self.model.predict(name, states, mask) for name in self.model.heads}
        target = {name: self.model.target(name, batch, out.audio, lengths.to(device)) for name in heard}
        read = {name: self._read(name, features, mask) for name, features in predicted.items()}
        right = {name: self._read(name, features, mask) for name, features in target.items()}

        def cut(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
            return {name: tensor[i, : int(lengths[i])].cpu() for name, tensor in tensors.items()}

        def chosen(readouts: dict[str, Readout | None], i: int) -> dict[str, Readout]:
            return {name: one.of(i, int(lengths[i])) for name, one in readouts.items() if one is not None}

        return [
            Heard(rate, states[i, : int(n)].cpu(), cut(predicted, i), cut(target, i), chosen(read, i), chosen(right, i))
            for i, n in enumerate(lengths)
        ]

    def _read(self, name: str, features: Tensor, mask: Tensor) -> Readout | None:
        return None if name in self.unheard else self.model.experts[name].readout(features, mask)
