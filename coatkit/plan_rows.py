"""What planning needs to know of rows: their shapes, and how a stage's batches would put them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coatkit.data import audio as sound
from coatkit.data.batches import BatchPlan, split
from coatkit.data.filters import passes
from coatkit.data.rows import Rows
from coatkit.errors import DataError
from coatkit.spec import BatchSpec
from coatkit.spec_data import FilterSpec

_SAMPLE = 2000
"""Rows looked at, at least; the mean of so many is within a few percent."""
_STEPS = 500
"""Steps laid out, at most."""


@dataclass(frozen=True)
class RowShape:
    """One row, in what it costs.

    Attributes:
        seconds: Seconds of each sound.
        text: Tokens of text, the answer's among them.
        answer: Tokens of the answer.
        sounds: What each sound is, where that is known: rows that share a sound share its features.
    """

    seconds: tuple[float, ...]
    text: float
    answer: float
    sounds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """How long a row and its sounds become in a model.

    Attributes:
        rate: Audio tokens per second, Hz.
        ratio: Thinking positions per audio token; 0 when thinking is off.
    """

    rate: float
    ratio: float

    def tokens(self, row: RowShape) -> float:
        """Tokens of a row: text, audio and, for each sound, the block with its two ends."""
        ends = 2 * len(row.seconds) if self.ratio else 0
        return row.text + self.rate * (1 + self.ratio) * sum(row.seconds) + ends

    def thinking(self, seconds: float) -> float:
        """Thinking positions of a sound."""
        return self.rate * self.ratio * seconds


@dataclass(frozen=True)
class StageRows:
    """The rows a stage draws from.

    Attributes:
        shapes: Rows looked at, spread evenly over all of them.
        count: Rows there are.
    """

    shapes: Sequence[RowShape]
    count: int

    @property
    def scale(self) -> float:
        """Rows that each one looked at stands for."""
        return self.count / len(self.shapes)

    @property
    def seconds(self) -> float:
        """Seconds of sound in all rows."""
        return self.scale * sum(sum(shape.seconds) for shape in self.shapes)

    @cached_property
    def sounds(self) -> dict[str, float]:
        """Seconds of every different sound of the rows looked at; a sound without a name is one of its own."""
        found: dict[str, float] = {}
        for i, shape in enumerate(self.shapes):
            names = shape.sounds or [f"{id(self)}.{i}.{k}" for k in range(len(shape.seconds))]
            found |= dict(zip(names, shape.seconds, strict=True))
        return found


def different_seconds(sources: Sequence[StageRows]) -> float:
    """Seconds of the different sounds in some rows; where not every row was looked at, of as many as there can be."""
    whole: dict[str, float] = {}
    rest = 0.0
    for rows in sources:
        if rows.scale == 1:
            whole |= rows.sounds
        else:
            rest += rows.scale * sum(rows.sounds.values())
    return sum(whole.values()) + rest


def look_at(rows: Rows, max_seconds: float, keep: FilterSpec | None = None) -> StageRows:
    """Shapes of rows spread evenly over a manifest; rows that training would not take are passed over.

    Args:
        max_seconds: The longest sound that is taken, seconds.
        keep: The source's filter.

    Raises:
        DataError: If no row can be used; says why the first cannot.
    """
    shapes: list[RowShape] = []
    looked, problem = 0, ""
    for i in range(0, len(rows), max(1, len(rows) // _SAMPLE)):
        looked += 1
        try:
            row = rows[i]
            seconds = tuple(sound.duration(ref) for ref in row.audios)
            if any(s > max_seconds for s in seconds):
                raise row.fail(f"{max(seconds):.1f} s is over data.max_seconds ({max_seconds:g} s)")
        except DataError as error:
            problem = problem or str(error)
            continue
        if keep is not None and not passes(row, sum(seconds), keep):
            problem = problem or f"{row.where}: the filter does not take it"
            continue
        text = sum(len(message.content.encode()) for message in row.messages) / 4 + 24
        answer = sum(len(message.content.encode()) for message in row.messages if message.role == "assistant") / 4 + 1
        names = tuple(f"{ref}@{ref.start}-{ref.end}" for ref in row.audios)
        shapes.append(RowShape(seconds, text, answer, names))
    if not shapes:
        raise DataError(f"{rows.path}: no row can be used, so there is nothing to plan; first: {problem}")
    return StageRows(shapes, round(len(rows) * len(shapes) / looked))


def described(row: RowShape, batch: BatchSpec, steps: int, lengths: Lengths) -> StageRows:
    """Rows that are only described: as many as a stage takes, so that it passes over them once."""
    each = batch.rows or max(1, int(batch.tokens or 1) // math.ceil(lengths.tokens(row)))
    return StageRows([row] * each, steps * each)


@dataclass(frozen=True)
class Part:
    """Rows that one device works through at once, padded to the longest.

    Attributes:
        rows: Their shapes.
        width: Tokens of the longest.
    """

    rows: Sequence[RowShape]
    width: float

    @property
    def positions(self) -> float:
        """Tokens with padding."""
        return len(self.rows) * self.width

    @property
    def seconds(self) -> list[float]:
        """Of every sound."""
        return [s for row in self.rows for s in row.seconds]

    @property
    def answers(self) -> float:
        """Tokens of all answers."""
        return sum(row.answer for row in self.rows)


@dataclass(frozen=True)
class Layout:
    """A stage's steps as training would cut them.

    Attributes:
        steps: For every step laid out, the parts of all devices.
        heaviest: The heaviest part that could come: the longest rows together.
    """

    steps: list[list[Part]]
    heaviest: Part

    @property
    def parts(self) -> list[Part]:
        """Of all steps."""
        return [part for step in self.steps for part in step]

    def mean(self, values: Sequence[float]) -> float:
        """Mean per step of a value of each part."""
        return sum(values) / len(self.steps)


def lay_out(rows: StageRows, batch: BatchSpec, seed: tuple[int, ...], devices: int, lengths: Lengths) -> Layout:
    """Cut a pass over the rows looked at into steps, by the same plan as training, and every step into parts."""
    costs = [lengths.tokens(shape) for shape in rows.shapes]
    plan = BatchPlan(np.array([round(cost) for cost in costs], np.int64), batch, seed)

    def part_of(indices: Sequence[int]) -> Part:
        return Part([rows.shapes[i] for i in indices], max(costs[i] for i in indices))

    steps: list[list[Part]] = []
    while len(steps) < _STEPS and plan.epoch_of(len(steps)) < 1:
        taken = plan.rows(len(steps))
        cuts = [cut for rank in range(devices) for cut in split(taken, rank, devices, batch.accumulate)]
        steps.append([part_of(cut.tolist()) for cut in cuts if len(cut)])
    longest = max(range(len(costs)), key=costs.__getitem__)
    together = batch.rows or max(1, int(batch.tokens or 1) // math.ceil(costs[longest]))
    together = min(together, rows.count)
    for ways in (devices, batch.accumulate):
        together = math.ceil(together / ways)
    return Layout(steps, part_of([longest] * together))
