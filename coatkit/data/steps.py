"""A dataset whose items are whole training steps: rows read, resampled and prepared for the backbone.

Item `i` is this device's share of step `i`, so a DataLoader over a range of step numbers is the training order, and any
number of workers gives the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from coatkit.data import audio as sound
from coatkit.data.batches import BatchPlan, split
from coatkit.data.rows import Row, Rows, learning
from coatkit.errors import DataError, RunError
from coatkit.packing import packed
from coatkit.protocols import AudioBatch, Inputs, Preparer
from coatkit.spec_data import DataSpec
from coatkit.store import Store, sound_key


@dataclass
class Batch:
    """Rows prepared for one forward pass.

    Attributes:
        inputs: What the backbone takes.
        audio: The same sounds at every sample rate (Hz) an expert asked for; empty when no row has sound.
        stored: Aligned features [A, M, dim] of the experts that are read from the feature store.
    """

    inputs: Inputs
    audio: dict[int, AudioBatch]
    stored: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Step:
    """One device's share of an optimizer step, and the rows that had to be left out of it.

    Every device has the same number of batches; one that got no row, or no usable one, is None.
    `error` carries what is wrong out of a worker process, which could only raise it with a traceback.
    """

    batches: list[Batch | None] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    row_ids: list[str] = field(default_factory=list)
    error: str = ""
    epoch: float = 0.0
    """Passes over the rows done when this step is."""

    def pin_memory(self) -> Step:
        """The same in page-locked memory, from which a GPU copies while the host goes on; the loader calls it."""
        return cast(Step, each_tensor(self, Tensor.pin_memory))


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of dataclasses, lists and mappings with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: each_tensor(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, list):
        return [each_tensor(one, change) for one in value]
    if isinstance(value, dict):
        return {key: each_tensor(one, change) for key, one in value.items()}
    return value


def load_batch(
    rows: Sequence[Row],
    preparer: Preparer,
    rates: Iterable[int],
    max_seconds: float,
    train: bool,
    stores: Mapping[str, Store] | None = None,
) -> Batch:
    """Read the rows' sounds once, resample once per rate, and prepare the backbone's inputs.

    Args:
        stores: By expert, and `tower` for the audio tower: where features are read in place of being computed.

    Raises:
        DataError: Naming the row and file.
        RunError: If a sound is not in a store; names the command that puts it there.
    """
    wanted = {preparer.sample_rate, *rates}
    waves: dict[int, list[sound.Samples]] = {rate: [] for rate in wanted}
    kept: dict[str, list[Tensor]] = {name: [] for name in stores or {}}
    for row in rows:
        for ref in row.audios:
            try:
                samples, rate = sound.read(ref, max_seconds)
            except DataError as error:
                raise row.fail(str(error)) from None
            for to in wanted:
                waves[to].append(sound.resample(samples, rate, to))
            key = sound_key(samples, rate) if kept else ""
            for name, store in (stores or {}).items():
                frames = store.frames(key)
                if frames is None:
                    raise RunError(
                        f"{row.where} (row {row.id}): {ref} is not among the {len(store):,} sounds of {name!r} in the"
                        f" feature store ({store.folder}); add what is missing with: coatkit cache SPEC"
                    )
                kept[name].append(frames)
    audio = {rate: AudioBatch.from_arrays(found, rate) for rate, found in waves.items() if found}
    inputs = preparer.prepare(rows, audio.get(preparer.sample_rate), train=train)
    stored = {name: _padded(name, found, inputs) for name, found in kept.items() if found}
    inputs.tower = stored.pop("tower", None)
    return Batch(inputs, audio, stored)


def _padded(name: str, found: Sequence[Tensor], inputs: Inputs) -> Tensor:
    """Frames of several sounds as [A, M, dim], each as long as the backbone heard it, zeros behind."""
    lengths = inputs.audio_lengths if name == "tower" else inputs.think_lengths
    if name != "tower" and not bool(lengths.any()):
        return torch.zeros(len(found), 0, found[0].shape[1])
    out = torch.zeros(len(found), int(lengths.max()), found[0].shape[1])
    for i, (frames, length) in enumerate(zip(found, lengths.tolist(), strict=True)):
        if len(frames) < length:
            raise RunError(f"the feature store holds {len(frames)} frames of {name!r} for a sound of {length}")
        out[i, :length] = frames[:length]
    return out


class StepDataset(Dataset[Step]):
    """Steps of one stage.

    Args:
        rows: The manifest.
        good: Indices of usable rows, which the plan counts over.
        plan: Batches over `good`.
        preparer: The backbone's preparer.
        rates: Sample rates (Hz) the active experts hear.
        data: Limits and what to do with bad rows.
        rank: This device.
        world: Number of devices.
        stores: See `load_batch`.
    """

    def __init__(
        self,
        rows: Rows,
        good: NDArray[np.int64],
        plan: BatchPlan,
        preparer: Preparer,
        rates: Iterable[int],
        data: DataSpec,
        rank: int,
        world: int,
        stores: Mapping[str, Store] | None = None,
    ) -> None:
        self.stores = dict(stores or {})
        self.rows, self.good, self.plan, self.preparer = rows, good, plan, preparer
        self.rates, self.data, self.rank, self.world = frozenset(rates), data, rank, world

    def __getitem__(self, step: int) -> Step:
        out = Step(epoch=self.plan.epoch_of(step + 1))
        for part in split(self.plan.rows(step), self.rank, self.world, self.plan.batch.accumulate):
            try:
                rows: list[Row] = [learning(self.rows[int(self.good[i])], self.data.learn) for i in part]
                batch = self._load(rows, out)
            except (DataError, RunError) as error:
                out.error = str(error)
                return out
            out.batches.append(batch)
            out.row_ids += batch.inputs.row_ids if batch is not None else []
        return out

    def _load(self, rows: list[Row], out: Step) -> Batch | None:
        """One batch; with `quarantine`, without the rows that turn out bad when they are decoded."""
        if not rows:
            return None
        try:
            return self._batch(rows)
        except DataError:
            if self.data.on_bad_row == "refuse":
                raise
        kept = []
        for row in rows:
            try:
                load_batch([row], self.preparer, (), self.data.max_seconds, train=True)
                kept.append(row)
            except DataError as error:
                out.bad.append(str(error))
        return self._batch(kept) if kept else None

    def _batch(self, rows: list[Row]) -> Batch:
        batch = load_batch(rows, self.preparer, self.rates, self.data.max_seconds, train=True, stores=self.stores)
        if self.plan.batch.pack:
            batch.inputs = packed(batch.inputs)
        return batch
