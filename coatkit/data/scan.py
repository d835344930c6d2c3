"""A look at every row before training: is it usable, how long is its sound, what will it cost.

A large manifest is looked at once and what was found is kept in coatkit's cache, since opening a million sound files
takes minutes and a cluster restarts its jobs; a small one is looked at each time.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from coatkit import __version__
from coatkit.assets import cache_dir
from coatkit.data import audio as sound
from coatkit.data.filters import passes
from coatkit.data.rows import AudioRef, Row, Rows, learning
from coatkit.errors import DataError
from coatkit.files import from_json, written_beside
from coatkit.protocols import Preparer
from coatkit.spec_data import DataSpec, FilterSpec

_ROW_OVERHEAD = 24
"""Tokens of chat markup per row, about; the plan needs a cost, not a count."""
_CHUNK = 2_000
_KEPT_FROM = 50_000
"""Rows from which what was found is kept."""
_PROBES = (0.01, 0.1, 1.0, 10.0, 29.99, 30.01, 119.0)
"""Seconds at which the backbone is asked for audio tokens, to tell one backbone's cost from another's."""


@dataclass
class Scan:
    """What a look at every row found.

    Attributes:
        costs: [R] tokens, 2 x audio tokens + text, about.
        seconds: [R] seconds of sound.
        bad: Index of each unusable row, and the reason.
        left_out: Indices of the rows that the source's filter does not take.
    """

    costs: NDArray[np.int64]
    seconds: NDArray[np.float64]
    bad: list[tuple[int, str]]
    left_out: NDArray[np.int64]

    @property
    def good(self) -> NDArray[np.int64]:
        """Indices of the usable rows."""
        keep = np.ones(len(self.costs), bool)
        keep[[i for i, _ in self.bad]] = False
        keep[self.left_out] = False
        return np.flatnonzero(keep)


def scan(
    rows: Rows,
    preparer: Preparer,
    data: DataSpec,
    thinking: float,
    *,
    keep: FilterSpec | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda mine: [mine],
) -> Scan:
    """Check every row and its sounds' headers, and estimate its cost.

    Args:
        thinking: Thinking positions per audio token; 0 when thinking is off.
        keep: Rows to take; all when left out.
        share: This process's number, and how many there are; each looks at its part of the rows.
        gather: From one process's part to those of all.

    Raises:
        DataError: With `on_bad_row: refuse`, listing the first bad rows; with `quarantine`, when there are too many;
            or when no row is left.
    """
    kept = _place(rows, preparer, data, thinking, keep) if len(rows) >= _KEPT_FROM else None
    looker = _Looker(rows, preparer, data, thinking, keep)
    before = _read(kept) if kept is not None else None
    if all(gather(before is not None)) and before is not None:  # all take the same way
        found = looker.again(before)
    else:
        found = _look(rows, looker, data.workers, share, gather)
        if kept is not None and share[0] == 0:
            _write(kept, found)
    _judge(found.bad, data, rows.path)
    if len(found.good) == 0:
        why = f"every row is bad, first: {found.bad[0][1]}" if found.bad else "the filter takes no row"
        raise DataError(f"{rows.path}: {why}")
    return found


class _Looker(Dataset[tuple[int, Scan]]):
    """Chunks of rows, looked at; chunks are items so that data workers can share the work."""

    def __init__(
        self, rows: Rows, preparer: Preparer, data: DataSpec, thinking: float, keep: FilterSpec | None
    ) -> None:
        self.rows, self.preparer, self.data, self.thinking, self.keep = rows, preparer, data, thinking, keep

    def __getitem__(self, chunk: int) -> tuple[int, Scan]:
        return chunk, self.look(range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.rows))))

    def look(self, indices: Sequence[int]) -> Scan:
        """What is found in these rows; `costs` and `seconds` are in their order."""
        costs, seconds = np.ones(len(indices), np.int64), np.zeros(len(indices))
        bad, left_out = [], []
        for at, i in enumerate(indices):
            try:
                row = self.rows[i]
                costs[at], seconds[at] = self._look(row)
                if self.keep is not None and not passes(row, float(seconds[at]), self.keep):
                    left_out.append(i)
            except DataError as error:
                bad.append((i, str(error)))
        return Scan(costs, seconds, bad, np.array(left_out, np.int64))

    def again(self, before: Scan) -> Scan:
        """What was kept, with another look at the rows that were bad: their sounds may have been repaired."""
        indices = [i for i, _ in before.bad]
        now = self.look(indices)
        before.costs[indices], before.seconds[indices] = now.costs, now.seconds
        return Scan(before.costs, before.seconds, now.bad, np.sort(np.concatenate([before.left_out, now.left_out])))

    def _look(self, row: Row) -> tuple[int, float]:
        if row.messages[-1].role != "assistant":
            raise row.fail("the last message must be the assistant's answer")
        learning(row, self.data.learn)  # it says so if none is left to learn
        tokens, seconds = sum(len(m.content.encode()) for m in row.messages) // 4 + _ROW_OVERHEAD, 0.0
        for ref in row.audios:
            length = _duration(row, ref)
            self._check_length(row, ref, length)
            heard = self.preparer.audio_tokens(round(length * self.preparer.sample_rate))
            tokens += round(heard * (1 + self.thinking))
            seconds += length
        return tokens, seconds

    def _check_length(self, row: Row, ref: AudioRef, seconds: float) -> None:
        if seconds > self.data.max_seconds:
            raise row.fail(f"{ref}: {seconds:.1f} s is over data.max_seconds ({self.data.max_seconds:g} s)")
        if reason := self.preparer.cannot_hear(seconds):
            raise row.fail(f"{ref}: {reason}")


def _duration(row: Row, ref: AudioRef) -> float:
    try:
        return sound.duration(ref)
    except DataError as error:
        raise row.fail(str(error)) from None


def _look(
    rows: Rows, looker: _Looker, workers: int, share: tuple[int, int], gather: Callable[[Any], list[Any]]
) -> Scan:
    chunks = range(-(-len(rows) // _CHUNK))
    mine: Iterable[int] = chunks[share[0] :: share[1]]
    several = workers if len(rows) >= 10 * _CHUNK else 0
    parts = list(DataLoader(looker, batch_size=None, sampler=mine, num_workers=several))
    whole = sorted((part for parts in gather(parts) for part in parts), key=lambda part: int(part[0]))
    scans: list[Scan] = [part for _, part in whole]
    return Scan(
        np.concatenate([one.costs for one in scans]),
        np.concatenate([one.seconds for one in scans]),
        [pair for one in scans for pair in one.bad],
        np.concatenate([one.left_out for one in scans]),
    )


def _judge(bad: Sequence[tuple[int, str]], data: DataSpec, path: Path) -> None:
    if not bad:
        return
    shown = "\n".join(f"  {reason}" for _, reason in bad[:10])
    more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
    if data.on_bad_row == "refuse":
        raise DataError(
            f"{path}: {len(bad)} bad row(s):\n{shown}{more}\n"
            "  Repair or remove them, or set data.on_bad_row: quarantine to train without them."
        )
    if len(bad) > data.max_bad_rows:
        raise DataError(
            f"{path}: {len(bad)} bad rows are more than data.max_bad_rows: {data.max_bad_rows}:\n{shown}{more}"
        )


def _place(rows: Rows, preparer: Preparer, data: DataSpec, thinking: float, keep: FilterSpec | None) -> Path:
    """Where a look at these rows is kept: named by all it depends on but the sound files themselves."""
    heard = [[preparer.cannot_hear(s), preparer.audio_tokens(round(s * preparer.sample_rate))] for s in _PROBES]
    means = [__version__, rows.fingerprint(), heard, data.max_seconds, data.learn, thinking, keep and keep.model_dump()]
    digest = hashlib.sha256(json.dumps(means).encode()).hexdigest()
    return cache_dir() / "scans" / f"{digest[:32]}.npz"


def _write(path: Path, found: Scan) -> None:
    bad, reasons = zip(*found.bad, strict=True) if found.bad else ((), ())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as partial, partial.open("wb") as stream:
            np.savez_compressed(
                stream,
                costs=found.costs,
                seconds=found.seconds,
                left_out=found.left_out,
                bad=np.array(bad, np.int64),
                reasons=np.frombuffer(json.dumps(reasons).encode(), np.uint8),
            )
    except OSError:
        pass  # it is looked at again next time


def _read(path: Path) -> Scan | None:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            reasons = from_json(found["reasons"].tobytes())
            bad = list(zip(found["bad"].tolist(), reasons, strict=True))
            return Scan(found["costs"], found["seconds"], bad, found["left_out"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
