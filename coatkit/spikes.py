"""Loss spikes: steps whose loss stands far above those shortly before, by a rule that outliers do not move."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

WINDOW, FEWEST = 64, 16
"""Steps looked back on, and how many of a stage there must be before any is judged."""
FACTOR, LEAST = 10.0, 0.5
"""A spike is over the median by `FACTOR` median absolute deviations and by this part of the median."""


class Spikes:
    """Judges one loss after the other; a new stage, whose loss has other terms, begins anew."""

    def __init__(self) -> None:
        self._stage = ""
        self._kept: deque[float] = deque(maxlen=WINDOW)

    def seen(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up lines of metrics.jsonl, so that a run that goes on judges as one that was not cut short."""
        for line in lines:
            if isinstance(line.get("loss"), float):
                self.look(str(line.get("stage")), line["loss"])

    def look(self, stage: str, loss: float) -> float | None:
        """Take a step's loss; the median of those before when it is a spike, else None. NaN and Inf are not taken."""
        if stage != self._stage:
            self._stage, self._kept = stage, deque(maxlen=WINDOW)
        if not math.isfinite(loss):
            return None
        found = None
        if len(self._kept) >= FEWEST:
            middle = median(self._kept)
            spread = median(abs(one - middle) for one in self._kept)
            if loss - middle > max(FACTOR * spread, LEAST * abs(middle)):
                found = middle
        self._kept.append(loss)
        return found
