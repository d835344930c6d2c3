"""What rows hold, before anything is trained on them: how many, how long, of which categories, bad or twice there.

No model and no weights are loaded, so tokens are estimated: from the backbone's audio tokens per second and the bytes
of the text.
"""

from __future__ import annotations

import math
import os
import random
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatkit.data import audio as sound
from coatkit.data.filters import passes
from coatkit.data.rows import AudioRef, Row, Rows, learning
from coatkit.errors import DataError
from coatkit.plan_rows import Lengths, RowShape
from coatkit.spec_data import FilterSpec

SECONDS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 60.0, 120.0, 300.0, 1200.0)
"""Edges of the bins of seconds; finer where most sounds are."""
TOKENS = (0.0, *(float(2**k) for k in range(5, 18)))
"""Edges of the bins of tokens: 32, 64, ... 131,072."""
NAMED = 20
"""Bad rows and duplicates that are named; the rest are counted."""
_TEXT_BYTES = 4
"""Bytes of a token of text, about."""
_MARKUP = 24
"""Tokens of chat markup in a row, about."""


@dataclass
class Group:
    """Rows of one category.

    Attributes:
        name: The category.
        rows: Rows that can be used.
        text_only: Of these, rows without a sound.
        sounds: Number of sounds in a row to the number of rows.
        turns: Number of turns in a row, the system's not counted, to the number of rows.
        languages: Language to the number of rows.
        seconds: Of each row with sound whose length is known, all its sounds together.
        tokens: Of each row whose length is known, estimated.
        unknown: Rows with sound whose length is not known.
        examples: A few of the rows, drawn at random but always the same.
    """

    name: str
    rows: int = 0
    text_only: int = 0
    sounds: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    seconds: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    unknown: int = 0
    examples: list[Row] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """Hours of sound, as far as lengths are known."""
        return math.fsum(self.seconds) / 3600

    def add(self, row: Row, seconds: float | None, tokens: float) -> None:
        """Count a row; `seconds` is None where its length is not known."""
        self.rows += 1
        self.text_only += not row.audios
        self.sounds[len(row.audios)] += 1
        self.turns[sum(m.role != "system" for m in row.messages)] += 1
        if language := _label(row, "language"):
            self.languages[language] += 1
        if seconds is None:
            self.unknown += 1
            return
        self.tokens.append(tokens)
        if row.audios:
            self.seconds.append(seconds)


@dataclass
class Same:
    """Rows that say the same as an earlier row.

    Attributes:
        count: How many, the earlier not counted.
        named: Place of the first few, and of the row each repeats.
    """

    count: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, earlier: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append((place, earlier))


@dataclass
class Survey:
    """What was found in some rows.

    Attributes:
        path: File or folder they are in.
        count: Rows there are.
        left_out: Rows that the source's filter does not take.
        repeats: Rows that a mixture drew again.
        groups: Category to its rows, most rows first.
        bad: Why each of the first bad rows cannot be used.
        kinds: What is wrong, without names and numbers, to the number of rows.
        same_id: Rows with the id of another.
        same_content: Rows with the sounds and text of another.
        stated: Rows whose length they state themselves.
        opened: Rows whose sounds' headers were read.
        contents: Digest of the sounds and text of every usable row.
        shared: Of held-out rows: those whose sounds and text are in training too. None of any others.
    """

    path: Path
    count: int
    left_out: int = 0
    repeats: int = 0
    groups: dict[str, Group] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    same_id: Same = field(default_factory=Same)
    same_content: Same = field(default_factory=Same)
    stated: int = 0
    opened: int = 0
    contents: set[int] = field(default_factory=set)
    shared: int | None = None

    @property
    def whole(self) -> Group:
        """All categories together."""
        whole = Group("all")
        for group in self.groups.values():
            whole.rows += group.rows
            whole.text_only += group.text_only
            whole.unknown += group.unknown
            for mine, its in (
                (whole.sounds, group.sounds),
                (whole.turns, group.turns),
                (whole.languages, group.languages),
            ):
                mine.update(its)  # type: ignore[arg-type]
            whole.seconds.extend(group.seconds)
            whole.tokens.extend(group.tokens)
        return whole

    @property
    def unopened(self) -> int:
        """Rows with sound whose files were looked for but not into."""
        return self.stated + sum(group.unknown for group in self.groups.values())

    def add_bad(self, reason: str, kind: str) -> None:
        """Count a row that cannot be used."""
        self.kinds[kind] += 1
        if len(self.bad) < NAMED:
            self.bad.append(reason)


