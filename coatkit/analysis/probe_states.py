"""The states that probes read: collected checkpoint by checkpoint, and kept, so that a stop loses one checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coatkit.errors import DataError, RunError
from coatkit.evaluation.cot import without_block
from coatkit.evaluation.items import Item, Task, batches, unhearable
from coatkit.files import file_sha256, written_beside
from coatkit.infer import AudioThinker, load
from coatkit.run_folder import RunFolder

THINKING, LAST = "thinking", "last"
KINDS = {THINKING: "mean thinking state", LAST: "pre-generation state"}


@dataclass(frozen=True)
class Source:
    """A model that states are taken from.

    Attributes:
        step: Of the checkpoint; 0 before training.
        vanilla: Before training, and without the thinking block.
    """

    step: int
    vanilla: bool = False

    @property
    def name(self) -> str:
        return "vanilla" if self.vanilla else f"step-{self.step:08d}"


def collect(
    run: Path,
    source: Source,
    tasks: Sequence[Task],
    folder: Path,
    *,
    batch: int,
    device: str | None,
    say: Callable[[str], None],
) -> dict[str, dict[str, np.ndarray]]:
    """States [N, d] of each task's rows by kind, in the order of its items; read from `folder` if they are there.

    Raises:
        DataError: If a sound cannot be read or heard.
        RunError: If the checkpoint cannot be loaded or the folder not be written.
    """
    key = _key(run, source, tasks)
    file = folder / f"{source.name}.safetensors"
    if (kept := _kept(file, key)) is None:
        say(f"{source.name}: {sum(len(task.items) for task in tasks)} rows")
        model = load(run, trained=source.step > 0, step=source.step or None, device=device)
        if source.vanilla:
            without_block(model)
        kept = {}
        for task in tasks:
            for kind, states in states_of(model, task.items, batch).items():
                kept[f"{task.spec.name}/{kind}"] = states
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with written_beside(file) as partial:
                save_file(kept, partial, metadata={"key": key})
        except (OSError, SafetensorError) as error:
            raise RunError(f"{file}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    found: dict[str, dict[str, np.ndarray]] = {task.spec.name: {} for task in tasks}
    for name, tensor in kept.items():
        task_name, _, kind = name.rpartition("/")
        found[task_name][kind] = tensor.numpy()
    return found


@torch.no_grad()
def states_of(model: AudioThinker, items: Sequence[Item], batch: int) -> dict[str, Tensor]:
    """States of rows, [N, d] float32: the mean over all their thinking positions, and the one the answer begins from.

    A kind that the model has not for any row is left out.

    Raises:
        DataError: If some rows have thinking positions and others do not.
    """
    place = {item.key: number for number, item in enumerate(items)}
    size = model.backbone.hidden_size
    thinking, last = torch.zeros(len(items), size), torch.zeros(len(items), size)
    positions, lasts = torch.zeros(len(items)), 0
    for part in batches(items, batch):
        inputs = model.prepare([item.row for item in part])
        out = model.backbone.forward(inputs)
        at = torch.tensor([place[item.key] for item in part])
        if out.thinking is not None:
            inside = inputs.think_mask.to(out.thinking.device)
            sums = (out.thinking.float() * inside[..., None]).sum(1).cpu()
            rows = at[inputs.audio_row.cpu()]
            thinking.index_add_(0, rows, sums)
            positions.index_add_(0, rows, inputs.think_lengths.float().cpu())
        if out.last is not None:
            last[at] = out.last.float().cpu()
            lasts += len(part)
    if (positions > 0).any() and not (positions > 0).all():
        silent = items[int((positions == 0).nonzero()[0])].row
        raise silent.fail("it has no sound to think about, where other rows of its task have; leave it out")
    found = {}
    if (positions > 0).any():
        found[THINKING] = thinking / positions[:, None]
    if lasts == len(items):
        found[LAST] = last
    if not found:
        raise DataError("the backbone gives no states: neither thinking positions nor one before the answer")
    return found


def hearable(run: Path, tasks: Sequence[Task], device: str | None) -> None:
    """Set aside the rows that the run's backbone cannot hear."""
    unhearable(tasks, load(run, trained=False, device=device).backbone.preparer)


def _key(run: Path, source: Source, tasks: Sequence[Task]) -> str:
    folder = RunFolder(run)
    learnt = folder.at(source.step) if source.step else None
    about = {
        "backbone": folder.read_record().get("backbone", {}).get("fingerprint"),
        "checkpoint": None if learnt is None else file_sha256(learnt / "model.safetensors"),
        "vanilla": source.vanilla,
        "rows": [[t.spec.name, t.sha256, [[i.index, i.row.id] for i in t.items]] for t in tasks],
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _kept(file: Path, key: str) -> dict[str, Tensor] | None:
    """What was collected before of the same model and rows; None where it was not, or is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            if (tensors.metadata() or {}).get("key") != key:
                return None
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
