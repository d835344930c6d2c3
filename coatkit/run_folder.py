"""A run folder: everything a run depends on and everything that came out of it.

spec.yaml         the resolved spec         metrics.jsonl     one line per step
run.json          versions and digests      quarantine.jsonl  rows that were set aside
checkpoints/      see coatkit.checkpoint    skipped.jsonl     steps that gave NaN or Inf
tensorboard/      the curves                gradients.jsonl   each loss's own gradient, where asked for
                                            spikes.jsonl      steps whose loss stood out
"""

from __future__ import annotations

import json
import math
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from coatkit import __version__, checkpoint
from coatkit.errors import RunError, SpecError, other_format
from coatkit.files import from_json, read_text, write_atomic
from coatkit.spec_reader import SpecReader

FORMAT = 1
_FREE_TO_CHANGE = ("output", "checkpoint", "data.workers", "data.heldout", "gradients_every")
"""Keys that may differ on resume: they change no number."""


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.gradients = path / "gradients.jsonl"
        self.spikes = path / "spikes.jsonl"
        self.spec = path / "spec.yaml"
        self.record = path / "run.json"

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoint.complete(self.checkpoints)
        return found[-1] if found else None

    def at(self, step: int | None) -> Path | None:
        """The complete checkpoint of a step; the newest when None, and None if there is none yet.

        Raises:
            RunError: If that step has none; lists those there are.
        """
        if step is None:
            return self.latest()
        steps = {checkpoint.step_of(path): path for path in checkpoint.complete(self.checkpoints)}
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise RunError(f"{self.path}: has no checkpoint of step {step}; there: {there}")
        return steps[step]

    def learnt(self, step: int | None = None) -> Path:
        """As `at`, for what needs one.

        Raises:
            RunError: If there is none yet, or not that one.
        """
        found = self.at(step)
        if found is None:
            raise RunError(f"{self.path}: has no checkpoint yet; train it with: coatkit train SPEC --resume")
        return found

    def refuse_if_taken(self) -> None:
        """Never write over a run.

        Raises:
            RunError: If a run is here already.
        """
        if self.record.exists() or self.latest() is not None:
            raise RunError(
                f"{self.path}: holds a run already.\n  Continue it with --resume, name another folder with"
                " --set output=..., or delete this one"
            )

    def start(self, spec: dict[str, Any], record: dict[str, Any]) -> None:
        """Begin a run here.

        Raises:
            RunError: If the folder cannot be written.
        """
        self.refuse_if_taken()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(self.spec, yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
            self.write_record(record)
        except OSError as error:
            remedy = "Mend that, or name another folder with --set output=..."
            raise RunError(f"{self.path}: cannot be written: {error.strerror or error}.\n  {remedy}") from None

    def check_same(self, spec: dict[str, Any], record: dict[str, Any], before: dict[str, Any] | None = None) -> None:
        """Check that a run here was made from the same spec, data and experts.

        Args:
            before: The run's spec with what specs have gained since filled in; as it was written when left out.

        Raises:
            RunError: Naming what differs.
        """
        before, then = before or self.read_spec(), self.read_record()
        changed = [key for key in _differences(before, spec) if not key.startswith(_FREE_TO_CHANGE)]
        for key in ("backbone", "experts", "data"):
            changed += [f"{key}.{k}" for k in _differences(then.get(key, {}), record.get(key, {}))]
        for place, component in record.get("components", {}).items():  # a user's own files
            if component.get("sha256") != then.get("components", {}).get(place, {}).get("sha256"):
                changed.append(f"the code of {place}")
        if changed:
            raise RunError(
                f"{self.path}: this run was made from something else; changed since: {', '.join(changed[:8])}.\n"
                "  Change it back, or start a new run: with --set output=..., or after deleting this one"
            )

    def read_spec(self) -> dict[str, Any]:
        """The run's spec as plain data.

        Raises:
            RunError: If it cannot be read, or is none: a stranger may have written it.
        """
        try:
            return SpecReader(self.spec).read()
        except SpecError as error:
            raise RunError(f"{self.path}: is not a run folder, or its spec is damaged:\n  {error}") from None

    def calibrated(self) -> dict[str, float]:
        """What `calibrate` measured when the run began; empty where it was not asked for."""
        return dict((self.read_spec().get("calibrate") or {}).get("losses") or {})

    def read_record(self) -> dict[str, Any]:
        try:
            data: dict[str, Any] = from_json(read_text(self.record))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.path}: is not a run folder: it has no {self.record.name}") from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path}: is not a run folder: {self.record.name}: {error}") from None
        if not isinstance(data, dict):
            raise RunError(f"{self.record}: damaged: it holds no keys")
        if data.get("format") != FORMAT:
            raise RunError(f"{self.record}: {other_format(data.get('format'), FORMAT)}")
        if not isinstance(data.get("random_weights", []), list):
            raise RunError(f"{self.record}: damaged: random_weights is no list")
        if damaged := _not_mappings(data):
            raise RunError(f"{self.record}: damaged: {damaged} holds no keys")
        return data

    def write_record(self, record: dict[str, Any]) -> None:
        write_atomic(self.record, json.dumps({"format": FORMAT, **record}, indent=1, ensure_ascii=False) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop what was written of steps after `step`, which will be made again, and lines cut off by a crash.

        A quarantined row stays written down whenever it was found: it is counted once.
        """
        by_step = dict.fromkeys((self.metrics, self.skipped, self.gradients, self.spikes), float(step))
        for file, last in {**by_step, self.quarantine: math.inf}.items():
            if file.exists():
                write_atomic(file, "".join(f"{line}\n" for line in _lines(file) if _step_of(line) <= last))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics."""
        return [_parsed(line) for line in _lines(self.metrics)] if self.metrics.exists() else []

    def quarantined(self) -> set[str]:
        """Reasons of the rows set aside so far."""
        if not self.quarantine.exists():
            return set()
        return {str(reason) for line in _lines(self.quarantine) if (reason := _parsed(line).get("reason"))}


def _not_mappings(record: dict[str, Any]) -> str:
    """The first part of a record that is to hold keys and does not; empty when all do."""
    for key in ("components", "experts", "data", "backbone", "environment"):
        group = record.get(key, {})
        if not isinstance(group, dict):
            return key
        for name, entry in group.items() if key in ("components", "experts", "data") else ():
            if not isinstance(entry, dict):
                return f"{key}.{name:.80}"
    return ""


def _lines(file: Path) -> list[str]:
    # Not splitlines(): a reason may hold characters that it takes for line ends.
    return read_text(file, "replace").split("\n")


def _step_of(line: str) -> float:
    step = _parsed(line).get("step")
    return float(step) if isinstance(step, int | float) else math.nan  # NaN is after every step


def _parsed(line: str) -> dict[str, Any]:
    """A line of JSON; empty when a crash cut it off."""
    try:
        data = from_json(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def environment() -> dict[str, Any]:
    """Versions and machine a run was made with."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "soundfile", "soxr", "pydantic")
    return {
        "coatkit": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: version(name) for name in names},
    }


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{at}.{k}" if at else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(a, b, f"{at}.{i}")]
    return [] if old == new else [at]
