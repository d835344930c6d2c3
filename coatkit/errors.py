"""Errors a user can act on. The command line prints their text, without a traceback, and exits with their code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class CoatkitError(Exception):
    """Base of every error coatkit raises on purpose; the message names what is wrong and what to do."""

    exit_code = 3


class SpecError(CoatkitError):
    """A spec is wrong. Holds every problem found, not just the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class PluginError(CoatkitError):
    """A plugin or user class cannot be found, loaded or built."""

    exit_code = 2


class DataError(CoatkitError):
    """A row or an audio file is wrong; the message names row and file."""


class AssetError(CoatkitError):
    """Weights are missing or damaged; the message names the command that brings them."""


class RunError(CoatkitError):
    """A run folder or checkpoint cannot be used as asked."""


def printable(text: str, keep: str = "") -> str:
    """Somebody's text for a terminal or a plot: what is no printing character, and not in `keep`, shown by its code."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def other_format(found: object, known: int) -> str:
    """What is said of something written in another format than this coatkit reads, with the remedy."""
    said = f"format {found!r:.40}, but this coatkit reads format {known}"
    if isinstance(found, int) and not isinstance(found, bool) and found > known:
        return f"{said}; a newer coatkit wrote it: upgrade coatkit (pip install --upgrade coatkit)"
    return f"{said}; use the coatkit that wrote it, or make it anew"


@contextmanager
def foreign_code(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Run a plugin's or user's code: what it raises becomes a `PluginError` that says whose it is.

    Args:
        describe: From the exception to the message.
    """
    try:
        yield
    except CoatkitError:
        raise
    except Exception as error:
        raise PluginError(describe(error)) from error
