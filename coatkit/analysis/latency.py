"""What requests cost: records of single requests, wherever they were measured, to a table and a plot.

A source of records is anything that makes `Request`s: `analysis.latency_local` measures this process, a server's client
may measure a server. Imports no torch.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from coatkit.analysis import plots
from coatkit.errors import RunError, SpecError
from coatkit.files import from_json, read_text, write_atomic

ARMS = {"vanilla": "vanilla", "cot": "text chain-of-thought", "coat": "CoAT"}
"""Ways to answer, and what they are called: the stock model, the same asked to reason in words, the trained run."""
ALL = "all"
"""The range that every request is in."""
SPANS = "0-5,5-10,10-30"


@dataclass(frozen=True)
class Span:
    """A range of durations: more than `low` and up to `high` seconds."""

    low: float
    high: float

    @property
    def name(self) -> str:
        return f"{self.low:g}-{self.high:g}"

    def holds(self, seconds: float) -> bool:
        return self.low < seconds <= self.high


def read_spans(text: str) -> list[Span]:
    """Ranges of seconds from a text like `0-5,5-10`.

    Raises:
        SpecError: If one is no range, or two overlap.
    """
    spans = []
    for word in text.split(","):
        try:
            low, high = (float(part) for part in word.split("-"))
        except ValueError:
            raise SpecError([f"--ranges {word.strip()!r}: is no range of seconds; write them like {SPANS}"]) from None
        if not 0 <= low < high < math.inf:
            raise SpecError([f"--ranges {word.strip()!r}: must grow, from 0 or more to a finite number of seconds"])
        spans.append(Span(low, high))
    spans.sort(key=lambda span: span.low)
    for one, other in pairwise(spans):
        if other.low < one.high:
            raise SpecError([f"--ranges: {one.name} and {other.name} overlap"])
    return spans


@dataclass(frozen=True)
class Request:
    """One answered request, alone in its batch. Times are in seconds.

    Attributes:
        arm: Way to answer; one of `ARMS`, or another name.
        range: Name of the `Span` its sounds are in.
        repeat: Number of the repeat, the seed of its rows and their order.
        row: Id of the row.
        sound_s: Duration of its sounds together.
        prompt_tokens: Tokens read before the first is decoded, sounds and block among them.
        forced_prefix: Those of the prompt that are the thinking block.
        decoded_tokens: Tokens decoded, the end among them.
        ttft_s: From the request to the first token.
        decode_s: From the first token to the last.
        prepare_s: Part of `ttft_s` that went into reading sound and text, where that is known.
        made: Whether the sound was made of other sounds, for want of a long one.
    """

    arm: str
    range: str
    repeat: int
    row: str
    sound_s: float
    prompt_tokens: int
    forced_prefix: int
    decoded_tokens: int
    ttft_s: float
    decode_s: float
    prepare_s: float | None = None
    made: bool = False

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s

    def line(self) -> str:
        """As a line of records.jsonl."""
        return json.dumps({**asdict(self), "total_s": self.total_s}, ensure_ascii=False) + "\n"


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("arm", "range", "row"), (str,)),
    **dict.fromkeys(("repeat", "prompt_tokens", "forced_prefix", "decoded_tokens"), (int,)),
    **dict.fromkeys(("sound_s", "ttft_s", "decode_s"), (int, float)),
}


def read_requests(path: Path) -> list[Request]:
    """Records of a records.jsonl, in their order.

    Raises:
        RunError: If it cannot be read, holds none, or a line is wrong; names the line and the key.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = from_json(line)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise RunError(f"{path}:{number}: is no record; a line is a JSON object")
        for key, types in _TYPES.items():
            value = data.get(key)
            wrong = not isinstance(value, types) or isinstance(value, bool)
            if wrong or (not isinstance(value, str) and not 0 <= value < math.inf):  # type: ignore[operator]
                raise RunError(f"{path}:{number}: {key} is {value!r}; see docs/analysis.md for what a record holds")
        prepare = data.get("prepare_s")
        if prepare is not None and (isinstance(prepare, bool) or not isinstance(prepare, int | float)):
            raise RunError(f"{path}:{number}: prepare_s is {prepare!r}; leave it out where it is not known")
        found.append(Request(**{k: data[k] for k in _TYPES}, prepare_s=prepare, made=data.get("made") is True))
    if not found:
        raise RunError(f"{path}: holds no record")
    return found


_MEASURES: dict[str, Callable[[Request], float | None]] = {
    "sound_s": lambda r: r.sound_s,
    "prompt_tokens": lambda r: r.prompt_tokens,
    "forced_prefix": lambda r: r.forced_prefix,
    "decoded_tokens": lambda r: r.decoded_tokens,
    "prepare_s": lambda r: r.prepare_s,
    "ttft_s": lambda r: r.ttft_s,
    "decode_s": lambda r: r.decode_s,
    "total_s": lambda r: r.total_s,
}


