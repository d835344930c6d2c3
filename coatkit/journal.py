"""What a run writes down step by step: metrics, steps left out, loss spikes, bad rows. The first process writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from coatkit.checkpoint import Position
from coatkit.errors import DataError, RunError
from coatkit.files import without_links
from coatkit.run_folder import RunFolder
from coatkit.spec import Spec
from coatkit.spikes import Spikes


class Journal:
    """Appends lines to a run's records.

    Args:
        run: Where.
        spec: Its limits on bad rows and on steps left out.
        leads: Whether this process writes; the others count alike, so that all stop together.

    Attributes:
        bad_rows: Reasons of the rows set aside.
    """

    def __init__(self, run: RunFolder, spec: Spec, leads: bool) -> None:
        self.run, self.spec, self.leads = run, spec, leads
        self.bad_rows: set[str] = set()
        self.spikes = Spikes()

    def take_up(self) -> None:
        """Go on from what is written already."""
        self.bad_rows = self.run.quarantined()
        self.spikes.seen(self.run.read_metrics())

    def quarantine(self, step: int, reasons: list[str]) -> None:
        """Write bad rows down, each once however often it comes up.

        Raises:
            DataError: When there are more than the spec allows.
        """
        fresh = [reason for reason in dict.fromkeys(reasons) if reason not in self.bad_rows]
        for reason in fresh:
            self._append(self.run.quarantine, {"step": step, "reason": reason})
        self.bad_rows.update(fresh)
        limit = self.spec.data.max_bad_rows
        if fresh and len(self.bad_rows) > limit:
            raise DataError(
                f"{len(self.bad_rows)} bad rows are more than data.max_bad_rows: {limit}; they are listed in"
                f" {self.run.quarantine}. What was saved before is intact."
            )

    def skip(self, position: Position, rows: list[str], terms: dict[str, float], norm: float) -> None:
        """Count a step that gave NaN or Inf, or had no usable row, and write its rows down.

        Raises:
            RunError: When there are more than the spec allows.
        """
        position.skipped += 1
        said = {"step": position.step, "rows": rows, "terms": {k: str(v) for k, v in terms.items()}}
        self._append(self.run.skipped, {**said, "grad_norm": str(norm)})
        limit = self.spec.optimizer.max_skipped
        if position.skipped > limit:
            wrong = [name for name, value in terms.items() if not math.isfinite(value)]
            raise RunError(
                f"{position.skipped} steps gave NaN or Inf or no usable row, more than optimizer.max_skipped:"
                f" {limit}; their rows are listed in {self.run.skipped}.\n"
                f"  Not finite in the last: {', '.join(wrong) or 'the gradient, or no row was usable'}."
                " What was saved before is intact.\n"
                "  If it is one expert's term, look at what it encodes; else a lower learning rate may help a new run."
            )

    def log(
        self, position: Position, stage: str, numbers: dict[str, float], rows: list[str], board: SummaryWriter | None
    ) -> str | None:
        """One line of metrics, the same numbers for TensorBoard, and a line for a person when the loss is a spike."""
        if board is None:
            return None
        where: dict[str, Any] = {"step": position.step, "stage": stage, "stage_step": position.stage_step}
        # JSON has no NaN.
        self._append(self.run.metrics, where | {k: v if math.isfinite(v) else None for k, v in numbers.items()})
        for name, value in numbers.items():
            board.add_scalar(name.replace(".", "/"), value, position.step)
        loss = numbers.get("loss", math.nan)
        usual = self.spikes.look(stage, loss)
        if usual is None:
            return None
        self._append(self.run.spikes, {"step": position.step, "loss": loss, "median": usual, "rows": rows})
        return f"step {position.step}: loss {loss:.3f}, {usual:.3f} before; its rows are in {self.run.spikes.name}"

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        if self.leads:
            with open(file, "a", encoding="utf-8", opener=without_links) as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
