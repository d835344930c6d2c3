"""How many rows each category and each source of a mixture gives: whole numbers, exact arithmetic, no file is read.

Shares are read as the decimals they were written in (0.1 is a tenth): no rounding of binary numbers moves a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def exact(number: float) -> Fraction:
    """A share or limit as the decimal it was written in."""
    return Fraction(repr(number))


def share_out(total: int, weights: Sequence[Fraction | int]) -> list[int]:
    """`total` shared by weight, by largest remainder; of equal remainders the earlier gets the row.

    Args:
        weights: None negative; where all are 0, nobody gets anything.
    """
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    quotas = [Fraction(total) * weight / whole for weight in weights]
    found = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: found[i] - quotas[i])  # stable: ties stay in order
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found


def capped(total: int, weights: Sequence[Fraction | int], caps: Sequence[int | None], *, spill: bool) -> list[int]:
    """`total` shared by weight, none above its cap.

    Args:
        caps: Most rows of each; None for any number.
        spill: What a cap leaves over goes to the others by their weights; it is left out otherwise.

    Returns:
        Rows of each. Their sum is less than `total` where all are at their caps, or where nothing is to spill.
    """
    if not spill:
        wanted = share_out(total, weights)
        return [rows if cap is None else min(rows, cap) for rows, cap in zip(wanted, caps, strict=True)]
    found = [0] * len(weights)
    open_ = list(range(len(weights)))
    rest = total
    while open_:
        whole = sum(weights[i] for i in open_)
        # A quota below a whole cap stays within it when it is rounded up.
        full = {i for i in open_ if (cap := caps[i]) is not None and Fraction(rest) * weights[i] / whole >= cap}
        if not full:
            break
        for i in full:
            found[i] = caps[i] or 0
        rest -= sum(found[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    for i, rows in zip(open_, share_out(rest, [weights[i] for i in open_]), strict=True):
        found[i] = rows
    return found


def cap_of(pool: int, max_epochs: float | None) -> int | None:
    """Most rows that may be drawn from a pool: its size times `max_epochs`, rounded down."""
    return None if max_epochs is None else math.floor(exact(max_epochs) * pool)


def by_pool(total: int, pools: Sequence[int]) -> list[int]:
    """Rows of each source when every pooled row is to come as often: whole passes, and the rest by size of pool.

    The rest is less than a pass, so no source is asked for more of it than it has: every row comes k or k + 1 times,
    with one k for all sources.
    """
    passes, rest = divmod(total, sum(pools))
    return [passes * pool + more for pool, more in zip(pools, share_out(rest, pools), strict=True)]