def survey(
    rows: Rows,
    lengths: Lengths,
    *,
    max_seconds: float,
    learn: str = "all",
    keep: FilterSpec | None = None,
    headers: bool | None = None,
    by: str = "",
    examples: int = 0,
) -> Survey:
    """Look at every row. A bad one is counted, whatever the spec says of bad rows.

    Args:
        lengths: How long a row becomes in the backbone, as far as is known without loading it.
        max_seconds: Longest sound that training takes, seconds.
        learn: Which answers are learnt, `all` or `last`.
        keep: The source's filter.
        headers: Open the sounds of every row (True), of none (False), or of those that do not state their length.
        by: Label that says a row's category; `category`, else `source`, else the file's name when empty.
        examples: Rows of each category to keep.
    """
    found = Survey(rows.path, len(rows))
    look = _Look(found, lengths, max_seconds, learn, keep or FilterSpec(), headers, examples)
    keys = (by,) if by else ("category", "source")
    for index in range(len(rows)):
        try:
            row = rows[index]
        except DataError as error:
            found.add_bad(str(error), kind_of(str(error), rows.where(index)))
            continue
        name = next((value for value in (_label(row, key) for key in keys) if value), "")
        look.at(row, name or (f"(no {by})" if by else rows.path.name), index, rows)
    found.groups = dict(sorted(found.groups.items(), key=lambda pair: (-pair[1].rows, pair[0])))
    found.contents = set(look.contents)
    return found


