"""The one training loop: every stage of a spec, on accelerate, resumable to the bit on CPU.

Read `train` top to bottom: build, then for each stage make an optimizer over what learns in it, then for each step
prepare, forward, backward, clip, step, log, and save now and then.
"""

from __future__ import annotations

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
from coatkit.calibrate import calibrated
from coatkit.checkpoint import Position
from coatkit.data.batches import BatchPlan
from coatkit.data.rows import Message, Row, Rows
from coatkit.data.scan import Scan, scan
from coatkit.data.sources import open_data
from coatkit.data.steps import Batch, Step, StepDataset, load_batch
from coatkit.errors import CoatkitError, DataError, RunError
from coatkit.features import open_stores
from coatkit.gradients import look_into, refuse_sharded
from coatkit.journal import Journal
from coatkit.model import CoatModel, whose
from coatkit.optimization import Stop, group_parameters, schedule
from coatkit.parallel import Learner, Team, summed
from coatkit.progress import TrainingProgress
from coatkit.recovery import Hold, follow, newest_sound, start_worker
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
    said: list[str] = field(default_factory=list)  # for a person, before the bar starts
    filler: Batch | None = None

    def __post_init__(self) -> None:
        self.journal = Journal(self.run, self.loaded.spec, self.team.leads)
        if self.team.shards:
            row = Row("filler", (Message("user", "a"), Message("assistant", "b")), ())
            preparer = self.model.backbone.preparer
            self.filler = load_batch([row], preparer, (), self.loaded.spec.data.max_seconds, train=True)
        # Named before stages switch heads off, so that every checkpoint holds everything that ever learns.
        self.names = frozenset(n for n, p in self.model.named_parameters() if p.requires_grad)


def train(loaded: LoadedSpec, *, resume: bool = False) -> Result:
    """Train all stages of a spec, or continue where its run folder stands.

    Raises:
        RunError: If the folder holds another run or is held by another process, too many steps gave NaN or Inf, or the
            machine refused something; what was saved before is intact.
        DataError: If rows are bad; names them.
    """
    with Hold(loaded.output) as hold:
        return _train(loaded, resume, hold)


def _train(loaded: LoadedSpec, resume: bool, hold: Hold) -> Result:
    spec = loaded.spec
    run = RunFolder(loaded.output)
    team = Team()
    if not resume:
        team.once(run.refuse_if_taken)
    team.once(lambda: hold.take() if run.path.exists() else None)  # before minutes of loading
    torch.manual_seed(spec.seed + team.rank)  # each process drops out its own
    if team.shards or team.zero_stage:
        refuse_sharded(spec)
    model = build(loaded, str(team.device))
    check_stages(loaded, model)
    stores = open_stores(loaded, model)
    sources = read_data(loaded, model, team)
    if spec.calibrate:
        known = run.calibrated() if resume and run.record.exists() else {}
        loaded = calibrated(loaded, model, sources, stores, known, team.gather)
    team.once(hold.take)
    record = describe(loaded, model, sources)
    with Stop() as stop, _deterministic(team.device):
        session = Session(loaded, team, model, run, sources, stop, stores)
        # One looks for all: another might look when the first has begun to write.
        if team.gather(resume and run.record.exists())[0]:
            team.once(lambda: _check_same(session, record))
            _restore(session)
        else:
            team.once(lambda: run.start(loaded.resolved(), record))
            session.journal.quarantine(0, [reason for _, found in sources.values() for _, reason in found.bad])
        begun = session.position.step
        with (
            SummaryWriter(str(run.path / "tensorboard"), purge_step=begun) if team.leads else nullcontext() as board,
            TrainingProgress(spec.total_steps, begun, quiet=not team.leads) as progress,
        ):
            for line in opening_lines(loaded, record, begun) + session.said:
                progress.say(line)
            # Asked of all: a signal that lands between two stages would part them otherwise.
            while session.position.stage < len(spec.stages) and not any(team.gather(stop.asked)):
                _train_stage(session, board, progress)
        team.part()
        return Result(run.path, session.position, session.position.stage == len(spec.stages))


def check_stages(loaded: LoadedSpec, model: CoatModel) -> None:
    """Find what a later stage cannot do, before training.

    Raises:
        RunError: Naming the stage.
    """
    spec = loaded.spec
    for stage in spec.stages:
        group_parameters(model, stage, spec.optimizer.weight_decay)
        if stage.batch.pack and model.backbone.cannot_pack:
            raise RunError(
                f"stage {stage.name!r}: batch.pack: rows of {spec.backbone.use} cannot be packed:"
                f" {model.backbone.cannot_pack}; leave it out"
            )


