"""The runs of an ablation: an arm with a seed each, what they are to be asked, and how far they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from coatkit.analysis.ablate_arms import Arm, controls_of
from coatkit.analysis.ablate_job import Ask, Ended, is_trained
from coatkit.analysis.ablate_study import Study
from coatkit.data.sources import open_data
from coatkit.errors import RunError
from coatkit.evaluation.items import Task
from coatkit.files import file_sha256
from coatkit.run_folder import RunFolder
from coatkit.spec_file import LoadedSpec

SAYS = {
    "untrained": "before training",
    "vanilla": "before training, without the block",
    "text-cot": "before training, without the block, asked to reason in words",
    "shuffled-audio": "sounds exchanged between the rows of a task",
}


@dataclass
class Run:
    """One arm with one seed, and how far it is.

    Attributes:
        ended: Its state, what it has been asked, and why it failed.
        sittings: Times it was begun or gone on with.
    """

    arm: Arm
    seed: int
    loaded: LoadedSpec
    asks: list[Ask]
    ended: Ended = field(default_factory=lambda: Ended("waiting"))
    minutes: float = 0.0
    sittings: int = 0

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed-{self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.loaded.output)

    def left(self) -> list[Ask]:
        """Evaluations that are not there, or were made of another suite."""
        return [ask for ask in self.asks if self.ended.asked.get(ask.arm, {}).get("key") != ask.key]

    def told(self) -> dict[str, Any]:
        """As results.json has it; steps and rows are those of the metrics."""
        step, rows = trained_so_far(self.folder)
        record = self.folder.read_record() if self.folder.record.exists() else {}
        asked = {
            arm: {**one, "folder": _under(one["folder"], self.loaded.output)} for arm, one in self.ended.asked.items()
        }
        return {
            "state": self.ended.state,
            **({"reason": self.ended.reason} if self.ended.reason else {}),
            "step": step,
            "steps": self.arm.spec.total_steps,
            "rows": rows,
            "data": sorted(data["sha256"] for data in record.get("data", {}).values()),
            "random_weights": record.get("random_weights", []),
            "train_minutes": round(self.minutes, 2),
            "sittings": self.sittings,
            "asked": asked,
        }


def controls_made_of(study: Study, arms: Sequence[Arm], arm: Arm) -> dict[str, dict[str, Any]]:
    """Controls that are made of an arm's runs, by the name they have in the table."""
    if arm.name not in controls_of(study, arms):
        return {}
    return {
        f"{control} of {arm.name}": {
            "control": control,
            "of": arm.name,
            "trained": control == "shuffled-audio",
            "says": f"{arm.name}: {SAYS[control]}",
        }
        for control in study.spec.controls
    }


def runs_of(study: Study, arms: Sequence[Arm], tasks: Sequence[Task], before: dict[str, Any]) -> list[Run]:
    """All runs, seed by seed, so that a table over all arms is there early."""
    digest = hashlib.sha256()
    for task in tasks:
        rows = [item.index for item in task.items]
        asked = task.spec.model_dump_json(exclude={"data": {"path"}})  # rows are told by their digest
        digest.update(repr((asked, task.sha256, rows, study.spec.batch)).encode())
    runs = []
    for seed in study.spec.seeds:
        for arm in arms:
            key = digest.hexdigest()[:16]
            asks = [Ask(arm.name, key)]
            for name, control in controls_made_of(study, arms, arm).items():
                most = study.spec.max_thought_tokens if control["control"] == "text-cot" else None
                asks.append(
                    Ask(
                        name,
                        key if most is None else f"{key}-{most}",
                        trained=control["trained"],
                        block=control["control"] not in ("vanilla", "text-cot"),
                        cot=most,
                        shuffle=seed if control["control"] == "shuffled-audio" else None,
                    )
                )
            run = Run(arm, seed, arm.runs[seed], asks)
            _remember(run, before.get("runs", {}).get(run.name, {}))
            runs.append(run)
    return runs


def _remember(run: Run, told: dict[str, Any]) -> None:
    """Take up what an earlier sitting said of a run, as far as it is still there."""
    for arm, one in told.get("asked", {}).items():
        folder = run.loaded.output / one["folder"]
        if (folder / "results.json").exists():
            run.ended.asked[arm] = {"key": one["key"], "folder": str(folder)}
    run.minutes, run.sittings = told.get("train_minutes", 0.0), told.get("sittings", 0)
    if is_trained(run.loaded.output, len(run.loaded.spec.stages)) and not run.left():
        run.ended.state = "done"
    elif run.folder.record.exists():
        run.ended.state = "stopped"
    if told.get("state") == "failed" and run.ended.state != "done":
        run.ended.state, run.ended.reason = "failed", told.get("reason", "")


def refuse_changed(runs: Sequence[Run]) -> None:
    """A run is taken up only if it was made from the same spec, data and files of the user's own; a project that was
    moved with its runs is followed.

    Raises:
        RunError: Naming every run that was not, and what differs.
    """
    from coatkit.recovery import follow  # needs torch, which is not loaded to print a plan

    digests: dict[str, tuple[str, str]] = {}
    problems = []
    for run in runs:
        if not run.folder.record.exists():
            continue
        follow(run.folder, run.loaded.folder)
        spec, record = run.loaded.spec, run.folder.read_record()
        data = {}
        for stage in spec.stages:
            source = run.loaded.rows_of(stage)
            key = source.model_dump_json()
            if key not in digests:
                rows = open_data(source, on_bad_row=spec.data.on_bad_row, max_bad_rows=spec.data.max_bad_rows)
                digests[key] = str(rows.path), rows.fingerprint()
            path, digest = digests[key]
            data[path] = {**record.get("data", {}).get(path, {}), "sha256": digest}
        components = {place: dict(entry) for place, entry in record.get("components", {}).items()}
        for place, chosen in run.loaded.chosen.items():
            if place in components and (file := chosen.component.source_file()) is not None:
                components[place]["sha256"] = file_sha256(file)
        try:
            run.folder.check_same(run.loaded.resolved(), {**record, "data": data, "components": components})
        except RunError as error:
            problems.append(str(error).splitlines()[0])
    if problems:
        raise RunError(
            "\n".join(problems)
            + "\n  Change it back, give the arm another name, remove the run's folder, or begin anew with --out FOLDER."
        )


def trained_so_far(folder: RunFolder) -> tuple[int, int]:
    """Steps of a run so far and rows taken in them, by its metrics."""
    try:
        stat = folder.metrics.stat()
    except FileNotFoundError:
        return 0, 0
    return _counted(folder.metrics, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _counted(path: Path, size: int, changed: int) -> tuple[int, int]:
    # Read again only when it has grown: each change of one run writes what is known of all.
    whole, _, _ = path.read_bytes().rpartition(b"\n")  # a last line may be cut off
    steps = [json.loads(line) for line in whole.split(b"\n")] if whole else []
    return (steps[-1]["step"] if steps else 0), sum(step["rows"] for step in steps)


def _under(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder)
