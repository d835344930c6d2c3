"""Plots in one style: matplotlib without pyplot's global state, colours that colour-blind people can tell apart.

matplotlib comes with `pip install 'coatkit[analysis]'` and is imported when the first figure is made.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from coatkit.errors import printable
from coatkit.evaluation.text import library
from coatkit.files import written_beside

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's palette, the best-told-apart first."""
DPI = 150
_LONGEST = 80
"""Characters of a name that are drawn."""


def figure(width: float = 7.0, height: float = 4.0, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes.

    Args:
        width: Inches.
        height: Inches.
        options: Go to `Figure.subplots`, e.g. `sharex=True`.

    Returns:
        The figure, and an array of axes [rows, columns].

    Raises:
        PluginError: If matplotlib is not installed; says how to install it.
    """
    made = library("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    library("matplotlib.backends.backend_agg").FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    return made, axes


def plain(text: str) -> str:
    """Somebody's words for a plot, as they are: matplotlib would read what stands between two `$` as a formula."""
    return printable(text[:_LONGEST], "\n").replace("$", r"\$") + ("..." if len(text) > _LONGEST else "")


def png(made: Any) -> bytes:
    """A figure as PNG, without a date or a program's name, so that the same figure gives the same bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save(made: Any, path: Path) -> None:
    """Write a figure as PNG, beside its place and renamed there."""
    data = png(made)
    with written_beside(path) as partial:
        partial.write_bytes(data)