def _check_same(session: Session, record: dict[str, Any]) -> None:
    run, resolved = session.run, session.loaded.resolved()
    if moved := follow(run, session.loaded.folder):
        session.said.append(moved)
    run.check_same(resolved, record, _as_now(run))


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
    wrapped, groups, named = let_learn(session, stage)
    fused = team.device.type == "cuda"  # one kernel for all that learns
    adamw = torch.optim.AdamW(groups, betas=spec.optimizer.betas, eps=spec.optimizer.eps, fused=fused)
    wrapped, optimizer = team.divide(wrapped, adamw, named, spec.optimizer.clip_norm)
    checkpoint.set_moments(optimizer, named, session.moments)
    checkpoint.rest_moments(model.named_parameters(), session.moments)
    model.train()
    started = time.perf_counter()
    for share in steps_of(session, stage):
        step = _agree(session, share)
        shape = schedule(stage, position.stage_step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * shape
        if spec.gradients_every and position.step % spec.gradients_every == 0 and team.leads and any(step.batches):
            look_into(session.run.gradients, position.step + 1, stage, model, step.batches, spec.weights_of(stage))
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
        numbers["seconds"] = time.perf_counter() - started
        if spike := session.journal.log(position, stage.name, numbers, step.row_ids, board):
            progress.say(spike)
        started = time.perf_counter()  # so that a step's time holds the wait for its rows, and saving after the last
        progress.step(position.step, stage.name, terms)
        if not healthy:
            session.journal.skip(position, step.row_ids, terms, norm)
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


def let_learn(session: Session, stage: StageSpec) -> tuple[nn.Module, list[dict[str, Any]], dict[str, nn.Parameter]]:
    """The model over all processes, and groups and names of what learns in a stage; the rest gets no gradient.

    Heads of other experts rest, and parts whose rate is 0.
    """
    model, team, decay = session.model, session.team, session.loaded.spec.optimizer.weight_decay
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in session.names)  # parts are told by it, and some may have rested until now
    if team.shards:  # a sharded model has other parameters from then on, and keeps what it was sharded with
        return team.spread(model, model.backbone.units()), *group_parameters(model, stage, decay)
    groups, named = group_parameters(model, stage, decay)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    return team.spread(model, model.backbone.units()), groups, named


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
    session.journal.quarantine(session.position.step, [reason for reasons in bad for reason in reasons])
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
    weights = session.loaded.spec.weights_of(stage)
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
    found, weights = summed(shares), session.loaded.spec.weights_of(stage)
    return {**found, "loss": sum(weights[whose(name)] * value for name, value in found.items())}, length


def steps_of(session: Session, stage: StageSpec) -> Iterable[Step]:
    """This process's share of the stage's remaining steps, prepared."""
    spec, position = session.loaded.spec, session.position
    rows, found = session.sources[session.loaded.rows_of(stage).model_dump_json()]
    plan = BatchPlan(found.costs[found.good], stage.batch, (spec.seed, position.stage))
    stores = {name: store for name, store in session.stores.items() if name in stage.active or name == "tower"}
    rates = {session.model.experts[name].sample_rate for name in stage.active if name not in stores}
    preparer, team = session.model.backbone.preparer, session.team
    dataset = StepDataset(rows, found.good, plan, preparer, rates, spec.data, team.rank, team.size, stores)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(position.stage_step, stage.steps),
        num_workers=spec.data.workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own, so that making a loader draws nothing from the training's
        pin_memory=team.device.type == "cuda",
    )


def read_data(loaded: LoadedSpec, model: CoatModel, team: Team) -> dict[str, tuple[Rows, Scan]]:
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
    """Go back to the newest checkpoint that is whole; without one the run begins again."""
    team, found = session.team, list[tuple[Path | None, list[str]]]()
    team.once(lambda: found.append(newest_sound(session.run)))  # one looks for all
    newest, damage = team.gather(found)[0][0]
    session.said += damage
    if newest is not None:
        session.position = checkpoint.load_position(newest)
        checkpoint.load_model(newest, session.model, session.names)
        session.moments, random = checkpoint.load_moments(newest)
        if team.rank < len(random):
            checkpoint.restore_random(random[team.rank], team.device)
        else:  # more processes than the run had: rows and their order stay, dropout is drawn anew
            torch.manual_seed(session.loaded.spec.seed + team.rank + 1000 * session.position.step)
    team.once(lambda: session.run.cut_after(session.position.step))
    session.journal.take_up()
