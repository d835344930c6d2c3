"""The one training loop: every stage of a spec, on accelerate, resumable to the bit on CPU.

Read `train` top to bottom: build, then for each stage make an optimizer over what learns in it, then for each step
prepare, forward, backward, clip, step, log, and save now and then.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from coatkit import checkpoint
from coatkit.build import build
from coatkit.checkpoint import Position
from coatkit.data.batches import BatchPlan
from coatkit.data.rows import Message, Row, Rows
from coatkit.data.scan import Scan, scan
from coatkit.data.sources import open_data
from coatkit.data.steps import Batch, Step, StepDataset, load_batch
from coatkit.errors import CoatkitError, DataError, RunError
from coatkit.features import open_stores
from coatkit.gradients import look
from coatkit.model import CoatModel, whose
from coatkit.optimization import Stop, group_parameters, leave_signals_to_parent, schedule
from coatkit.parallel import Learner, Team, summed
from coatkit.progress import TrainingProgress
from coatkit.run_folder import RunFolder
from coatkit.run_record import describe, opening_lines
from coatkit.spec import StageSpec
from coatkit.spec_data import SourceSpec
from coatkit.spec_file import LoadedSpec, load_spec
from coatkit.store import Store
from coatkit.thinking import answer_tokens
from coatkit.zero import Moments


@dataclass
class Result:
    """How training ended: the run folder, where it stands, and whether all stages are done."""

    folder: Path
    position: Position
    finished: bool


@dataclass
class Session:
    """What the loop carries from step to step."""

    loaded: LoadedSpec
    team: Team
    model: CoatModel
    run: RunFolder
    sources: dict[str, tuple[Rows, Scan]]
    stop: Stop
    stores: dict[str, Store] = field(default_factory=dict)
    position: Position = field(default_factory=Position)
    moments: Moments = field(default_factory=dict)  # of what no optimizer holds now; shards where parameters are
    bad_rows: set[str] = field(default_factory=set)
    filler: Batch | None = None

    def __post_init__(self) -> None:
        if self.team.shards:
            row = Row("filler", (Message("user", "a"), Message("assistant", "b")), ())
            preparer = self.model.backbone.preparer
            self.filler = load_batch([row], preparer, (), self.loaded.spec.data.max_seconds, train=True)
        # Named before stages switch heads off, so that every checkpoint holds everything that ever learns.
        self.names = frozenset(n for n, p in self.model.named_parameters() if p.requires_grad)


def train(loaded: LoadedSpec, *, resume: bool = False) -> Result:
    """Train all stages of a spec, or continue where its run folder stands.

    Raises:
        RunError: If the folder holds another run, or too many steps gave NaN or Inf.
        DataError: If rows are bad; names them.
    """
    spec = loaded.spec
    run = RunFolder(loaded.output)
    team = Team()
    if not resume:
        team.once(run.refuse_if_taken)
    torch.manual_seed(spec.seed + team.rank)  # each process drops out its own
    if spec.gradients_every and (team.shards or team.zero_stage):
        raise RunError("gradients_every: losses cannot be told apart where parameters are sharded; set it to 0")
    model = build(loaded, str(team.device))
    for stage in spec.stages:  # what a later stage cannot do is found before training
        group_parameters(model, stage, spec.optimizer.weight_decay)
        if stage.batch.pack and model.backbone.cannot_pack:
            raise RunError(
                f"stage {stage.name!r}: batch.pack: rows of {spec.backbone.use} cannot be packed:"
                f" {model.backbone.cannot_pack}; leave it out"
            )
    stores = open_stores(loaded, model)
    sources = _read_data(loaded, model, team)
    record = describe(loaded, model, sources)
    with Stop() as stop, _deterministic(team.device):
        session = Session(loaded, team, model, run, sources, stop, stores)
        # One looks for all: another might look when the first has begun to write.
        if team.gather(resume and run.record.exists())[0]:
            team.once(lambda: run.check_same(loaded.resolved(), record, _as_now(run)))
            _restore(session)
        else:
            team.once(lambda: run.start(loaded.resolved(), record))
            _quarantine(session, [reason for _, found in sources.values() for _, reason in found.bad])
        begun = session.position.step
        with (
            SummaryWriter(str(run.path / "tensorboard"), purge_step=begun) if team.leads else nullcontext() as board,
            TrainingProgress(spec.total_steps, begun, quiet=not team.leads) as progress,
        ):
            for line in opening_lines(loaded, record, begun):
                progress.say(line)
            # Asked of all: a signal that lands between two stages would part them otherwise.
            while session.position.stage < len(spec.stages) and not any(team.gather(stop.asked)):
                _train_stage(session, board, progress)
        team.part()
        return Result(run.path, session.position, session.position.stage == len(spec.stages))


def _as_now(run: RunFolder) -> dict[str, Any] | None:
    """A run's spec with defaults for the keys that specs have gained since; None where it cannot be read any more."""
    try:
        return load_spec(run.spec, need="components").resolved()
    except CoatkitError:
        return None


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU, add in a fixed order, so that resuming is exact to the bit; an expert's exotic operation only warns."""
    before = torch.are_deterministic_algorithms_enabled()
    warning = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warning)


