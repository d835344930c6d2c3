"""`coatkit train --debug-nan`: make the last step that gave NaN or Inf again, and say where it begins.

Nothing is written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coatkit import checkpoint
from coatkit.build import build
from coatkit.calibrate import calibrated
from coatkit.checkpoint import Position
from coatkit.data.steps import Batch, Step
from coatkit.errors import CoatkitError, RunError
from coatkit.features import open_stores
from coatkit.files import from_json, read_text
from coatkit.model import CoatModel, whose
from coatkit.optimization import Stop
from coatkit.parallel import Team
from coatkit.run_folder import RunFolder
from coatkit.spec import Spec
from coatkit.spec_file import LoadedSpec
from coatkit.thinking import answer_tokens
from coatkit.trainer import Session, let_learn, read_data, steps_of

_SHOWN = 5


def replay(loaded: LoadedSpec) -> list[str]:
    """What was found, line by line: the step and its rows, the weights it was made with, and what is not finite.

    The step is made with the weights of the newest checkpoint before it. Where that is of the step right before, random
    numbers are as they were too; else a line says how many steps lie between: what was not finite may be so no more.

    Raises:
        RunError: If there is no run, no step of it was left out, or the step's rows are not what they were.
    """
    run = RunFolder(loaded.output)
    run.read_record()
    step, recorded = _last_skipped(run)
    team = Team()
    if team.size > 1:
        raise RunError("--debug-nan: looks with one process at the rows of all; start it without a launcher")
    model = build(loaded, str(team.device))
    stores, sources = open_stores(loaded, model), read_data(loaded, model, team)
    if loaded.spec.calibrate:
        loaded = calibrated(loaded, model, sources, stores, run.calibrated(), team.gather)
    session = Session(loaded, team, model, run, sources, Stop(), stores, _position(loaded.spec, step))
    stage = loaded.spec.stages[session.position.stage]
    lines = [f"step {step} (stage {stage.name!r}, its step {session.position.stage_step + 1}): {_few(recorded)}"]
    lines.append(_take_weights(session, step))
    let_learn(session, stage)
    share: Step = next(iter(steps_of(session, stage)))
    if sorted(share.row_ids) != sorted(recorded):
        raise RunError(
            f"step {step} was made of rows {_few(recorded)}, and would now be of {_few(share.row_ids)};"
            " use the data and the spec the run was made with"
        )
    model.train()
    found = [f"weights: {name}: {said}" for name, p in model.named_parameters() if (said := not_finite(p))]
    weights = loaded.spec.weights_of(stage)
    for batch in share.batches:
        if batch is not None:
            found += _look(model, batch, stage.active, weights)
    if not found:
        found = [
            "all is finite here: sounds, targets, states, losses and gradients.",
            "So it came from where the weights stood then: a lower learning rate, or checkpoint.every: 1 and another"
            " --debug-nan after it happens again, which then has the very weights.",
        ]
    return [*lines, *found]


def not_finite(tensor: Tensor | None) -> str:
    """How much of a tensor is NaN or infinite, in words; empty where nothing is."""
    if tensor is None or not tensor.is_floating_point() or not tensor.numel():
        return ""
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if not nan and not infinite:
        return ""
    parts = [f"{count:,} {word}" for count, word in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel():,} values"


def _last_skipped(run: RunFolder) -> tuple[int, list[str]]:
    """Step and rows of the last step that was left out for its numbers."""
    try:
        lines = [from_json(line) for line in read_text(run.skipped).splitlines()]
        told = [(int(line["step"]), [str(row) for row in line["rows"]]) for line in lines if line["rows"]]
    except FileNotFoundError:
        told = []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{run.skipped}: cannot be read: {error}") from None
    if not told:
        raise RunError(f"{run.path}: no step of this run gave NaN or Inf, so there is nothing to look at")
    return told[-1]


def _position(spec: Spec, step: int) -> Position:
    """Where training stood before a step."""
    before = 0
    for number, stage in enumerate(spec.stages):
        if step <= before + stage.steps:
            return Position(stage=number, stage_step=step - before - 1, step=step - 1)
        before += stage.steps
    raise RunError(f"skipped.jsonl names step {step}, and the spec has {before}; use the spec the run was made with")


def _take_weights(session: Session, step: int) -> str:
    """Put the newest checkpoint before a step in; says which."""
    found = [c for c in checkpoint.complete(session.run.checkpoints) if checkpoint.step_of(c) < step]
    if not found:
        torch.manual_seed(session.loaded.spec.seed)
        return f"weights: as at the start; {step - 1} steps of learning lie between" if step > 1 else "weights: as then"
    checkpoint.load_model(found[-1], session.model, session.names)
    at = checkpoint.step_of(found[-1])
    if at == step - 1:
        _, random = checkpoint.load_moments(found[-1])
        if random:
            checkpoint.restore_random(random[0], session.team.device)
        return f"weights: as then, of {found[-1].name}"
    return f"weights: of {found[-1].name}; {step - 1 - at} steps of learning lie between, so it may be finite now"


def _look(model: CoatModel, batch: Batch, active: Any, weights: Any) -> list[str]:
    """What is not finite in one batch, in the order it is computed."""
    found: list[str] = []
    for name, tensor in batch.inputs.tokens.items():
        if said := not_finite(tensor):
            found.append(f"input {name}: {said}")
    with _watched(model, batch, found):
        try:
            losses = model(batch, active)
        except CoatkitError as error:
            return [*found, f"the pass ends with an error: {error}"]
    answers, thinking = answer_tokens(batch.inputs.labels), int(batch.inputs.think_lengths.sum())
    means = losses.means(answers, thinking)
    for term, value in means.items():
        shown = f"{float(value.detach()):.6g}"
        said = not_finite(value.detach())
        found += [f"loss {term}: {shown}"] if said else []
        if not said and value.requires_grad:
            found += _backward(model, term, weights[whose(term)] * value)
    return found


def _backward(model: CoatModel, term: str, loss: Tensor) -> list[str]:
    """Parameters whose gradient from one loss is not finite."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    wrong = [(n, said) for (n, _), g in zip(named, gradients, strict=True) if (said := not_finite(g))]
    if not wrong:
        return []
    operation = ""
    try:
        with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that forward ran without it
            torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if match := re.search(r"Function '(\w+)'", str(error)):
            operation = f"; the first operation on the way back that gives NaN is {match[1]}"
    name, said = wrong[-1]  # nearest to the loss
    return [f"gradient of {term}: not finite in {len(wrong)} parameters, {name} among them: {said}{operation}"]


