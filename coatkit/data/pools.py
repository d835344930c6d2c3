"""What a mixture may draw from, how much of each it draws, and which rows those are."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coatkit.data.budgets import by_pool, cap_of, capped, exact, share_out
from coatkit.data.filters import Sieve, keys_of
from coatkit.data.readers import open_rows
from coatkit.data.rows import JsonlRows, Row, Rows
from coatkit.errors import DataError
from coatkit.spec_data import CategorySpec, MixtureSpec, SourceSpec

Indices = NDArray[np.int64]

OnBadRow = Literal["refuse", "quarantine"]

_SHOWN = 10
_KEYS_FROM = 1000
"""Rows that are looked at to say which keys there are."""


@dataclass
class File:
    """A file or folder that one or more sources name.

    Attributes:
        sha256: Digest of its rows, hex.
        bad: Why rows are bad, of those that were looked at.
    """

    rows: Rows
    sha256: str
    bad: list[str] = field(default_factory=list)

    @property
    def own(self) -> bool:
        """Whether it is coatkit's own JSONL, whose lines can be copied as they are."""
        return type(self.rows) is JsonlRows


@dataclass
class Pool:
    """The rows of a source that a category may draw.

    Attributes:
        file: Number of the file.
        taken: Indices of the rows its filters take; all when None.
        left_out: Rows its filters do not take.
        requested: Rows by the shares alone.
        actual: Rows within all caps.
    """

    category: str
    source: SourceSpec
    file: int
    size: int
    taken: Indices | None = None
    left_out: int = 0
    requested: int = 0
    actual: int = 0

    def draw(self, seed: int, number: int) -> Indices:
        """Indices of the rows drawn, every row k or k + 1 times; a change elsewhere in the mixture changes none.

        Args:
            number: This source's place in its category.
        """
        passes, rest = divmod(self.actual, self.size)
        some = permutation(self.size, seed, "draw", self.category, number)[:rest]
        places = np.concatenate([np.tile(np.arange(self.size), passes), np.sort(some)])
        return places if self.taken is None else self.taken[places]


