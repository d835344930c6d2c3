"""What a person sees while training: a bar with rate and time left, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY = 15.0
"""Seconds between lines when the output is no terminal."""


class TrainingProgress:
    """Shows steps of all stages; used as a context manager.

    Args:
        total: Optimizer steps of the whole run.
        done: Steps already done, when resuming.
        quiet: Show nothing (devices other than the first).
    """

    def __init__(self, total: int, done: int, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.total, self.begun_at = total, done
        self._started = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("", total=total, completed=done, rate="", loss="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, stage: str, losses: Mapping[str, float]) -> None:
        """One optimizer step is done."""
        now = time.monotonic()
        rate = (step - self.begun_at) / max(now - self._started, 1e-9)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        speed = f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/step"
        self._bar.update(self._task, completed=step, description=stage, rate=speed, loss=shown)
        if not self.console.is_terminal and (now - self._said > _LINE_EVERY or step == self.total):
            self._said = now
            minutes = (self.total - step) / max(rate, 1e-9) / 60
            self.say(f"{stage}: step {step}/{self.total}, {speed}, {minutes:.1f} min left   {shown}")