def _train_stage(session: Session, board: SummaryWriter | None, progress: TrainingProgress) -> None:
    """The rest of the stage the session stands in."""
    spec, position, model, team = session.loaded.spec, session.position, session.model, session.team
    stage = spec.stages[position.stage]
    for name, head in model.heads.items():
        head.requires_grad_(name in stage.active or team.shards)  # a sharded model keeps what it was sharded with
    wrapped = team.spread(model, model.backbone.units())
    groups, named = group_parameters(model, stage, spec.optimizer.weight_decay)
    fused = team.device.type == "cuda"  # one kernel for all that learns
    adamw = torch.optim.AdamW(groups, betas=spec.optimizer.betas, eps=spec.optimizer.eps, fused=fused)
    wrapped, optimizer = team.divide(wrapped, adamw, named, spec.optimizer.clip_norm)
    checkpoint.set_moments(optimizer, named, session.moments)
    checkpoint.rest_moments(model.named_parameters(), session.moments)
    model.train()
    started = time.perf_counter()
    for share in _steps(session, stage):
        step = _agree(session, share)
        shape = schedule(stage, position.stage_step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * shape
        _look(session, step, stage)
        sums = _accumulate(session, wrapped, optimizer, step, stage)
        terms, norm = _fetch(session, stage, sums, team.clip(optimizer, named.values(), spec.optimizer.clip_norm))
        healthy = bool(terms) and math.isfinite(norm) and all(math.isfinite(v) for v in terms.values())
        if healthy:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        position.step += 1
        position.stage_step += 1
        numbers = {
            **terms,
            "grad_norm": norm,
            "lr": stage.lr["default"] * shape,
            "rows": len(step.row_ids),
            "epoch": share.epoch,
        }
        _log(session, board, stage, {**numbers, "seconds": time.perf_counter() - started})
        started = time.perf_counter()  # so that a step's time holds the wait for its rows, and saving after the last
        progress.step(position.step, stage.name, terms)
        if not healthy:
            _skip(session, step, terms, norm)
        stopping = any(team.gather(session.stop.asked))
        last = position.stage_step == stage.steps
        if last or stopping or position.stage_step % spec.checkpoint.every == 0:
            moments = session.moments | checkpoint.optimizer_moments(optimizer, named, keep=team.leads)
            if last:
                position.stage, position.stage_step = position.stage + 1, 0
                session.moments = moments = {} if spec.optimizer.between_stages == "reset" else moments
            _save(session, moments)
            if last and team.zero_stage and (newest := session.run.latest()):
                session.moments, _ = checkpoint.load_moments(newest)  # only the process that wrote them has them
        if stopping:
            session.stop.asked = True
            break
    team.release(optimizer)


@dataclass(frozen=True)
class TeamStep:
    """One optimizer step, as every process knows it: its own batches, everyone's rows, and what the sums run over."""

    batches: list[Batch | None]
    row_ids: list[str]
    answers: int
    thinking: int


def _agree(session: Session, share: Step) -> TeamStep:
    """Tell every process what each holds of a step; bad rows are set aside and counted.

    Raises:
        DataError: In every process, if a row of any is bad and is to be refused.
    """
    batches = [batch for batch in share.batches if batch is not None]
    answers = sum(answer_tokens(b.inputs.labels) for b in batches)
    thinking = sum(int(b.inputs.think_lengths.sum()) for b in batches)
    shares = session.team.gather((share.error, share.bad, share.row_ids, answers, thinking))
    errors, bad, row_ids, all_answers, all_thinking = zip(*shares, strict=True)
    if error := next(filter(None, errors), None):
        raise DataError(error)
    _quarantine(session, [reason for reasons in bad for reason in reasons])
    return TeamStep(share.batches, [i for ids in row_ids for i in ids], sum(all_answers), sum(all_thinking))


def _accumulate(
    session: Session, wrapped: nn.Module, optimizer: Learner, step: TeamStep, stage: StageSpec
) -> dict[str, Tensor]:
    """Forward and backward of one step's batches; gives this process's part of every loss term, on the device.

    Each term is divided by its count over all batches and processes, so splitting a step changes memory, not the loss.
    """
    team = session.team
    if not step.row_ids:
        return {}
    weights = stage.loss_weights
    terms: dict[str, Tensor] = {}
    for i, batch in enumerate(step.batches):
        last = i == len(step.batches) - 1
        with team.accumulating(wrapped, last):
            losses = wrapped(batch or session.filler, stage.active if batch else (), together=team.together)
            if batch is None:  # nothing of the filler counts, but its layers were called, as other processes expect
                losses.nothing, losses.sums = losses.nothing + 0.0 * losses.sums.pop("ce", 0.0), {}
            means = losses.means(step.answers, step.thinking)
            loss = losses.nothing + sum(weights[whose(k)] * v for k, v in means.items())
            if loss.requires_grad:  # rows of text alone teach nothing where only projector and heads learn
                # Gradients are averaged over processes, and the counts already run over all of them.
                team.backward(loss * team.size, optimizer, last=last)
        for name, value in means.items():
            terms[name] = terms.get(name, 0) + value.detach().float()
    return terms


def _look(session: Session, step: TeamStep, stage: StageSpec) -> None:
    """Now and then, write down each loss's own gradient on what all share; on the first process's first rows."""
    every, position = session.loaded.spec.gradients_every, session.position
    batch = next((b for b in step.batches if b is not None), None)
    if not every or position.step % every or not session.team.leads or batch is None:
        return
    seen = look(session.model, batch, stage.active, stage.loss_weights)
    with session.run.gradients.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": position.step + 1, "stage": stage.name, **seen}, ensure_ascii=False) + "\n")


def _fetch(
    session: Session, stage: StageSpec, parts: dict[str, Tensor], norm: Tensor
) -> tuple[dict[str, float], float]:
    """Every loss term over all processes, their weighted sum as `loss`, and the gradient's norm, as numbers.

    This is the one place of a step where the host waits for the device, once for all of them.
    """
    *values, length = torch.stack([*parts.values(), norm.detach().to(session.team.device, torch.float32)]).tolist()
    shares = session.team.gather(dict(zip(parts, values, strict=True)))
    if not any(shares):
        return {}, length
    found, weights = summed(shares), stage.loss_weights
    return {**found, "loss": sum(weights[whose(name)] * value for name, value in found.items())}, length


def _steps(session: Session, stage: StageSpec) -> Iterable[Step]:
    """This process's share of the stage's remaining steps, prepared."""
    spec, position = session.loaded.spec, session.position
    rows, found = session.sources[session.loaded.rows_of(stage).model_dump_json()]
    plan = BatchPlan(found.costs[found.good], stage.batch, (spec.seed, position.stage))
    stores = {name: store for name, store in session.stores.items() if name in stage.active or name == "tower"}
    rates = {session.model.experts[name].sample_rate for name in stage.active if name not in stores}
    dataset = StepDataset(
        rows,
        found.good,
        plan,
        session.model.backbone.preparer,
        rates,
        spec.data,
        session.team.rank,
        session.team.size,
        stores,
    )
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(position.stage_step, stage.steps),
        num_workers=spec.data.workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # its own, so that making a loader draws nothing from the training's
        pin_memory=session.team.device.type == "cuda",
    )