@contextmanager
def _watched(model: CoatModel, batch: Batch, found: list[str]) -> Iterator[None]:
    """Note targets, and the first module, that are not finite."""
    handles = []
    seen: list[str] = []

    def after(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if seen:
            return
        for tensor in _tensors(output):
            if said := not_finite(tensor):
                came = any(not_finite(one) for one in _tensors(given))
                seen.append(name)
                how = "what goes in is not finite already" if came else "what goes in is finite"
                found.append(f"module {name} ({type(module).__name__}): {said}; {how}")
                return

    for name, module in model.named_modules():
        if name:
            handles.append(
                module.register_forward_hook(lambda m, given, output, name=name: after(name, m, given, output))
            )
    target = model.target

    def checked(name: str, *given: Any) -> Tensor:
        values = target(name, *given)
        if said := not_finite(values):
            rows = batch.inputs.audio_row.tolist()
            wrong = [batch.inputs.row_ids[rows[i]] for i, one in enumerate(values) if not_finite(one)]
            found.append(f"expert {name!r}: its target is not finite for rows {_few(dict.fromkeys(wrong))}: {said}")
        return values

    model.target = checked  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model.target
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for one in value.values() for t in _tensors(one))
    elif isinstance(value, list | tuple):
        yield from (t for one in value for t in _tensors(one))


def _few(rows: Any) -> str:
    names = list(rows)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