def aggregate(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """A cell for each range and arm, and for all ranges together where there are several.

    Each measure is averaged over the requests of a repeat; `mean` and `std` are those of these averages over repeats
    (the sample's standard deviation; null for one repeat). `to_vanilla` holds medians of the ratios to the vanilla
    arm's request for the same row in the same repeat, which shared noise hits alike.

    Returns:
        Ranges by their start, arms in the order they first come in.
    """
    arms = list(dict.fromkeys(r.arm for r in requests))
    ranges = sorted({r.range for r in requests}, key=_start)
    cells = []
    for name in [*ranges, ALL] if len(ranges) > 1 else ranges:
        for arm in arms:
            mine = [r for r in requests if r.arm == arm and name in (r.range, ALL)]
            if mine:
                cells.append({"range": name, "arm": arm, **_cell(mine), "to_vanilla": _ratios(mine, requests)})
    return cells


def _start(name: str) -> tuple[float, str]:
    try:
        return float(name.partition("-")[0]), name
    except ValueError:
        return math.inf, name


def _cell(mine: Sequence[Request]) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "requests": len(mine),
        "rows": len({r.row for r in mine}),
        "made": sum(r.made for r in mine),
    }
    repeats = sorted({r.repeat for r in mine})
    cell["repeats"] = len(repeats)
    for name, measure in _MEASURES.items():
        means = []
        for repeat in repeats:
            values = [value for r in mine if r.repeat == repeat and (value := measure(r)) is not None]
            means += [statistics.fmean(values)] if values else []
        cell[name] = {
            "mean": statistics.fmean(means) if means else None,
            "std": statistics.stdev(means) if len(means) > 1 else None,
        }
    return cell


def _ratios(mine: Sequence[Request], requests: Sequence[Request]) -> dict[str, float | None]:
    stock = {(r.range, r.repeat, r.row): r for r in requests if r.arm == "vanilla"}
    pairs = [(r, other) for r in mine if (other := stock.get((r.range, r.repeat, r.row))) is not None]
    found: dict[str, float | None] = {}
    for name in ("ttft_s", "total_s"):
        ratios = [getattr(a, name) / getattr(b, name) for a, b in pairs if getattr(b, name) > 0]
        found[name] = statistics.median(ratios) if ratios else None
    return found


def table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table in Markdown, columns aligned."""
    heads = ["sound (s)", "answered by", "requests", "prompt tokens", "forced prefix", "decoded tokens"]
    heads += ["TTFT (s)", "decode (s)", "total (s)", "TTFT / vanilla", "total / vanilla"]
    rows = [heads]
    for cell in cells:
        row = [str(cell["range"]), ARMS.get(str(cell["arm"]), str(cell["arm"])), str(cell["requests"])]
        row += [_spread(cell[name], 1) for name in ("prompt_tokens", "forced_prefix", "decoded_tokens")]
        row += [_spread(cell[name], 3) for name in ("ttft_s", "decode_s", "total_s")]
        ratios = (cell["to_vanilla"][name] for name in ("ttft_s", "total_s"))
        rows.append(row + ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = []
    for i, row in enumerate(rows):
        cells_ = [c.ljust(w) if j < 2 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells_) + " |")
        if i == 0:
            rule = ("-" * width if j < 2 else "-" * (width - 1) + ":" for j, width in enumerate(widths))
            lines.append("| " + " | ".join(rule) + " |")
    return lines


def _spread(value: Mapping[str, float | None], digits: int) -> str:
    mean, std = value["mean"], value["std"]
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def draw(cells: Sequence[Mapping[str, Any]]) -> Any:
    """One figure: a bar for each range and arm, the time to the first token below and decoding above.

    Raises:
        PluginError: If matplotlib is not installed.
    """
    shown = [cell for cell in cells if cell["range"] != ALL or len({c["range"] for c in cells}) == 1]
    ranges, arms = (list(dict.fromkeys(str(cell[key]) for cell in shown)) for key in ("range", "arm"))
    figure, axes = plots.figure(max(5.0, 1.6 * len(ranges) + 3), 3.6)
    axis, width = axes[0, 0], 0.8 / len(arms)
    for cell in shown:
        number = arms.index(str(cell["arm"]))
        color, first = plots.COLORS[number % len(plots.COLORS)], cell["range"] == ranges[0]
        at = ranges.index(str(cell["range"])) + (number - (len(arms) - 1) / 2) * width
        ttft, decode, std = cell["ttft_s"]["mean"], cell["decode_s"]["mean"], cell["total_s"]["std"]
        name = ARMS.get(arms[number], arms[number]) if first else None
        axis.bar(at, ttft, width * 0.92, color=color, label=name)
        axis.bar(at, decode, width * 0.92, bottom=ttft, yerr=std, color=color, alpha=0.4, capsize=2)
    axis.set_xticks(range(len(ranges)), [f"{name} s" for name in ranges])
    axis.set_xlabel("sound")
    axis.set_ylabel("seconds")
    axis.set_title("to the first token (solid), and decoding (pale)", fontsize=9)
    figure.legend(
        *axis.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=len(arms)
    )
    return figure


def report(folder: Path, requests: Sequence[Request], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json, latency.md and latency.png.

    Args:
        about: What the records were made with; `machine` and `notes`, a list of texts, are put under the table.

    Returns:
        What is in results.json: `about`, and the cells of `aggregate`.

    Raises:
        PluginError: If matplotlib is not installed.
        RunError: If the folder cannot be written.
    """
    cells = aggregate(requests)
    results = {**about, "cells": cells}
    notes = [*([f"Measured on {about['machine']}."] if about.get("machine") else []), *about.get("notes", ())]
    lines = [*table(cells), "", *LEGEND, *notes]
    picture = draw(cells)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "latency.md", "\n".join(lines) + "\n")
        plots.save(picture, folder / "latency.png")
        write_atomic(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return results


LEGEND = (
    "Mean ± standard deviation over repeats. TTFT: from the request to the first token, reading the sound among it;"
    " decode: from the first token to the last; ratios: median over the same rows.",
)


def record(path: Path, requests: Iterable[Request]) -> list[Request]:
    """Write requests down one by one, as they are made, so that a stop loses none.

    Raises:
        RunError: If the file cannot be written.
    """
    made = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for request in requests:
                file.write(request.line())
                file.flush()
                made.append(request)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    return made