def _read_data(loaded: LoadedSpec, model: CoatModel, team: Team) -> dict[str, tuple[Rows, Scan]]:
    """Open and check everything the stages draw from, by what the spec says of it; each process looks at its share."""
    spec, preparer = loaded.spec, model.backbone.preparer
    ratio = 0.0 if spec.thinking is None else spec.thinking.tokens_per_audio_token
    sources: dict[str, tuple[Rows, Scan]] = {}
    for data in map(loaded.rows_of, spec.stages):
        key = data.model_dump_json()
        if key not in sources:
            rows = open_data(data, on_bad_row=spec.data.on_bad_row, max_bad_rows=spec.data.max_bad_rows)
            keep = data.filter if isinstance(data, SourceSpec) else None  # a mixture is filtered when it is drawn
            share = (team.rank, team.size)
            sources[key] = (rows, scan(rows, preparer, spec.data, ratio, keep=keep, share=share, gather=team.gather))
    return sources


def _quarantine(session: Session, reasons: list[str]) -> None:
    """Write bad rows down, each once however often it comes up, and stop when there are more than the spec allows."""
    fresh = [reason for reason in dict.fromkeys(reasons) if reason not in session.bad_rows]
    if not fresh:
        return
    if session.team.leads:
        with session.run.quarantine.open("a", encoding="utf-8") as stream:
            for reason in fresh:
                stream.write(json.dumps({"step": session.position.step, "reason": reason}, ensure_ascii=False) + "\n")
    session.bad_rows.update(fresh)
    limit = session.loaded.spec.data.max_bad_rows
    if len(session.bad_rows) > limit:
        raise DataError(
            f"{len(session.bad_rows)} bad rows are more than data.max_bad_rows: {limit}; they are listed in"
            f" {session.run.quarantine}. What was saved before is intact."
        )


