"""Checkpoints: a folder of safetensors and JSON, written beside and renamed, so that a half-written one never counts.

`model.safetensors` holds what learns (adapters, token rows, projector, heads), `optimizer.safetensors` the moments and
random state, `state.json` where training stands.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coatkit.errors import RunError, other_format
from coatkit.files import from_json, let_read, read_text, sync
from coatkit.sharding import fill, like, whole
from coatkit.zero import Moments, ZeroOptimizer

FORMAT = 2
_INTACT = "Earlier checkpoints are intact. Make room if it is full, and continue with --resume."


@dataclass
class Position:
    """Where training stands: `step` optimizer steps done in all, `stage_step` of them in stage number `stage`."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    skipped: int = 0


def learned(model: nn.Module, names: frozenset[str], *, keep: bool = True) -> dict[str, Tensor]:
    """Tensors a checkpoint holds, whole and on the CPU: parameters that learn, and everything in the heads.

    To be called by all processes; those that do not `keep` take part and get nothing.
    """
    return _gathered(_kept(model, names), keep)


def gathered(moments: Moments, *, keep: bool = True) -> Moments:
    """Optimizer state, whole and on the CPU, by the same rules as `learned`."""
    found = {name: _gathered(state, keep) for name, state in moments.items()}
    return found if keep else {}


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        # One at a time: no device, and no process but the one that writes, ever holds two whole tensors.
        complete = whole(tensor.detach())
        if keep:
            found[name] = complete.cpu()
        del complete
    return found


def _kept(model: nn.Module, names: frozenset[str]) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: v for k, v in state.items() if k in names or k.startswith("heads.")}


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    moments: Moments,
    random: Sequence[Mapping[str, Tensor]],
    position: Position,
    keep: int,
) -> Path:
    """Write `folder`/step-NNNNNNNN and remove all but the newest `keep`.

    Args:
        tensors: What `learned` gave.
        moments: What `gathered` gave.
        random: What `random_state` gave in each process.
    """
    final = folder / f"step-{position.step:08d}"
    if (final / "state.json").is_file():  # the same step of the same run: already safe
        return final
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / "model.safetensors")
        flat = {
            f"{name}|{key}": t.detach().cpu().contiguous() for name, kept in moments.items() for key, t in kept.items()
        }
        flat |= {f"random|{rank}.{key}": t for rank, states in enumerate(random) for key, t in states.items()}
        save_file(flat, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(position)}, indent=1) + "\n")
        let_read(partial, partial / "state.json")
        for file in (*partial.iterdir(), partial):
            sync(file)
        if final.exists():  # one that somebody damaged
            _remove(final)
        os.replace(partial, final)
        sync(folder)
        for old in complete(folder)[:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{final}: cannot be written: {error}\n  {_INTACT}") from None
    return final


def _remove(path: Path) -> None:
    """Under another name first: no checkpoint is ever half there."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def load_position(checkpoint: Path) -> Position:
    """Where a checkpoint stands.

    Raises:
        RunError: If it was written by another format of coatkit or is damaged.
    """
    try:
        state = from_json(read_text(checkpoint / "state.json"))
        written = state.pop("format")
        if written != FORMAT:
            raise RunError(f"{checkpoint}: {other_format(written, FORMAT)}")
        position = Position(**state)
        if not all(type(value) is int and 0 <= value < 1 << 53 for value in asdict(position).values()):
            raise ValueError("it holds what is no number of steps")
        return position
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{checkpoint}/state.json: damaged: {error}") from None


def load_model(checkpoint: Path, model: nn.Module, names: frozenset[str], ignore: str = "\0") -> None:
    """Put a checkpoint's tensors into the model, leaving aside those whose names begin with `ignore`.

    Raises:
        RunError: If a tensor is missing, left over, or of another shape; nothing is loaded then.
    """
    saved = {k: v for k, v in _read(checkpoint / "model.safetensors").items() if not k.startswith(ignore)}
    wanted = _kept(model, names)
    problems = [f"missing {k}" for k in wanted if k not in saved]
    problems += [f"unexpected {k}" for k in saved if k not in wanted]
    problems += [
        f"{k} is {tuple(saved[k].shape)}, the model's is {tuple(wanted[k].shape)}"
        for k in wanted
        if k in saved and saved[k].shape != wanted[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RunError(f"{checkpoint}: does not fit this model: {shown}")
    with torch.no_grad():
        for key, tensor in wanted.items():
            fill(tensor, saved[key])


def load_moments(checkpoint: Path) -> tuple[Moments, list[dict[str, Tensor]]]:
    """Optimizer state by parameter name, and the random states of each process the run had.

    Raises:
        RunError: If the file cannot be read, or a state is not whole.
    """
    moments: Moments = {}
    random: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _read(checkpoint / "optimizer.safetensors").items():
        name, _, part = key.rpartition("|")
        if name == "random":
            rank, _, device = part.partition(".")
            if not (rank.isascii() and rank.isdigit() and len(rank) < 10):
                raise RunError(f"{checkpoint}: damaged: its random states have no process {rank!r:.40}")
            random.setdefault(int(rank), {})[device] = tensor
        else:
            moments.setdefault(name, {})[part] = tensor
    for name, state in moments.items():
        first, second = state.get("exp_avg"), state.get("exp_avg_sq")
        if first is None or second is None or "step" not in state or first.shape != second.shape:
            raise RunError(f"{checkpoint}: damaged: the optimizer state of {name!r:.80} is not whole")
    return moments, [random[rank] for rank in sorted(random)]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random states that this process draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_random(random: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's random state as it was.

    Raises:
        RunError: If it is no random state.
    """
    try:
        torch.set_rng_state(random["cpu"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunError(f"the checkpoint's random state is damaged: {str(error)[:120]}") from None
    if device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():  # safetensors would wait for a pipe
        raise RunError(f"{path}: cannot be read: there is no such file")
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def optimizer_moments(
    optimizer: torch.optim.Optimizer | ZeroOptimizer, named: Mapping[str, nn.Parameter], *, keep: bool = True
) -> Moments:
    """An optimizer's state by parameter name: its own tensors, shards where the parameters are sharded.

    DeepSpeed's is gathered by all, for those that `keep`.
    """
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.moments(keep=keep)
    found: Moments = {}
    for name, parameter in named.items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        if state:
            found[name] = {k: torch.as_tensor(v) for k, v in state.items()}
    return found


def set_moments(
    optimizer: torch.optim.Optimizer | ZeroOptimizer, named: Mapping[str, nn.Parameter], moments: Moments
) -> None:
    """Hand state over to an optimizer, by parameter name: what it takes is taken out of `moments`.

    The step counter stays where the optimizer keeps it, on the CPU.
    """
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.set_moments(moments)
        return
    for name, parameter in named.items():
        if name in moments:
            optimizer.state[parameter] = _fitted(moments.pop(name), parameter)


def rest_moments(parameters: Iterable[tuple[str, nn.Parameter]], moments: Moments) -> None:
    """Keep of each sharded parameter's state this process's part alone, for those that do not learn for now."""
    for name, parameter in parameters:
        if name in moments and isinstance(parameter, DTensor):
            moments[name] = _fitted(moments[name], parameter)


def _fitted(state: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    if wrong := [k for k, v in state.items() if k != "step" and v.shape != parameter.shape]:
        raise RunError(
            f"the checkpoint's optimizer state is damaged: {wrong[0]:.40} has another shape than its parameter"
        )
    return {k: v.clone() if k == "step" else like(parameter, v).clone() for k, v in state.items()}
