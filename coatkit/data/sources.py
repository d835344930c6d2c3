"""From what a spec says of its rows to rows that can be read: a source, or a mixture of many."""

from __future__ import annotations

from pathlib import Path

from coatkit.data.pools import OnBadRow
from coatkit.data.readers import open_rows
from coatkit.data.rows import Rows
from coatkit.spec_data import MixtureSpec, SourceSpec


def open_data(data: SourceSpec | MixtureSpec, *, on_bad_row: OnBadRow = "refuse", max_bad_rows: int = 100) -> Rows:
    """Rows of a source or a mixture, whose paths are absolute (`LoadedSpec.rows_of`); a mixture is made when needed.

    The filter of a source is not applied here: `scan` leaves such rows out, so that lines keep their numbers.

    Args:
        on_bad_row: What to do with rows that are found bad while a mixture is drawn.
        max_bad_rows: With quarantine: refuse when there are more.

    Raises:
        DataError: If a file cannot be opened or has another format, or a mixture cannot be drawn; names it.
    """
    if isinstance(data, MixtureSpec):
        from coatkit.data.mixture import MixtureRows, mix  # pyarrow is loaded only when there is one

        made = mix(data, on_bad_row=on_bad_row, max_bad_rows=max_bad_rows)
        return MixtureRows(made.path)
    return open_rows(Path(data.path), data.format, question=data.question, columns=data.columns)
