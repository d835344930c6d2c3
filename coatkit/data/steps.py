"""A dataset whose items are whole training steps: rows read, resampled and prepared for the backbone.

Item `i` is this device's share of step `i`, so a DataLoader over a range of step numbers is the training order, and any
number of workers gives the same items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from coatkit.data import audio as sound
from coatkit.data.batches import BatchPlan, split
from coatkit.data.rows import AudioRef, Row, Rows
from coatkit.errors import DataError
from coatkit.protocols import AudioBatch, Inputs, Preparer
from coatkit.spec_data import DataSpec

_ROW_OVERHEAD = 24
"""Tokens of chat markup per row, about; the plan needs a cost, not a count."""


@dataclass
class Batch:
    """Rows prepared for one forward pass.

    Attributes:
        inputs: What the backbone takes.
        audio: The same sounds at every sample rate (Hz) an expert asked for; empty when no row has sound.
    """

    inputs: Inputs
    audio: dict[int, AudioBatch]


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


@dataclass
class Scan:
    """What a look at every row found: costs in tokens, seconds of sound, and the rows that cannot be used."""

    costs: NDArray[np.int64]
    seconds: NDArray[np.float64]
    bad: list[tuple[int, str]]

    @property
    def good(self) -> NDArray[np.int64]:
        """Indices of the usable rows."""
        keep = np.ones(len(self.costs), bool)
        keep[[i for i, _ in self.bad]] = False
        return np.flatnonzero(keep)


def scan(rows: Rows, preparer: Preparer, data: DataSpec, thinking: float) -> Scan:
    """Check every row and its sounds' headers, and estimate its cost (2 x audio tokens + text).

    Args:
        thinking: Thinking positions per audio token; 0 when thinking is off.

    Raises:
        DataError: With `on_bad_row: refuse`, listing the first bad rows; with `quarantine`, when there are too many.
    """
    costs, seconds, bad = np.ones(len(rows), np.int64), np.zeros(len(rows)), []
    for i in range(len(rows)):
        try:
            row: Row = rows[i]
            if row.messages[-1].role != "assistant":
                raise row.fail("the last message must be the assistant's answer")
            tokens = sum(len(m.content.encode()) for m in row.messages) // 4 + _ROW_OVERHEAD
            for ref in row.audios:
                length = _duration(row, ref)
                _check_length(row, ref.path, length, data, preparer)
                heard = preparer.audio_tokens(round(length * preparer.sample_rate))
                tokens += round(heard * (1 + thinking))
                seconds[i] += length
            costs[i] = tokens
        except DataError as error:
            bad.append((i, str(error)))
    _judge(bad, data, rows.path)
    if len(bad) == len(rows):
        raise DataError(f"{rows.path}: every row is bad, first: {bad[0][1]}")
    return Scan(costs, seconds, bad)


def _duration(row: Row, ref: AudioRef) -> float:
    try:
        return sound.duration(ref)
    except DataError as error:
        raise row.fail(str(error)) from None


def _check_length(row: Row, path: Path, seconds: float, data: DataSpec, preparer: Preparer) -> None:
    if seconds > data.max_seconds:
        raise row.fail(f"{path}: {seconds:.1f} s is over data.max_seconds ({data.max_seconds:g} s)")
    if reason := preparer.cannot_hear(seconds):
        raise row.fail(f"{path}: {reason}")


def _judge(bad: Sequence[tuple[int, str]], data: DataSpec, path: Path) -> None:
    if not bad:
        return
    shown = "\n".join(f"  {reason}" for _, reason in bad[:10])
    more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
    if data.on_bad_row == "refuse":
        raise DataError(
            f"{path}: {len(bad)} bad row(s):\n{shown}{more}\n"
            "  Repair or remove them, or set data.on_bad_row: quarantine to train without them."
        )
    if len(bad) > data.max_bad_rows:
        raise DataError(
            f"{path}: {len(bad)} bad rows are more than data.max_bad_rows: {data.max_bad_rows}:\n{shown}{more}"
        )


def load_batch(rows: Sequence[Row], preparer: Preparer, rates: Iterable[int], max_seconds: float, train: bool) -> Batch:
    """Read the rows' sounds once, resample once per rate, and prepare the backbone's inputs.

    Raises:
        DataError: Naming the row and file.
    """
    wanted = {preparer.sample_rate, *rates}
    waves: dict[int, list[sound.Samples]] = {rate: [] for rate in wanted}
    for row in rows:
        for ref in row.audios:
            try:
                samples, rate = sound.read(ref, max_seconds)
            except DataError as error:
                raise row.fail(str(error)) from None
            for to in wanted:
                waves[to].append(sound.resample(samples, rate, to))
    audio = {rate: AudioBatch.from_arrays(found, rate) for rate, found in waves.items() if found}
    inputs = preparer.prepare(rows, audio.get(preparer.sample_rate), train=train)
    return Batch(inputs, audio)


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
    ) -> None:
        self.rows, self.good, self.plan, self.preparer = rows, good, plan, preparer
        self.rates, self.data, self.rank, self.world = frozenset(rates), data, rank, world

    def __getitem__(self, step: int) -> Step:
        out = Step()
        for part in split(self.plan.rows(step), self.rank, self.world, self.plan.batch.accumulate):
            rows: list[Row] = [self.rows[int(self.good[i])] for i in part]
            try:
                batch = self._load(rows, out)
            except DataError as error:
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
            return load_batch(rows, self.preparer, self.rates, self.data.max_seconds, train=True)
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
        return load_batch(kept, self.preparer, self.rates, self.data.max_seconds, train=True) if kept else None
