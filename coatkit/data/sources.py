"""From what a spec says of its rows to rows that can be read: a source, or a mixture of many."""

from __future__ import annotations

from pathlib import Path

from coatkit.data.readers import open_rows
from coatkit.data.rows import Rows
from coatkit.errors import DataError
from coatkit.spec_data import MixtureSpec, SourceSpec


def open_data(data: SourceSpec | MixtureSpec) -> Rows:
    """Rows of a source or a mixture, whose paths are absolute (`LoadedSpec.rows_of`); a mixture is made when needed.

    The filter of a source is not applied here: `scan` leaves such rows out, so that lines keep their numbers.

    Raises:
        DataError: If a file cannot be opened or has another format; names it.
    """
    if isinstance(data, MixtureSpec):
        raise DataError("mixtures are not there yet")
    return open_rows(Path(data.path), data.format, question=data.question, columns=data.columns)
