"""Loss weights by a calibration pass: each expert's loss in units of what predicting its mean would cost.

Experts' losses differ by orders of magnitude: features of unit variance beside pitch maps that are nearly always
silent. With `calibrate` in a spec, the rows of the first steps are heard once before training, and every expert's loss
is divided by the loss of the best constant prediction, the mean of its targets over the thinking positions. For a mean
squared error that is the targets' variance; an expert with a loss of its own (PANNs' classifier, basic-pitch's) is
measured by that loss. A weight of 1 then means the same for all: a loss of 1 knows no more than the mean. This is ours,
not the paper's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from coatkit.data.batches import BatchPlan
from coatkit.data.rows import Rows
from coatkit.data.scan import Scan
from coatkit.data.steps import Batch, StepDataset
from coatkit.errors import DataError, RunError
from coatkit.model import CoatModel
from coatkit.precision import exact_float32
from coatkit.spec_file import LoadedSpec
from coatkit.store import Store


def calibrated(
    loaded: LoadedSpec,
    model: CoatModel,
    sources: Mapping[str, tuple[Rows, Scan]],
    stores: Mapping[str, Store],
    known: Mapping[str, float],
    gather: Callable[[dict[str, float]], list[dict[str, float]]],
) -> LoadedSpec:
    """A spec whose `calibrate.losses` names every expert; what it, or `known`, does not say is measured.

    Each expert is measured on the rows of the first steps of the first stage in which it teaches.

    Args:
        model: As training starts, whole.
        sources: Rows of the stages, by the text of what the spec says of them.
        stores: Feature stores by expert, and `tower`.
        known: What was measured when the run began; empty for a new one.
        gather: To all processes: all measure the same, and the first one's numbers are taken.

    Raises:
        RunError: As `measure`.
        DataError: If a row is bad and is to be refused.
    """
    spec = loaded.spec
    assert spec.calibrate is not None
    losses = dict(spec.calibrate.losses or known)
    for index, stage in enumerate(spec.stages):
        names = [name for name in stage.active if name not in losses]
        if names:
            losses |= measure(model, _first(loaded, index, model, sources, stores, names), names)
    losses = gather(losses)[0]
    ordered = {name: losses[name] for name in spec.experts}
    calibrate = spec.calibrate.model_copy(update={"losses": ordered})
    return dataclasses.replace(loaded, spec=spec.model_copy(update={"calibrate": calibrate}))


def _first(
    loaded: LoadedSpec,
    index: int,
    model: CoatModel,
    sources: Mapping[str, tuple[Rows, Scan]],
    stores: Mapping[str, Store],
    names: list[str],
) -> Iterator[Batch]:
    """Batches of a stage's first steps, with `calibrate.rows` rows in all or as many as it has."""
    spec = loaded.spec
    stage = spec.stages[index]
    rows, found = sources[loaded.rows_of(stage).model_dump_json()]
    plan = BatchPlan(found.costs[found.good], stage.batch, (spec.seed, index))
    used = {name: store for name, store in stores.items() if name in names or name == "tower"}
    rates = {model.experts[name].sample_rate for name in names if name not in used}
    dataset = StepDataset(rows, found.good, plan, model.backbone.preparer, rates, spec.data, 0, 1, used)
    assert spec.calibrate is not None
    taken = 0
    for number in range(stage.steps):
        step = dataset[number]
        if step.error:
            raise DataError(step.error)
        yield from (batch for batch in step.batches if batch is not None)
        taken += len(step.row_ids)
        if taken >= spec.calibrate.rows:
            return


@torch.no_grad()
def measure(model: CoatModel, batches: Iterable[Batch], names: Iterable[str]) -> dict[str, float]:
    """The loss of predicting the mean, by expert.

    The random state is put back. Targets of all batches are held on the CPU: 4 bytes x positions x dim of an expert.

    Args:
        model: As training starts.
        batches: Prepared, with the sounds or stored features of the experts.
        names: Experts to measure.

    Raises:
        RunError: If no batch has sound, or an expert's targets do not vary over them or are not finite.
    """
    names = list(names)
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    was = model.training
    model.eval()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for batch in batches:
            for name, target in model.targets(batch, names).items():
                kept[name].append((target.cpu(), batch.inputs.think_mask))
    model.train(was)
    return {name: _loss_of_the_mean(model, name, found) for name, found in kept.items()}


def _loss_of_the_mean(model: CoatModel, name: str, found: list[tuple[Tensor, Tensor]]) -> float:
    if not found:
        raise RunError("calibrate: none of the rows has sound; raise calibrate.rows, or leave calibrate out")
    count = sum(int(mask.sum()) for _, mask in found)
    mean = sum(target[mask].double().sum(0) for target, mask in found) / count
    device = next(model.parameters()).device
    total = 0.0
    for target, mask in found:
        constant = torch.as_tensor(mean, dtype=target.dtype).expand_as(target)
        with exact_float32(device):
            terms = model.experts[name].loss(constant.to(device), target.to(device), mask.to(device))
        total += sum(float(value) for value in terms.values()) * int(mask.sum())
    loss = total / count
    if not math.isfinite(loss) or loss < 1e-12:
        raise RunError(
            f"calibrate: predicting the mean of {name!r} costs {loss:g} over {count} thinking positions, so its loss"
            " cannot be scaled by that: its targets do not vary, or are not finite. Raise calibrate.rows, look at what"
            " the expert encodes, or leave calibrate out"
        )
    return loss
