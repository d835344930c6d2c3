"""The batch plan: which rows each step trains on, as a pure function of costs, seed and step.

Because nothing is drawn as training goes, a run resumes exactly from a step number, and the number of workers or
devices changes no row's place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coatkit.spec import BatchSpec

_POOL = 64
"""Batches' worth of shuffled rows that are sorted by length together: more pads less, fewer mixes more."""


@dataclass
class BatchPlan:
    """Batches of rows for every step, epoch after epoch.

    Args:
        costs: [R] tokens each row costs.
        batch: Rows or tokens per step.
        seed: Anything that should change the order (spec seed and stage).
    """

    costs: NDArray[np.int64]
    batch: BatchSpec
    seed: tuple[int, ...]
    _epochs: list[list[NDArray[np.int64]]] = field(default_factory=list, repr=False)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Indices of the rows of step `step` (from 0), longest last."""
        epoch = 0
        while True:
            if epoch == len(self._epochs):
                self._epochs.append(self._plan(epoch))
            if step < len(self._epochs[epoch]):
                return self._epochs[epoch][step]
            step -= len(self._epochs[epoch])
            epoch += 1

    def epoch_of(self, step: int) -> float:
        """Passes over the rows completed before `step`, as a fraction."""
        self.rows(step)
        for epoch, batches in enumerate(self._epochs):
            if step < len(batches):
                return epoch + step / len(batches)
            step -= len(batches)
        raise AssertionError("rows() plans the epoch of the step")

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        random = np.random.default_rng([*self.seed, epoch])
        order = random.permutation(len(self.costs))
        if self.batch.rows is not None:
            # Fixed batches keep the shuffled order: a batch of like lengths would be a batch of like tasks.
            size = min(self.batch.rows, len(order))
            cut = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
            return [rows[np.argsort(self.costs[rows], kind="stable")] for rows in cut]
        budget = int(self.batch.tokens or 1)
        pool = max(1, int(_POOL * budget / max(1.0, float(self.costs.mean()))))
        batches: list[NDArray[np.int64]] = []
        for at in range(0, len(order), pool):
            rows = order[at : at + pool]
            rows = rows[np.argsort(self.costs[rows], kind="stable")]
            start = 0
            for i in range(1, len(rows) + 1):
                # Sorted by cost, so the last row is the longest and every row is padded to it.
                if i == len(rows) or (i - start + 1) * self.costs[rows[i]] > budget:
                    batches.append(rows[start:i])
                    start = i
        return [batches[i] for i in random.permutation(len(batches))]


def split(rows: NDArray[np.int64], rank: int, world: int, accumulate: int) -> list[NDArray[np.int64]]:
    """One device's share of a step, in the parts it works through; sorted rows keep like lengths together.

    Every device gets the same number of parts, some possibly empty.
    """
    mine = rows[rank::world]
    return [np.asarray(part) for part in np.array_split(mine, accumulate)]
