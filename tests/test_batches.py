"""The batch plan: a pure function of costs, seed and step that uses every row and keeps its budgets."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coatkit.data.batches import BatchPlan, split
from coatkit.spec import BatchSpec

costs_of = st.lists(st.integers(1, 500), min_size=1, max_size=150).map(lambda c: np.array(c, np.int64))
seeds = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 9))


def lengths(count: int) -> NDArray[np.int64]:
    """Costs as uneven as clips are."""
    return np.random.default_rng(0).lognormal(5, 0.7, count).astype(np.int64) + 24


def epochs(plan: BatchPlan, count: int) -> list[list[NDArray[np.int64]]]:
    """The batches of the first epochs."""
    found: list[list[NDArray[np.int64]]] = []
    step = 0
    while True:
        epoch = int(plan.epoch_of(step))
        if epoch == count:
            return found
        if epoch == len(found):
            found.append([])
        found[epoch].append(plan.rows(step))
        step += 1


def padding(plan: BatchPlan, steps: int) -> float:
    """Share of the tokens that are padding."""
    batches = [plan.costs[plan.rows(step)] for step in range(steps)]
    return 1 - sum(int(c.sum()) for c in batches) / sum(int(c.max()) * c.size for c in batches)


@settings(max_examples=80, deadline=None)
@given(costs_of, st.integers(1, 3000), seeds)
def test_token_batches(costs: NDArray[np.int64], budget: int, seed: tuple[int, ...]) -> None:
    plan = BatchPlan(costs, BatchSpec(tokens=budget), seed)
    for epoch in epochs(plan, 2):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(costs.size))  # every row once
        for rows in epoch:
            padded = costs[rows].max() * rows.size
            assert padded <= budget or rows.size == 1
            assert (np.diff(costs[rows]) >= 0).all()  # longest last


@settings(max_examples=80, deadline=None)
@given(costs_of, st.integers(1, 40), seeds)
def test_fixed_batches(costs: NDArray[np.int64], size: int, seed: tuple[int, ...]) -> None:
    plan = BatchPlan(costs, BatchSpec(rows=size), seed)
    full = min(size, costs.size)
    for epoch in epochs(plan, 2):
        used = np.concatenate(epoch)
        assert {rows.size for rows in epoch} == {full}
        assert np.unique(used).size == used.size == costs.size // full * full  # no row twice; only a rest is left out
        for rows in epoch:
            assert (np.diff(costs[rows]) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(costs_of, st.booleans(), seeds, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_any_step_in_any_order_gives_the_same_rows(
    costs: NDArray[np.int64], fixed: bool, seed: tuple[int, ...], steps: list[int]
) -> None:
    batch = BatchSpec(rows=3) if fixed else BatchSpec(tokens=800)
    walked = BatchPlan(costs, batch, seed)
    in_order = [walked.rows(step).tolist() for step in range(61)]
    jumped = BatchPlan(costs, batch, seed)
    for step in steps:
        assert jumped.rows(step).tolist() == in_order[step]
        assert BatchPlan(costs, batch, seed).rows(step).tolist() == in_order[step]


@pytest.mark.parametrize("batch", [BatchSpec(rows=4), BatchSpec(tokens=1000)])
def test_seed_stage_and_epoch_each_change_the_order(batch: BatchSpec) -> None:
    costs = lengths(100)

    def first(seed: tuple[int, ...], epoch: int = 0) -> list[list[int]]:
        return [rows.tolist() for rows in epochs(BatchPlan(costs, batch, seed), 2)[epoch]]

    orders = [first((1, 0)), first((2, 0)), first((1, 1)), first((1, 0), epoch=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("batch", [BatchSpec(rows=4), BatchSpec(tokens=1000)])
def test_epochs_pass_evenly(batch: BatchSpec) -> None:
    plan = BatchPlan(lengths(100), batch, (0,))
    size = len(epochs(plan, 1)[0])
    passed = [plan.epoch_of(step) for step in range(2 * size)]
    assert passed[0] == 0
    assert passed[size] == 1
    assert passed[size // 2] == pytest.approx(0.5, abs=1 / size)
    assert (np.diff(passed) > 0).all()


def test_fixed_batches_mix_lengths_and_token_batches_pad_little() -> None:
    costs = lengths(20_000)
    fixed = padding(BatchPlan(costs, BatchSpec(rows=16), (0,)), 500)
    bucketed = padding(BatchPlan(costs, BatchSpec(tokens=16 * int(costs.mean())), (0,)), 500)
    assert fixed > 0.4  # what like lengths save
    assert bucketed < 0.05


def test_token_batches_come_in_mixed_order() -> None:
    # Shuffled after sorting: a run of ever longer batches would be a curriculum nobody asked for.
    plan = BatchPlan(lengths(2000), BatchSpec(tokens=4000), (0,))
    longest = np.array([plan.costs[rows].max() for rows in epochs(plan, 1)[0]])
    assert abs(np.corrcoef(np.arange(longest.size), longest)[0, 1]) < 0.3


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 70), st.integers(1, 5), st.integers(1, 5))
def test_ranks_and_parts_share_a_step_without_overlap(count: int, world: int, accumulate: int) -> None:
    rows = np.random.default_rng(0).permutation(count)
    shares = [split(rows, rank, world, accumulate) for rank in range(world)]
    assert {len(parts) for parts in shares} == {accumulate}  # none waits for another
    together = np.concatenate([part for parts in shares for part in parts])
    np.testing.assert_array_equal(np.sort(together), np.arange(count))
    for sizes in ([sum(p.size for p in parts) for parts in shares], *([p.size for p in parts] for parts in shares)):
        assert max(sizes) - min(sizes) <= 1


def test_parts_keep_like_lengths_together() -> None:
    costs = np.sort(lengths(64))
    parts = split(np.arange(64), 1, 2, 4)
    assert all(costs[a].max() <= costs[b].min() for a, b in pairwise(parts))
