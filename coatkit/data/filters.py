"""Which rows of a source are taken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coatkit.data import audio as sound
from coatkit.data.rows import Row
from coatkit.errors import DataError
from coatkit.spec_data import FilterSpec

_ABSENT = object()


def passes(row: Row, seconds: float, keep: FilterSpec) -> bool:
    """Whether a filter takes a row.

    Args:
        seconds: Seconds of sound in the row, all sounds together.
    """
    return _fits(seconds, keep) and all(_among(_value(row.labels, k), values) for _, k, values in _conditions(keep))


def seconds_of(row: Row) -> float:
    """Seconds of sound in a row: of its stretches, else what it declares (`duration` or `seconds`), else of the files.

    Raises:
        DataError: If a file must be looked at and cannot be opened.
    """
    if all(ref.end is not None for ref in row.audios):
        return sum((ref.end or 0.0) - (ref.start or 0.0) for ref in row.audios)
    for key in ("duration", "seconds"):
        said = row.labels.get(key)
        if isinstance(said, int | float) and not isinstance(said, bool) and math.isfinite(said) and said >= 0:
            return float(said)
    try:
        return sum(sound.duration(ref) for ref in row.audios)
    except DataError as error:
        raise row.fail(str(error)) from None


class Sieve:
    """Several filters at once, which remembers why rows did not pass.

    Args:
        filters: What to call each filter in messages, and the filter.
    """

    def __init__(self, filters: Mapping[str, FilterSpec]) -> None:
        self.filters = {name: keep for name, keep in filters.items() if keep != FilterSpec()}
        # Worked out once: a million rows go through.
        self._conditions = [(name, *asked) for name, keep in self.filters.items() for asked in _conditions(keep)]
        self._timed = {n: k for n, k in self.filters.items() if (k.min_seconds, k.max_seconds) != (None, None)}
        self._seen: set[tuple[str, str]] = set()
        self._refused: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self.filters)

    def takes(self, row: Row) -> bool:
        """Whether all filters take the row. Its sounds are looked at only when nothing else decides.

        Raises:
            DataError: If they cannot be opened.
        """
        reason = ""
        for name, said, key, values in self._conditions:
            value = _value(row.labels, key)
            if value is not _ABSENT:
                self._seen.add((name, said))
            if not reason and not _among(value, values):
                reason = f"{name}'s {said}"
        if self._timed and not reason:
            seconds = seconds_of(row)
            reason = next((f"{name}'s seconds" for name, keep in self._timed.items() if not _fits(seconds, keep)), "")
        if reason:
            self._refused[reason] += 1
        return not reason

    def unknown_key(self) -> tuple[str, str] | None:
        """A filter, and a key it asks for that no row had; one that may be absent (null) is not asked for."""
        for name, said, _, values in self._conditions:
            if (name, said) not in self._seen and None not in values:
                return name, said
        return None

    def reasons(self) -> str:
        """Why rows did not pass, most frequent first."""
        return "; ".join(f"{count:,} do not pass {reason}" for reason, count in self._refused.most_common())


def keys_of(rows: Iterable[Row]) -> list[str]:
    """Keys a filter can ask for, those of mappings within rows as `outer.inner`."""
    found: dict[str, None] = {}
    for row in rows:
        for key, value in row.labels.items():
            inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
            found.update(dict.fromkeys(inner))
    return sorted(found)


def _conditions(keep: FilterSpec) -> list[tuple[str, str, Sequence[Any]]]:
    """What the filter says of labels: as it is written in a spec, the key, and the values it may have."""
    language = [] if keep.language is None else [("language", "language", keep.language)]
    return [*language, *((f"where.{key}", key, values) for key, values in keep.where.items())]


def _fits(seconds: float, keep: FilterSpec) -> bool:
    if keep.min_seconds is not None and seconds < keep.min_seconds:
        return False
    return keep.max_seconds is None or seconds <= keep.max_seconds


def _among(value: Any, values: Sequence[Any]) -> bool:
    value = None if value is _ABSENT else value
    # In Python true is 1; in data it is not.
    return any(value == wanted and isinstance(value, bool) == isinstance(wanted, bool) for wanted in values)


def _value(labels: Mapping[str, Any], key: str) -> Any:
    """A label; `outer.inner` finds a key of a mapping, where no label has the whole name."""
    if key in labels:
        return labels[key]
    outer, dot, inner = key.partition(".")
    found = labels.get(outer) if dot else None
    return _value(found, inner) if isinstance(found, Mapping) else _ABSENT
