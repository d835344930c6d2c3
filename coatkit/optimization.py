"""What the loop needs around the optimizer: parameter groups, the learning-rate schedule, and stopping on a signal."""

from __future__ import annotations

import math
import signal
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from coatkit.errors import RunError
from coatkit.model import CoatModel
from coatkit.recovery import SIGNALS
from coatkit.spec import StageSpec


def group_parameters(
    model: CoatModel, stage: StageSpec, weight_decay: float
) -> tuple[list[dict[str, Any]], dict[str, nn.Parameter]]:
    """AdamW groups of what learns in a stage, each with its `peak` rate, and the same parameters by name.

    A part's rate is `lr[part]`, for heads `lr[heads.NAME]` or `lr[heads]`, else `lr[default]`. Vectors (biases,
    norms) get no weight decay. A part whose rate is 0 rests: it is in no group.

    Raises:
        RunError: If `lr` names a part that nothing trainable belongs to, or nothing learns.
    """
    parts = {
        part: parameters
        for part, parameters in model.parts().items()
        if not part.startswith("heads.") or part.removeprefix("heads.") in stage.active
    }
    known = {"default", "heads", "tokens", *model.parts()}  # without the block or experts, the control has fewer
    if unknown := sorted(set(stage.lr) - known):
        raise RunError(
            f"stage {stage.name!r}: lr names {', '.join(unknown)}, but what learns is: {', '.join(sorted(known))}"
        )
    groups: list[dict[str, Any]] = []
    for part, parameters in parts.items():
        rate = stage.lr.get(part, stage.lr.get(part.partition(".")[0], stage.lr["default"]))
        for decay, chosen in (
            (weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen and rate:
                groups.append({"params": chosen, "peak": rate, "lr": rate, "weight_decay": decay})
    if not groups:
        raise RunError(f"stage {stage.name!r}: nothing learns; check backbone.train, the stage's weights and its lr")
    members = {id(p) for group in groups for p in group["params"]}
    return groups, {name: p for name, p in model.named_parameters() if id(p) in members}


def schedule(stage: StageSpec, step: int) -> float:
    """Factor on the peak rate at step `step` (from 0) of a stage: a linear rise, then constant, or down to 0."""
    if step < stage.warmup_steps:
        return (step + 1) / (stage.warmup_steps + 1)
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    if stage.schedule == "linear":
        return 1 - done
    if stage.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


class Stop:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into a wish to stop after this step; a second SIGINT stops at once.

    Slurm sends SIGUSR1 ahead of a job's end where a job asks for it (`--signal`), and SIGTERM when it is pre-empted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, as in some notebooks: the caller keeps its own handling
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
