"""How a spoiled input may end: in success, or an error of one screen with exit code 2 or 3, soon, in little memory."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20
"""Longest a case may take."""
LINES, COLUMNS = 25, 160
"""One screen: an error fills no more."""
MEMORY = 2 << 30
"""Address space that a process may take beyond what its imports have taken, in bytes; more is a MemoryError."""
_PARTIAL = re.compile(r"\.partial$|\.tmp$|\.new$|^tmp")

Case = tuple[str, Callable[[], Any]]
"""A name, and what is done; it returns, or raises."""


class Hang(BaseException):
    """A case took too long."""


class RefusedError(Exception):
    """A command refused; its exit code and what it printed as an error."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"exit code {code}: {said[:200]}")
        self.code, self.said = code, said


@dataclass
class Tally:
    """What became of the cases of one area."""

    accepted: int = 0
    refused: int = 0
    crashed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.crashed)


def shell(*words: Any) -> str:
    """A coatkit command in this process, as the shell's `coatkit` runs it: the same function, streams that are UTF-8.

    Returns:
        What it printed.

    Raises:
        RefusedError: If it exits with another code than 0.
    """
    from coatkit.cli import main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    err.reconfigure(errors="backslashreplace")  # as Python's own
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout, sys.stderr = ["coatkit", *map(str, words)], out, err
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    if code not in (0, None):
        raise RefusedError(code, err.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


def as_a_shell(*words: Any) -> None:
    """The same command in a process of its own has to end and say the same as `shell` gave.

    Raises:
        RefusedError: As `shell`.
        AssertionError: If the two differ.
    """
    command = [sys.executable, "-m", "coatkit", *map(str, words)]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    seen = done.returncode, (done.stdout if done.returncode == 0 else done.stderr).decode()
    try:
        here = 0, shell(*words)
    except RefusedError as error:
        here = error.code, error.said
    assert seen == here, f"a shell sees {seen!r:.500}, but here it is {here!r:.500}"
    if here[0]:
        raise RefusedError(*here)


def wrong_with(code: int, said: str) -> str:
    """What is wrong with an error as the shell shows it; empty when nothing is."""
    rows = sum(max(1, -(-len(line) // COLUMNS)) for line in said.rstrip("\n").split("\n"))
    if code not in (2, 3):
        return f"exit code {code}"
    if "Traceback (most recent call last)" in said:
        return "a traceback is shown"
    if not said.strip():
        return "nothing is said"
    if rows > LINES:
        return f"the message fills {rows} lines"
    return ""


def run(cases: Iterator[Case], folder: Path, count: int, keep: Path | None = None) -> Tally:
    """Try `count` cases whose files are in `folder`.

    Args:
        keep: Where to leave the files of cases that crashed.
    """
    tally = Tally()
    signal.signal(signal.SIGALRM, _too_long)
    for name, act in cases:
        wrong, refused = judge(act, folder)
        if wrong:
            tally.crashed.append((name, wrong))
            if keep is not None:
                _keep(folder, keep / f"{len(tally.crashed):03d}", f"{name}\n{wrong}\n")
        elif refused:
            tally.refused += 1
        else:
            tally.accepted += 1
        if tally.tried == count:
            break
    return tally


def judge(act: Callable[[], Any], folder: Path) -> tuple[str, bool]:
    """What is wrong with how a case ended, empty when nothing is; and whether it was refused."""
    from coatkit.cli import shown
    from coatkit.errors import CoatkitError

    before, wrong, refused = _listing(folder), "", False
    signal.alarm(SECONDS)
    try:
        act()
    except RefusedError as error:
        wrong, refused = wrong_with(error.code, error.said), True
        if wrong:
            wrong += f"\n{error.said[:3000]}"
    except CoatkitError as error:
        refused = True
        if wrong := wrong_with(error.exit_code, f"error: {shown(error)}"):
            wrong += f"\n{str(error)[:3000]}"
    except Hang:
        wrong = f"no end after {SECONDS} s\n{traceback.format_exc()[-3000:]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = f"{type(error).__name__}\n{traceback.format_exc()[-3000:]}"
    finally:
        signal.alarm(0)
    after = _listing(folder)
    if half := [name for name in after if _PARTIAL.search(Path(name).name) and name not in before]:
        wrong = wrong or f"left half-written: {half[0]}"
    return wrong, refused


@contextmanager
def limited(more: int = MEMORY) -> Iterator[Callable[[], int]]:
    """Limit this process's address space from here on; gives a function that says by how many bytes its peak grew."""
    import resource

    now = _status("VmSize") + more
    before = resource.getrlimit(resource.RLIMIT_AS)
    peak = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, (now, before[1]))
    try:
        yield lambda: _status("VmHWM") - peak
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _too_long(*_: Any) -> None:
    raise Hang


def _listing(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


def _keep(folder: Path, to: Path, said: str) -> None:
    """The small files a case was made of, and what went wrong."""
    import shutil

    to.mkdir(parents=True, exist_ok=True)
    (to / "said.txt").write_text(said, errors="backslashreplace")
    newest = sorted((Path(name) for name in _listing(folder)), key=lambda p: -p.lstat().st_mtime)[:3]
    for path in newest:
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
            shutil.copy(path, to / path.name)
