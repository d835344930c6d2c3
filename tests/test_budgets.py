"""How many rows each part of a mixture gives: against a slow reference, and what must hold of any numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatkit.data.budgets import by_pool, cap_of, capped, exact, share_out

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=7)
TOTALS = st.integers(0, 400)


def reference_share_out(total: int, weights: list[int]) -> list[int]:
    """Largest remainder, one row at a time: whole parts first, then each row to the largest rest still waiting."""
    found = [total * weight // sum(weights) for weight in weights]
    waiting = [(total * weight % sum(weights), -i) for i, weight in enumerate(weights)]
    while sum(found) < total:
        _, i = max(waiting)
        waiting.remove((_, i))
        found[-i] += 1
    return found


def reference_capped(total: int, weights: list[int], caps: list[int | None]) -> list[int]:
    """Caps one at a time: share out, hold whoever is furthest over its cap, share the rest again among the others."""
    held: dict[int, int] = {}
    while True:
        free = [i for i in range(len(weights)) if i not in held]
        if not free:
            return [held[i] for i in range(len(weights))]
        rest, whole = total - sum(held.values()), sum(weights[i] for i in free)
        over = {i: Fraction(rest * weights[i], whole) - cap for i in free if (cap := caps[i]) is not None}
        worst = max(over, key=lambda i: over[i] / weights[i], default=None)
        if worst is None or over[worst] < 0:
            shared = dict(zip(free, reference_share_out(rest, [weights[i] for i in free]), strict=True))
            return [held.get(i, shared.get(i, 0)) for i in range(len(weights))]
        held[worst] = caps[worst] or 0


@given(TOTALS, WEIGHTS)
def test_shares_by_largest_remainder(total: int, weights: list[int]) -> None:
    found = share_out(total, weights)
    assert found == reference_share_out(total, weights)
    assert sum(found) == total
    for rows, weight in zip(found, weights, strict=True):
        assert abs(rows - Fraction(total * weight, sum(weights))) < 1
    for rows, weight in zip(found, weights, strict=True):
        assert all(rows >= other for other, w in zip(found, weights, strict=True) if weight > w)


def test_ties_go_to_the_earlier() -> None:
    assert share_out(10, [1, 1, 1]) == [4, 3, 3]
    assert share_out(2, [1, 1, 1, 1]) == [1, 1, 0, 0]


def test_shares_are_the_decimals_they_were_written_in() -> None:
    # 1.5, 1 and 0.5 rows: a tie, which the binary number a little under 0.3 would lose.
    assert share_out(3, [exact(0.3), exact(0.2), exact(0.1)]) == [2, 1, 0]
    assert share_out(3, [Fraction(0.3), Fraction(0.2), Fraction(0.1)]) == [1, 1, 1]
    assert cap_of(100, 4.35) == 435  # 4.35 * 100 is 434.99999999999994
    assert cap_of(10, 1e-05) == 0
    assert cap_of(10, None) is None


# Small, so that quotas often lie at a cap or within a row of it.
CASES = st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, 12)), min_size=1, max_size=5)
FEW = st.integers(0, 40)


@settings(max_examples=400)
@given(FEW, CASES)
def test_caps_hold_and_what_they_leave_goes_to_the_others(total: int, cases: list[tuple[int, int | None]]) -> None:
    weights, caps = [w for w, _ in cases], [c for _, c in cases]
    found = capped(total, weights, caps, spill=True)
    assert found == reference_capped(total, weights, caps)
    assert all(cap is None or rows <= cap for rows, cap in zip(found, caps, strict=True))
    room = total if None in caps else sum(cap or 0 for cap in caps)
    assert sum(found) == min(total, room)  # nothing is lost while there is room
    # Who is not held at its cap has as much for its weight as any other, to a row.
    for i, (rows, cap) in enumerate(zip(found, caps, strict=True)):
        for other, weight in zip(found, weights, strict=True):
            if cap is None or rows < cap:
                assert (rows + 1) * weight > (other - 1) * weights[i]


@given(FEW, CASES)
def test_without_spilling_a_cap_only_takes_away(total: int, cases: list[tuple[int, int | None]]) -> None:
    weights, caps = [w for w, _ in cases], [c for _, c in cases]
    found = capped(total, weights, caps, spill=False)
    wanted = reference_share_out(total, weights)
    assert found == [rows if cap is None else min(rows, cap) for rows, cap in zip(wanted, caps, strict=True)]


@settings(max_examples=400)
@given(FEW, CASES, st.integers(0, 6), st.integers(1, 9))
def test_a_wider_cap_never_gives_fewer_rows(
    total: int, cases: list[tuple[int, int | None]], which: int, more: int
) -> None:
    weights, caps = [w for w, _ in cases], [c for _, c in cases]
    which %= len(cases)
    wider = [None if cap is None else cap + more * (i == which) for i, cap in enumerate(caps)]
    before, after = capped(total, weights, caps, spill=True), capped(total, weights, wider, spill=True)
    assert after[which] >= before[which]
    assert sum(after) >= sum(before)


@given(TOTALS, st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_by_pool_every_row_comes_as_often_to_one(total: int, pools: list[int]) -> None:
    found = by_pool(total, pools)
    assert sum(found) == total
    passes = total // sum(pools)
    assert all(passes * pool <= rows <= (passes + 1) * pool for rows, pool in zip(found, pools, strict=True))
    for rows, pool in zip(found, pools, strict=True):
        assert abs(rows - Fraction(total * pool, sum(pools))) < 1


def test_nothing_to_share_by() -> None:
    assert share_out(0, [1, 2]) == [0, 0]
    assert capped(9, [1, 1], [0, 0], spill=True) == [0, 0]
    with pytest.raises(ZeroDivisionError):  # a pool is refused when it is empty, before it is drawn from
        by_pool(1, [0])
