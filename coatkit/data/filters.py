"""Which rows of a source are taken."""

from __future__ import annotations

from coatkit.data.rows import Row
from coatkit.spec_data import FilterSpec


def passes(row: Row, seconds: float, keep: FilterSpec) -> bool:
    """Whether a filter takes a row.

    Args:
        seconds: Seconds of sound in the row, all sounds together.
    """
    if keep.min_seconds is not None and seconds < keep.min_seconds:
        return False
    if keep.max_seconds is not None and seconds > keep.max_seconds:
        return False
    if keep.language is not None and row.labels.get("language") not in keep.language:
        return False
    return all(key in row.labels and row.labels[key] in values for key, values in keep.where.items())
