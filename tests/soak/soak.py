"""A long small run: `python tests/soak/soak.py [--steps N] [--write docs/reliability.md] [--plant KIND]`.

What leaks, leaks by step, by checkpoint, by epoch or by stage, and not by the second: so many of those are made. Memory
and open files are read as training goes; every row must come once in every epoch, and what the feature store gives must
be the same every time and what the expert computes. `--plant` breaks one of these on purpose: the check must find it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch


def _tests() -> Any:
    """tests/conftest.py, by its file: with tests/ on the path, tests/vllm would be found for the package vllm."""
    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("coatkit_tests_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


Project = _tests().Project
KB_PER_STEP = 2.0
"""Bound on the growth of memory in the second half, by a straight line through it."""
ROWS, BATCH, EVERY = 20, 5, 50
PLANTS = ("memory", "files", "rows", "store")


@dataclass
class Watch:
    """What was seen of a run as it went; holds counts only, so that it does not grow itself.

    Attributes:
        steps, memory, files: By sample: steps done, resident kB, open files.
        epochs: Whole passes over the rows, in all stages.
        uneven: Passes in which a row came twice or not at all.
        stored: Digest of each sound's stored features, as the first step read them.
        changed: Reads of the store that gave something else later.
        reads: All of them.
    """

    every: int
    steps: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    epochs: int = 0
    uneven: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)
    changed: int = 0
    reads: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def sample(self, step: int) -> None:
        if step % self.every == 0:
            self.steps.append(step)
            self.memory.append(resident())
            self.files.append(len(os.listdir("/proc/self/fd")))

    def take(self, step: Any) -> None:
        """A step's rows and features, as the trainer gets them."""
        self.seen.update(step.row_ids)
        if sum(self.seen.values()) >= ROWS:
            self.epochs += 1
            self.uneven += len(self.seen) != ROWS or set(self.seen.values()) != {1}
            self.seen.clear()
        for batch in step.batches:
            names = [name for name in batch.inputs.row_ids if name.startswith("r")]  # those with a sound
            for name, values, length in zip(names, batch.stored["level"], batch.inputs.think_lengths, strict=True):
                digest = hashlib.sha256(values[: int(length)].numpy().tobytes()).digest()
                self.changed += self.stored.setdefault(name, digest) != digest
                self.reads += 1

    def slope(self) -> float:
        """Growth of memory over the second half, in kB a step."""
        half = len(self.steps) // 2
        return float(np.polyfit(self.steps[half:], self.memory[half:], 1)[0])

    def more_files(self) -> int:
        """Open files at the end above those at a quarter of the run; the least of a quarter, for some come and go."""
        quarter = max(1, len(self.files) // 4)
        return min(self.files[-quarter:]) - min(self.files[quarter : 2 * quarter])

    def problems(self, steps: int, *, memory: bool = True) -> list[str]:
        """What is wrong, in words; `memory` is looked at in runs that are long enough for a line through it."""
        found = []
        if memory and self.slope() > KB_PER_STEP:
            found.append(f"memory grows by {self.slope():.2f} kB a step; {KB_PER_STEP:g} are allowed")
        if self.more_files() > 0:
            found.append(f"{self.more_files()} more files are open at the end")
        if self.uneven or self.epochs != steps * BATCH // ROWS:
            found.append(f"{self.uneven} of {self.epochs} epochs have a row twice or not at all")
        if self.changed or self.reads != self.epochs * 16:
            found.append(f"{self.changed} of {self.reads} reads of the feature store gave something else than before")
        return found


def resident() -> float:
    """Resident memory of this process, in kB."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def project_in(folder: Path, steps: int) -> Any:
    """Two stages of a small model, with dropout, checkpoints, and an expert in the feature store."""
    project = Project(folder)
    project.spec["backbone"]["lora"]["dropout"] = 0.1
    project.spec["cache"] = {"names": ["level"], "dtype": "float32", "folder": "features"}
    project.spec["checkpoint"] = {"every": EVERY, "keep": 2}
    for stage in project.spec["stages"]:
        stage.update(steps=steps // 2, batch={"rows": BATCH}, weights={"audio": 1.0, "level": 1.0})
    return project


def compute(project: Any, *overrides: str) -> dict[str, torch.Tensor]:
    """Compute the features of all sounds into the store; by key."""
    from coatkit.extract import Extraction
    from coatkit.store import Store

    with Extraction(project.load(*overrides), ["level"], "float32", None, "cpu") as extraction:
        report = extraction.run(extraction.wanted[0], lambda steps, count: steps)
    store = Store(report.folder)
    return {key: store.frames(key) for key in sorted(store.keys())}


def planted(kind: str | None, stack: ExitStack) -> None:
    """Break something, to see that it is found."""
    from coatkit import trainer
    from coatkit.data.batches import BatchPlan
    from coatkit.store import Store

    kept: list[Any] = []
    shown, plan, frames = trainer.TrainingProgress.step, BatchPlan._plan, Store.frames

    def step(self: Any, number: int, *rest: Any) -> None:
        if kind == "memory":
            kept.append(np.ones(2048))  # 16 kB, all of it touched
        elif kind == "files" and number % 10 == 0:
            kept.append(os.open(os.devnull, os.O_RDONLY))
        shown(self, number, *rest)

    def other_plan(self: Any, epoch: int) -> Any:
        made = plan(self, epoch)
        if kind == "rows" and epoch == 2:
            made[0] = made[1].copy()
        return made

    def other_frames(self: Any, key: str) -> Any:
        kept.append(None) if kind == "store" and len(kept) < 40 else None
        return frames(self, key) + (len(kept) == 40) if kind == "store" else frames(self, key)

    stack.callback(lambda: [os.close(one) for one in kept if isinstance(one, int)])
    stack.enter_context(mock.patch.object(trainer.TrainingProgress, "step", step))
    stack.enter_context(mock.patch.object(BatchPlan, "_plan", other_plan))
    stack.enter_context(mock.patch.object(Store, "frames", other_frames))


def soak(folder: Path, steps: int, plant: str | None = None) -> tuple[Watch, list[str]]:
    """Train for `steps`, watched; what was seen, and what is wrong."""
    from coatkit import trainer
    from coatkit.data.steps import StepDataset

    project, watch = project_in(folder / "project", steps), Watch(max(1, steps // 200))
    before = compute(project)
    with ExitStack() as stack:
        if plant:
            planted(plant, stack)
        get, shown = StepDataset.__getitem__, trainer.TrainingProgress.step

        def taken(self: Any, number: int) -> Any:
            step = get(self, number)
            assert not step.error, step.error
            watch.take(step)
            return step

        def sampled(self: Any, number: int, *rest: Any) -> None:
            shown(self, number, *rest)
            watch.sample(number)

        stack.enter_context(mock.patch.object(StepDataset, "__getitem__", taken))
        stack.enter_context(mock.patch.object(trainer.TrainingProgress, "step", sampled))
        run = project.train()
    found = watch.problems(steps, memory=steps >= 1000)
    after = compute(project, "cache.folder=again")  # the same sounds, computed anew
    if before.keys() != after.keys() or not all(torch.equal(before[key], after[key]) for key in before):
        found.append("the feature store does not hold what the expert computes")
    # Training that computes the expert has the losses of training that read it.
    short = project.train("cache=[]", "output=computed", *(f"stages.{i}.steps=8" for i in range(2)))
    for ours, theirs in zip(run.metrics[:8], short.metrics[:8], strict=True):
        if not np.isclose(ours["level.mse"], theirs["level.mse"], rtol=1e-5, atol=1e-9):
            read, anew = ours["level.mse"], theirs["level.mse"]
            found.append(f"step {ours['step']}: level.mse is {read} where features are read, {anew} where computed")
    if len(run.metrics) != steps or len(run.checkpoints) != 2:
        found.append(f"{len(run.metrics)} steps and {len(run.checkpoints)} checkpoints are there")
    return watch, found


def lines_of(watch: Watch, steps: int, seconds: float) -> list[str]:
    """The figures, as a table for the page."""
    half = len(watch.memory) // 2
    return [
        "| | |",
        "|---|---|",
        f"| steps, epochs, checkpoints | {steps:,}, {watch.epochs:,}, {steps // EVERY:,} |",
        f"| minutes it took here | {seconds / 60:.0f} |",
        f"| memory at half and at the end | {watch.memory[half] / 1024:.1f} MB, {watch.memory[-1] / 1024:.1f} MB |",
        f"| growth over the second half, by a straight line | {watch.slope():.3f} kB a step; bound {KB_PER_STEP:g} |",
        f"| open files, at a quarter and at the end | {min(watch.files[len(watch.files) // 4 :])}, {watch.files[-1]} |",
        f"| epochs with a row twice or not at all | {watch.uneven} |",
        f"| reads of the store, and those that gave something else | {watch.reads:,}, {watch.changed} |",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="a multiple of 8; 4000 are a bit over two hours' worth")
    parser.add_argument("--plant", choices=PLANTS, help="break something, to see that it is found")
    parser.add_argument("--write", type=Path, help="page whose table between <!-- soak --> marks is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coatkit-soak-") as folder:
        os.environ["COATKIT_CACHE"] = f"{folder}/cache"
        watch, found = soak(Path(folder), options.steps, options.plant)
    lines = lines_of(watch, options.steps, time.monotonic() - began)
    print("\n".join([*lines, *(f"WRONG: {problem}" for problem in found)]))
    if options.write and not found and not options.plant:
        text = options.write.read_text(encoding="utf-8")
        head, mark, rest = text.partition("<!-- soak -->\n")
        if "<!-- /soak -->" not in rest:
            parser.error(f"{options.write}: has no <!-- soak --> and <!-- /soak -->")
        tail = rest[rest.index("<!-- /soak -->") :]
        options.write.write_text(head + mark + "\n".join(lines) + "\n" + tail, encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