class _Look:
    """Takes rows one after another and counts."""

    def __init__(
        self,
        found: Survey,
        lengths: Lengths,
        max_seconds: float,
        learn: str,
        keep: FilterSpec,
        headers: bool | None,
        examples: int,
    ) -> None:
        self.found, self.lengths, self.max_seconds, self.learn = found, lengths, max_seconds, learn
        self.keep, self.headers, self.examples = keep, headers, examples
        # A length that is not known cannot be compared.
        self.keep_untimed = keep.model_copy(update={"min_seconds": None, "max_seconds": None})
        self.ids: dict[int, int] = {}
        self.contents: dict[int, int] = {}
        self.drawn: set[int] = set()
        self.files: dict[Path, str] = {}
        self.random = random.Random(0)

    def at(self, row: Row, name: str, index: int, rows: Rows) -> None:
        """Count the row at `index`, which is of category `name`."""
        found = self.found
        try:
            each, total = self._seconds(row)
            self._check(row, each)
        except DataError as error:
            found.add_bad(str(error), kind_of(str(error), row.where, row))
            return
        if not passes(row, total or 0.0, self.keep_untimed if total is None else self.keep):
            found.left_out += 1
            return
        if name not in found.groups:
            found.groups[name] = Group(name)
        group = found.groups[name]
        text = sum(len(m.content.encode()) for m in row.messages) / _TEXT_BYTES + _MARKUP
        spread = each or [(total or 0.0) / max(1, len(row.audios))] * len(row.audios)
        group.add(row, total, self.lengths.tokens(RowShape(tuple(spread), text, 0)))
        if len(group.examples) < self.examples:
            group.examples.append(row)
        elif (at := self.random.randrange(group.rows)) < self.examples:
            group.examples[at] = row
        self._compare(row, index, rows)

    def _compare(self, row: Row, index: int, rows: Rows) -> None:
        """Whether an earlier row has the same id, or the same sounds and text."""
        own = row.where.removeprefix(f"{rows.path} row {index + 1}, ")
        if own != row.where:  # of a mixture, which repeats rows on purpose
            if hash(own) in self.drawn:
                self.found.repeats += 1
                return
            self.drawn.add(hash(own))
        if row.id != f"line {row.where.rpartition(':')[2]}":  # that is no id but the want of one
            self._meet(self.ids, hash(row.id), self.found.same_id, row, index, rows)
        heard = tuple((str(ref), ref.start, ref.end) for ref in row.audios)
        key = hash((heard, tuple((m.role, m.content) for m in row.messages)))
        self._meet(self.contents, key, self.found.same_content, row, index, rows)

    @staticmethod
    def _meet(seen: dict[int, int], key: int, same: Same, row: Row, index: int, rows: Rows) -> None:
        first = seen.setdefault(key, index)
        if first != index:
            same.add(row.where, rows.where(first) if len(same.named) < NAMED else "")

    def _seconds(self, row: Row) -> tuple[list[float], float | None]:
        """Seconds of each sound, as far as they are known, and of all together; None where that is not known."""
        if not row.audios:
            return [], 0.0
        for ref in row.audios if self.headers is not True else ():
            self._check_there(row, ref)
        if self.headers is not True:
            if all(ref.end is not None for ref in row.audios):
                self.found.stated += 1
                each = [(ref.end or 0.0) - (ref.start or 0.0) for ref in row.audios]
                return each, sum(each)
            stated = _stated(row)
            if stated is not None:
                self.found.stated += 1
                return ([stated] if len(row.audios) == 1 else []), stated
            if self.headers is False:
                return [], None
        self.found.opened += 1
        try:
            each = [sound.duration(ref) for ref in row.audios]
        except DataError as error:
            raise row.fail(str(error)) from None
        return each, sum(each)

    def _check_there(self, row: Row, ref: AudioRef) -> None:
        """A missing file costs no look inside to find; each is asked for once."""
        if ref.path not in self.files:
            there = "" if os.path.isfile(ref.path) else "it is no file"
            self.files[ref.path] = there if os.path.exists(ref.path) else "there is no such file"
        if self.files[ref.path]:
            raise row.fail(f"{ref}: cannot be opened as sound: {self.files[ref.path]}")

    def _check(self, row: Row, each: Sequence[float]) -> None:
        """What training checks of a row, but for what only the backbone can say."""
        if row.messages[-1].role != "assistant":
            raise row.fail("the last message must be the assistant's answer")
        learning(row, self.learn)
        for ref, seconds in zip(row.audios, each, strict=False):
            if seconds > self.max_seconds:
                raise row.fail(f"{ref}: {seconds:.1f} s is over data.max_seconds ({self.max_seconds:g} s)")


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Values in each bin [edge, next edge); the last bin has no end. Every value must be at or above the first edge."""
    counts = [0] * len(edges)
    for value in values:
        counts[bisect_right(edges, value) - 1] += 1
    return counts


def used(counts: Sequence[int]) -> range:
    """The bins from the first to the last that holds something."""
    filled = [i for i, count in enumerate(counts) if count]
    return range(filled[0], filled[-1] + 1) if filled else range(0)


def bin_name(edges: Sequence[float], at: int) -> str:
    """`2 to 3`, or `from 1,200` for the last."""
    low = f"{edges[at]:,g}"
    return f"{low} to {edges[at + 1]:,g}" if at + 1 < len(edges) else f"from {low}"


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Least, median and greatest; zeros of nothing."""
    if not values:
        return 0.0, 0.0, 0.0
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def plain(text: str, width: int = 10_000) -> str:
    """Text on one line, without characters that would change a terminal's or a page's state, cut to `width`."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _stated(row: Row) -> float | None:
    """What a row says of its sounds' length, in seconds; as filters take it."""
    for key in ("duration", "seconds"):
        said = row.labels.get(key)
        if isinstance(said, int | float) and not isinstance(said, bool) and math.isfinite(said) and said >= 0:
            return float(said)
    return None


def _label(row: Row, key: str) -> str:
    """A label as text; `outer.inner`, or a plain key within `labels`, where the row has none of that name."""
    found: Any = row.labels.get(key)
    if found is None:
        outer, dot, inner = key.partition(".")
        within = row.labels.get(outer if dot else "labels")
        found = within.get(inner if dot else key) if isinstance(within, Mapping) else None
    if found is None or isinstance(found, Mapping | list):
        return ""
    return plain(str(found))


def kind_of(reason: str, where: str, row: Row | None = None) -> str:
    """What is wrong with a row, without what differs from row to row: its place, its files and numbers."""
    text = reason.removeprefix(where)
    if row is not None:
        text = text.removeprefix(f" (row {row.id})")
        for ref in row.audios:
            for name in (str(ref), str(ref.path)):
                text = text.replace(f"{name}: ", "")
    text = text.removeprefix(": ").partition("\n")[0]
    return plain(re.sub(r"\d+(?:[.,]\d+)*", "N", text), 160)