def _skip(session: Session, step: TeamStep, terms: dict[str, float], norm: float) -> None:
    """Count a step that gave NaN or Inf, or had no usable row, and write its rows down."""
    session.position.skipped += 1
    line = {"step": session.position.step, "rows": step.row_ids, "terms": {k: str(v) for k, v in terms.items()}}
    if session.team.leads:
        with session.run.skipped.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**line, "grad_norm": str(norm)}) + "\n")
    limit = session.loaded.spec.optimizer.max_skipped
    if session.position.skipped > limit:
        wrong = [name for name, value in terms.items() if not math.isfinite(value)]
        raise RunError(
            f"{session.position.skipped} steps gave NaN or Inf or no usable row, more than optimizer.max_skipped:"
            f" {limit}; their rows are listed in {session.run.skipped}.\n"
            f"  Not finite in the last: {', '.join(wrong) or 'the gradient, or no row was usable'}."
            " What was saved before is intact.\n"
            "  If it is one expert's term, look at what it encodes; else a lower learning rate may help a new run."
        )


def _log(session: Session, board: SummaryWriter | None, stage: StageSpec, numbers: dict[str, float]) -> None:
    """One line of metrics, and the same numbers for TensorBoard; from the first process."""
    if board is None:
        return
    position = session.position
    where: dict[str, Any] = {"step": position.step, "stage": stage.name, "stage_step": position.stage_step}
    finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # JSON has no NaN
    with session.run.metrics.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**where, **finite}) + "\n")
    for name, value in numbers.items():
        board.add_scalar(name.replace(".", "/"), value, position.step)


def _save(session: Session, moments: Moments) -> None:
    """A checkpoint of everything that learns and of where training stands; all gather it, the first process writes."""
    team, spec = session.team, session.loaded.spec
    tensors = checkpoint.learned(session.model, session.names, keep=team.leads)
    whole_moments = checkpoint.gathered(moments, keep=team.leads)
    random = team.gather(checkpoint.random_state(team.device))

    def write() -> None:
        folder, keep = session.run.checkpoints, spec.checkpoint.keep
        checkpoint.save(folder, tensors, whole_moments, random, session.position, keep)

    team.once(write)


def _restore(session: Session) -> None:
    """Go back to the newest checkpoint; without one the run begins again."""
    team, newest = session.team, session.run.latest()
    if newest is not None:
        session.position = checkpoint.load_position(newest)
        checkpoint.load_model(newest, session.model, session.names)
        session.moments, random = checkpoint.load_moments(newest)
        if team.rank < len(random):
            checkpoint.restore_random(random[team.rank], team.device)
        else:  # more processes than the run had: rows and their order stay, dropout is drawn anew
            torch.manual_seed(session.loaded.spec.seed + team.rank + 1000 * session.position.step)
    team.once(lambda: session.run.cut_after(session.position.step))
    session.bad_rows = session.run.quarantined()