def permutation(size: int, *key: str | int) -> Indices:
    """A shuffled range, by the key alone; numpy promises these bits in all versions, not those of its shuffles."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))
    return np.argsort(bits.random_raw(size), kind="stable")


def open_files(spec: MixtureSpec) -> tuple[list[File], list[int]]:
    """Every different file of a mixture, and for each source, in order, the number of its file.

    Raises:
        DataError: If one cannot be opened.
    """
    files: list[File] = []
    numbers: dict[str, int] = {}
    of_source = []
    for _, _, source in _sources(spec):
        key = source.model_dump_json(exclude={"filter"})
        if key not in numbers:
            rows = open_rows(Path(source.path), source.format, question=source.question, columns=source.columns)
            numbers[key] = len(files)
            files.append(File(rows, rows.fingerprint()))
        of_source.append(numbers[key])
    return files, of_source


def find_pools(
    spec: MixtureSpec, files: Sequence[File], of_source: Sequence[int], on_bad_row: OnBadRow, max_bad_rows: int
) -> list[Pool]:
    """What each source offers after the filters. A file is read through once, and only when a filter asks for it or
    its rows must be converted.

    Raises:
        DataError: If rows that were looked at are bad and to be refused, a filter asks for a key no row has, or no row
            of a source is left; names the source.
    """
    pools = [
        Pool(name, source, number, len(files[number].rows))
        for (name, _, source), number in zip(_sources(spec), of_source, strict=True)
    ]
    sieves = [
        Sieve({"the mixture": spec.filter, f"category {name!r}": category.filter, "the source": source.filter})
        for name, category, source in _sources(spec)
    ]
    looked = []
    for number, file in enumerate(files):
        mine = [i for i, pool in enumerate(pools) if pool.file == number]
        if file.own and not any(sieves[i] for i in mine):
            continue
        for i, taken in zip(mine, _look(file, [sieves[i] for i in mine]), strict=True):
            pools[i].taken, pools[i].size = taken, len(taken)
            pools[i].left_out = len(file.rows) - len(file.bad) - len(taken)
            looked.append(i)
    check_bad([reason for file in files for reason in file.bad], on_bad_row, max_bad_rows)
    for i in looked:
        _refuse_empty(pools[i], sieves[i], files[pools[i].file])
    return pools


def check_bad(reasons: Sequence[str], on_bad_row: OnBadRow, most: int) -> None:
    """Refuse bad rows where they are to be refused, and too many of them.

    Raises:
        DataError: Naming the first.
    """
    if not reasons or (on_bad_row == "quarantine" and len(reasons) <= most):
        return
    shown = "\n".join(f"  {reason}" for reason in reasons[:_SHOWN])
    more = f"\n  ... and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    if on_bad_row == "quarantine":
        raise DataError(f"mixture: {len(reasons)} bad rows are more than data.max_bad_rows: {most}:\n{shown}{more}")
    raise DataError(
        f"mixture: {len(reasons)} bad row(s) in its sources:\n{shown}{more}\n"
        "  Repair or remove them, or set data.on_bad_row: quarantine to draw without them."
    )


def set_budgets(spec: MixtureSpec, pools: Sequence[Pool]) -> None:
    """Say how many rows each pool gives.

    Raises:
        DataError: If caps leave rows over that are not to be left out; says what would fit.
    """
    spill = spec.overflow == "redistribute"
    of = {name: [pool for pool in pools if pool.category == name] for name in spec.categories}
    shares = [exact(category.share) for category in spec.categories.values()]
    requested = share_out(spec.rows, shares)
    caps = [_cap(spec, name, of[name]) for name in spec.categories]
    actual = capped(spec.rows, shares, caps, spill=spill)
    for i, (name, category) in enumerate(spec.categories.items()):
        mine = of[name]
        sizes, ones = [pool.size for pool in mine], [1] * len(mine)
        if (category.draw or spec.draw) == "rows":
            wanted, found = by_pool(requested[i], sizes), by_pool(actual[i], sizes)
        else:
            limits = [cap_of(size, category.max_epochs or spec.max_epochs) for size in sizes]
            wanted, found = share_out(requested[i], ones), capped(actual[i], ones, limits, spill=spill)
        for pool, asked, given in zip(mine, wanted, found, strict=True):
            pool.requested, pool.actual = asked, given
    _refuse_short(spec, pools)


def draw(spec: MixtureSpec, pools: Sequence[Pool]) -> tuple[NDArray[np.int32], Indices]:
    """The mixture in its shuffled order: number of the pool and index in its file, of each row."""
    seed = spec.seed or 0
    places = [pool.category for pool in pools]
    drawn = [pool.draw(seed, places[:i].count(pool.category)) for i, pool in enumerate(pools)]
    of = np.repeat(np.arange(len(pools), dtype=np.int32), [len(part) for part in drawn])
    order = permutation(len(of), seed, "order")
    return of[order], np.concatenate(drawn)[order]


def _sources(spec: MixtureSpec) -> Iterator[tuple[str, CategorySpec, SourceSpec]]:
    for name, category in spec.categories.items():
        for source in category.sources:
            yield name, category, source


def _look(file: File, sieves: Sequence[Sieve]) -> list[Indices]:
    """Indices that each sieve takes; bad rows are written down."""
    taken = [array("q") for _ in sieves]
    for index in range(len(file.rows)):
        try:
            row: Row = file.rows[index]
            verdicts = [sieve.takes(row) for sieve in sieves]
        except DataError as error:
            file.bad.append(str(error))
            continue
        for indices, takes in zip(taken, verdicts, strict=True):
            if takes:
                indices.append(index)
    return [np.array(indices, np.int64) for indices in taken]


def _refuse_empty(pool: Pool, sieve: Sieve, file: File) -> None:
    what = f"mixture: category {pool.category!r}: {pool.source.path}"
    if len(file.bad) < len(file.rows) and (unknown := sieve.unknown_key()):
        keys = keys_of(islice(_readable(file.rows), _KEYS_FROM))
        raise DataError(
            f"{what}: {unknown[0]}'s filter asks for {unknown[1]}, a key no row has.\n"
            f"  Keys there are: {', '.join(keys) or 'none'}"
        )
    if not pool.size:
        why = [sieve.reasons(), f"{len(file.bad):,} are bad" if file.bad else ""]
        raise DataError(f"{what}: no row is left of {len(file.rows):,}: {'; '.join(filter(None, why))}")


def _readable(rows: Rows) -> Iterator[Row]:
    for index in range(len(rows)):
        try:
            yield rows[index]
        except DataError:
            continue


def _cap(spec: MixtureSpec, name: str, pools: Sequence[Pool]) -> int | None:
    category = spec.categories[name]
    epochs = category.max_epochs or spec.max_epochs
    if (category.draw or spec.draw) == "rows":
        return cap_of(sum(pool.size for pool in pools), epochs)
    limits = [cap_of(pool.size, epochs) for pool in pools]
    return None if epochs is None else sum(limit or 0 for limit in limits)


def _refuse_short(spec: MixtureSpec, pools: Sequence[Pool]) -> None:
    short = [pool for pool in pools if pool.actual < pool.requested]
    total = sum(pool.actual for pool in pools)
    remedy = "Raise max_epochs or lower rows"
    if spec.overflow == "refuse" and short:
        lines = "\n".join(
            f"  {pool.category}: {pool.source.path}: {pool.requested:,} rows asked for, {pool.actual:,} allowed by"
            f" max_epochs (it has {pool.size:,})"
            for pool in short
        )
        raise DataError(f"mixture: caps leave rows over, and overflow is refuse:\n{lines}\n  {remedy}.")
    if spec.overflow == "redistribute" and total < spec.rows:
        raise DataError(
            f"mixture: {spec.rows:,} rows are asked for, but max_epochs allows {total:,} in all categories together.\n"
            f"  {remedy}, or set overflow: shrink."
        )
    if not total:
        raise DataError(f"mixture: max_epochs allows no row at all. {remedy}.")


def as_data(spec: MixtureSpec, pools: Sequence[Pool], files: Sequence[File]) -> list[dict[str, Any]]:
    """Categories and sources with what was asked for and what is drawn, as plain data."""
    found = []
    for name, category in spec.categories.items():
        mine = [pool for pool in pools if pool.category == name]
        found.append(
            {
                "category": name,
                "share": category.share,
                "draw": category.draw or spec.draw,
                "max_epochs": category.max_epochs or spec.max_epochs,
                **_numbers(mine),
                "sources": [
                    {
                        "path": pool.source.path,
                        "format": pool.source.format,
                        "filter": pool.source.filter.model_dump(exclude_defaults=True),
                        "sha256": files[pool.file].sha256,
                        "rows": len(files[pool.file].rows),
                        "left_out": pool.left_out,
                        "bad": len(files[pool.file].bad),
                        **_numbers([pool]),
                    }
                    for pool in mine
                ],
            }
        )
    return found


def _numbers(pools: Sequence[Pool]) -> dict[str, Any]:
    size, actual = sum(pool.size for pool in pools), sum(pool.actual for pool in pools)
    return {
        "pool": size,
        "requested": sum(pool.requested for pool in pools),
        "actual": actual,
        "epochs": round(actual / size, 4),
        "repeats": [
            min(pool.actual // pool.size for pool in pools),
            max(-(-pool.actual // pool.size) for pool in pools),
        ],
    }
