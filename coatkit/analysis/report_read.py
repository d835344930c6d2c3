"""What a report is made of, read from run folders; what is damaged is told and left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatkit.files import from_json, read_text
from coatkit.run_folder import RunFolder

_PICTURES = 12
"""Pictures of views that are taken from one run: a page of every sound would be too heavy to open."""
_LARGEST = 8 << 20
"""Bytes of the largest picture that is taken."""


@dataclass
class Told:
    """One run.

    Attributes:
        name: Tells it from the others of the report.
        spec: The resolved spec, as key to value, e.g. `stages.0.lr.default`.
        record: What is in run.json.
        metrics: One for each step.
        gradients: One for each look at the losses' own gradients.
        evaluations: Name of the folder to what is in its results.json.
        pictures: (title, PNG, text beside it) of probes, latency and views.
        notes: What could not be read, and what else a reader must know.
    """

    name: str
    spec: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: list[tuple[str, bytes, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0


def read_run(path: Path, name: str) -> Told:
    """A run's folder.

    Raises:
        RunError: If it is none.
    """
    folder = RunFolder(path)
    told = Told(name, dict(_flat(folder.read_spec())), folder.read_record())
    told.metrics = _lines(folder.metrics, told.notes)
    looks = _lines(folder.gradients, told.notes)
    told.gradients = [look for look in looks if all(isinstance(look.get(k, {}), dict) for k in ("norms", "cosines"))]
    if len(told.gradients) < len(looks):
        told.notes.append(f"{folder.gradients.name}: {len(looks) - len(told.gradients)} looks hold none; left out")
    skipped, bad = _lines(folder.skipped, told.notes), folder.quarantined()
    if skipped:
        told.notes.append(f"{len(skipped)} steps were skipped: they gave NaN or Inf, or had no usable row")
    if bad:
        told.notes.append(f"{len(bad)} bad rows were set aside")
    for file in sorted(path.glob("eval/*/results.json")):
        found = _read(file, told.notes)
        tasks = found.get("tasks")
        if isinstance(tasks, dict) and all(isinstance(task, dict) for task in tasks.values()):
            told.evaluations[file.parent.name] = found
        elif found:
            told.notes.append(f"{file.parent.name}/{file.name} holds no scores and is left out")
    real = path.resolve()
    for file in _pictures(path):
        try:
            beside = sorted(file.parent.glob("*.md"))[:1]
            # A run of somebody else's: a page that is passed on shows nothing of this machine.
            if not all(shown.resolve().is_relative_to(real) for shown in (file, *beside)):
                told.notes.append(f"{file.relative_to(path)}: a link leads out of the run; it is not shown")
                continue
            size = file.stat().st_size
            if size > _LARGEST:
                told.notes.append(f"{file.relative_to(path)}: {size >> 20} MB; it is not shown")
                continue
            words = read_text(beside[0], "replace")[:20_000] if beside else ""
            told.pictures.append((str(file.relative_to(path).with_suffix("")), file.read_bytes(), words))
        except OSError as error:
            told.notes.append(f"{file.relative_to(path)}: {error.strerror}")
    return told


def _pictures(path: Path) -> list[Path]:
    those = [*sorted(path.glob("probe/**/*.png")), *sorted(path.glob("latency/*.png"))]
    return those + sorted(path.glob("view/*/*.png"))[:_PICTURES]


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from _flat(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


def _read(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = _whole(read_text(file))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        notes.append(f"{file.parent.name}/{file.name} cannot be read and is left out: {error}")
        return {}


def _whole(text: str) -> Any:
    """JSON, with `?` for half a surrogate pair: JSON may hold one, no page and no font can."""
    found = from_json(text)
    return json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace")) if "\\u" in text else found


def _lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Objects of a file of lines that have a step; a last line that was cut off is no damage."""
    if not file.exists():
        return []
    try:
        lines = read_text(file, "replace").split("\n")
    except OSError as error:
        notes.append(f"{file.name} cannot be read and is left out: {error.strerror}")
        return []
    found, bad = [], 0
    for line in lines:
        try:
            one = _whole(line)
        except ValueError:
            bad += bool(line)
            continue
        if isinstance(one, dict) and isinstance(one.get("step"), int | float) and abs(one["step"]) < 1 << 53:
            found.append(one)
    if bad:
        notes.append(f"{file.name}: {bad} lines cannot be read and are left out")
    return found
