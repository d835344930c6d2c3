"""Linear probes: can a label be read off a model's states, and does what a probe is sure of foretell right answers?

Each probe is a logistic regression on standardised states, fitted and asked in grouped cross-validation: rows of one
group (a speaker, a track, a sound) are never on both sides. All that is reported is out of fold. How strongly the
regression is held back (C) changes the correlations a good deal, so it is always stated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatkit.errors import DataError
from coatkit.evaluation.bootstrap import resampled
from coatkit.evaluation.text import library

Array = NDArray[Any]
DRAWS = 1_000
SHUFFLES = 5
"""Probes on shuffled labels: what can be read where there is nothing to read."""


@dataclass(frozen=True)
class Settings:
    """How probes are fitted.

    Attributes:
        c: Inverse strength of the regression's penalty.
        folds: Parts of the cross-validation.
        seed: Of folds, shuffles and bootstrap.
    """

    c: float = 1.0
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class OutOfFold:
    """What probes say of rows they were not fitted on.

    Attributes:
        right: [N] whether the most probable class is the row's.
        sure: [N] probability of the most probable class.
        of_true: [N] probability of the row's own class.
    """

    right: Array
    sure: Array
    of_true: Array


def check(labels: Sequence[str], groups: Sequence[str], folds: int, task: str) -> None:
    """Check that every class can be in every fold.

    Raises:
        DataError: If there is one class only, or one that too few groups have; names it and the remedy.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        owners[label].add(group)
    if len(owners) < 2:
        raise DataError(f"task {task!r}: a probe needs two classes, and all {len(labels)} rows are {labels[0]!r:.60}")
    rarest = min(owners, key=lambda label: len(owners[label]))
    if len(owners[rarest]) < folds:
        have = len(owners[rarest])
        remedy = f"use --folds {have}, or give more rows" if have > 1 else "give more rows, or leave these out"
        raise DataError(
            f"task {task!r}: class {rarest!r:.60} is in {have} group(s) (of rows that must stay together), and"
            f" {folds} folds need {folds}; {remedy}"
        )


def probe(states: Array, labels: Sequence[str], groups: Sequence[str], settings: Settings) -> OutOfFold:
    """Fit and ask probes, fold by fold.

    Args:
        states: [N, d] float.
        labels: [N] classes.
        groups: [N] what must stay on one side.
    """
    linear = library("sklearn.linear_model")
    scale = library("sklearn.preprocessing").StandardScaler
    pipeline = library("sklearn.pipeline").make_pipeline
    split = library("sklearn.model_selection").StratifiedGroupKFold(
        settings.folds, shuffle=True, random_state=settings.seed
    )
    classes, numbers = np.unique(np.asarray(labels), return_inverse=True)
    probabilities = np.zeros((len(states), len(classes)))
    for train, test in split.split(states, numbers, np.asarray(groups)):
        if len(alone := np.unique(numbers[train])) == 1:  # nothing to tell apart, as shuffled labels may have it
            probabilities[np.ix_(test, alone)] = 1.0
            continue
        fitted = pipeline(scale(), linear.LogisticRegression(C=settings.c, max_iter=2_000))
        fitted.fit(states[train], numbers[train])
        # A class that the other folds lack has no column: it is held impossible.
        probabilities[np.ix_(test, fitted.classes_)] = fitted.predict_proba(states[test])
    return OutOfFold(
        probabilities.argmax(1) == numbers,
        probabilities.max(1),
        probabilities[np.arange(len(numbers)), numbers],
    )


def accuracy(found: OutOfFold, groups: Sequence[str], seed: int) -> dict[str, float]:
    """Accuracy in percent and its 95 % interval, groups drawn again with replacement."""
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.stack([np.bincount(of, found.right), np.bincount(of)], 1).astype(float)
    sums = resampled(counts, DRAWS, seed)
    low, high = np.percentile(100 * sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return {"accuracy": 100 * float(found.right.mean()), "low": float(low), "high": float(high)}


def shuffled(states: Array, labels: Sequence[str], groups: Sequence[str], settings: Settings) -> dict[str, float]:
    """Mean and highest accuracy in percent of probes on labels that were exchanged: between groups where each group has
    one label, as a speaker has, and between rows otherwise."""
    random = np.random.default_rng(settings.seed)
    scores = []
    for _ in range(SHUFFLES):
        mixed = exchanged(labels, groups, random)
        scores.append(100 * float(probe(states, mixed, groups, settings).right.mean()))
    return {"mean": float(np.mean(scores)), "highest": float(np.max(scores))}


def exchanged(labels: Sequence[str], groups: Sequence[str], random: np.random.Generator) -> list[str]:
    """Labels in another order, [N]; what is alike within a group stays alike, or the control would be too easy."""
    of_group = dict(zip(groups, labels, strict=True))
    if all(of_group[group] == label for group, label in zip(groups, labels, strict=True)):
        values = list(of_group.values())
        of_group = {group: values[i] for group, i in zip(of_group, random.permutation(len(values)), strict=True)}
        return [of_group[group] for group in groups]
    return [labels[i] for i in random.permutation(len(labels))]


def rank_correlation(
    confidence: Array, correct: Array, groups: Sequence[str], seed: int
) -> dict[str, float | None] | None:
    """Spearman's rho between a probe's confidence and whether the model's own answer was right, with its 95 % interval.

    Returns:
        None where all answers are right, or all wrong: there is nothing to foretell. No interval (None) where fewer
        than five groups hold right answers, or wrong ones: few rows then make rho, and it would exclude 0 on noise.
    """
    spearman: Callable[..., Any] = library("scipy.stats").spearmanr
    if np.ptp(correct) == 0 or np.ptp(confidence) == 0:
        return None
    rho = float(spearman(confidence, correct).statistic)
    holding = [len({group for group, one in zip(groups, correct, strict=True) if one == kind}) for kind in (0, 1)]
    if min(holding) < 5:
        return {"rho": rho, "low": None, "high": None}
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    sets = [np.asarray(rows) for rows in members.values()]
    random, drawn = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        rows = np.concatenate([sets[i] for i in random.integers(0, len(sets), len(sets))])
        if np.ptp(correct[rows]) > 0 and np.ptp(confidence[rows]) > 0:
            drawn.append(float(spearman(confidence[rows], correct[rows]).statistic))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"rho": rho, "low": float(low), "high": float(high)}
