"""The names of the 527 sound classes of AudioSet, in the order of PANNs' outputs. Imports no torch."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

CLASS_LIST = Path(__file__).parent / "labels" / "class_labels_indices.csv"
"""AudioSet's own list, unchanged; its licence lies beside it."""


@cache
def class_names() -> tuple[str, ...]:
    """Display names by output, e.g. "Speech" for 0 and "Male speech, man speaking" for 1."""
    with CLASS_LIST.open(newline="", encoding="utf-8") as stream:
        return tuple(row["display_name"] for row in csv.DictReader(stream))
