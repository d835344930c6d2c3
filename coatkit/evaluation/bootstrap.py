"""How sure a score is, and whether two runs differ: rows are drawn again with replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coatkit.evaluation.metrics import Array, Scored
from coatkit.evaluation.text import library

DRAWS = 5_000
_CELLS = 4_000_000
"""Most counts held at once."""


def resampled(counts: Array, draws: int, seed: int) -> Array:
    """[draws, k] sums of counts [R, k], each over R rows drawn with replacement."""
    rows = len(counts)
    random, share = np.random.default_rng(seed), np.full(rows, 1 / rows)
    step = max(1, _CELLS // rows)
    parts = [random.multinomial(rows, share, min(step, draws - at)) @ counts for at in range(0, draws, step)]
    return np.concatenate(parts)


def interval(scored: Scored, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a score in percent; NaN without a row that counts."""
    if not scored.kept.any():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(scored.score(resampled(scored.counts[scored.kept], draws, seed)), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Two runs on the same rows.

    Attributes:
        first: Score of the first, in percent.
        second: Score of the second, in percent.
        difference: Second less first, in points.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p: Two-sided p-value of the paired bootstrap: how often the difference is not on its side of 0, twice.
        p_mcnemar: Two-sided p-value of McNemar's exact test, where rows are right or wrong.
        first_only: Rows that the first alone has right, where rows are right or wrong.
        second_only: Rows that the second alone has right.
        rows: Rows that count in both.
        left_out: Rows that a judge did not rate in both.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    p_mcnemar: float | None
    first_only: int | None
    second_only: int | None
    rows: int
    left_out: int = 0


def paired(first: Scored, second: Scored, draws: int = DRAWS, seed: int = 0) -> Paired:
    """Compare scores of the same rows: every draw takes the same rows for both.

    Raises:
        ValueError: If they do not have the same rows.
    """
    if len(first.rows) != len(second.rows) or (first.kept != second.kept).any():
        raise ValueError("the scores are not of the same rows")
    kept: NDArray[np.bool_] = first.kept
    rows = int(kept.sum())
    one, two = first.value, second.value
    if not rows:
        nan = float("nan")
        return Paired(one, two, nan, nan, nan, nan, None, None, None, 0)
    width = first.counts.shape[1]
    sums = resampled(np.concatenate([first.counts, second.counts], 1)[kept], draws, seed)
    differences = second.score(sums[:, width:]) - first.score(sums[:, :width])
    differences = differences[np.isfinite(differences)]
    low, high = np.percentile(differences, [2.5, 97.5])
    p_mcnemar = only_one = only_two = None
    if first.right_or_wrong and second.right_or_wrong:
        a, b = first.rows[kept] > 50, second.rows[kept] > 50
        only_one, only_two = int((a & ~b).sum()), int((b & ~a).sum())
        test = library("scipy.stats").binomtest
        p_mcnemar = float(test(only_one, only_one + only_two, 0.5).pvalue) if only_one + only_two else 1.0
    p = two_sided(differences)
    return Paired(one, two, two - one, float(low), float(high), p, p_mcnemar, only_one, only_two, rows)


def two_sided(differences: Array) -> float:
    """Two-sided p-value of drawn differences, all finite: how often they are not on their side of 0, twice."""
    # One more than were seen: a p-value of 0 would claim more than so many draws can show.
    tails = [(np.count_nonzero(side) + 1) / (len(differences) + 1) for side in (differences <= 0, differences >= 0)]
    return float(min(1.0, 2 * min(tails)))


def over_seeds(runs: Sequence[Scored], draws: int = DRAWS, seed: int = 0) -> Array:
    """[draws] scores in percent, each the mean over runs drawn with replacement, on rows drawn with replacement.

    Seeds and rows are both drawn, since another training and other rows would give another score. A draw takes the same
    rows for all runs, as they all answer the same. Two arms with the same seeds and rows get the same draws, so that
    subtracting one result of this function from another pairs them by seed and by row.

    Of n runs n - 1 are drawn: the mean of n draws would spread by (n - 1) / n of the true variance, a third too little
    for three seeds.

    Args:
        runs: Scores of one arm's runs, one for each seed, of the same rows.

    Raises:
        ValueError: If they do not have the same rows.
    """
    kept = runs[0].kept
    if any(len(run.kept) != len(kept) or (run.kept != kept).any() for run in runs):
        raise ValueError("the scores are not of the same rows")
    if not kept.any():
        return np.full(draws, np.nan)
    counts = np.concatenate([run.counts for run in runs], 1)[kept]
    sums = resampled(counts, draws, seed).reshape(draws, len(runs), -1)
    scores = np.stack([run.score(sums[:, i]) for i, run in enumerate(runs)], 1)
    size, many = len(runs), max(1, len(runs) - 1)
    taken = np.random.default_rng((seed, size)).multinomial(many, np.full(size, 1 / size), draws)
    mean: Array = np.where(taken > 0, scores * taken, 0.0).sum(1) / many
    return mean


def over_seeds_t(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's t-test that differences, one for each seed, have mean 0; None where all are alike.

    The rows are taken as they are: this asks whether other trainings would differ on these rows.
    """
    if len(differences) < 2 or np.ptp(differences) < 1e-9:  # all the same, but for rounding
        return None
    return float(library("scipy.stats").ttest_1samp(differences, 0.0).pvalue)
