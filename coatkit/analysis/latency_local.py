"""Measuring requests in this process: vanilla, text chain-of-thought and CoAT in turn, one request at a time.

What is timed: a request begins with a row whose sound is a file, and `prepare` reads, decodes and resamples it,
computes the front end's features and makes tokens; then the inputs go to the device, audio tower and language model
read them in one prefill, and the first token is chosen: that is the time to the first token. Loading the model and
turning tokens into text are not in it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coatkit import infer
from coatkit.analysis.latency import ARMS, Request, Span
from coatkit.data import audio as sound
from coatkit.data.pools import permutation
from coatkit.data.rows import AudioRef, Row, Rows
from coatkit.errors import DataError, PluginError, RunError
from coatkit.evaluation.cot import THOUGHT_TOKENS, asked_to_think, without_block
from coatkit.infer import AudioThinker
from coatkit.protocols import Inputs, Preparer
from coatkit.run_folder import RunFolder
from coatkit.spec_file import load_spec

Say = Callable[[int, int], None]
"""Called with requests done and requests in all."""
_WARM_TOKENS = 4


class Stopwatch:
    """Takes the time of each token as transformers' `generate` hands it over (a streamer, for one request).

    On a GPU the device's work is waited for first: what was only queued has not happened. `generate` waits for every
    token too, to see whether it is the last, so that this costs no more than reading the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()
        self._prompt_seen = False

    def put(self, tokens: Any) -> None:
        """The prompt comes first, then token by token."""
        if self._prompt_seen:
            self.times.append(self.now())
        self._prompt_seen = True

    def end(self) -> None:
        """No token comes any more."""

    def now(self) -> float:
        """Seconds on a clock of its own, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Limits:
    """How much is decoded.

    Attributes:
        max_new_tokens: Longest answer.
        max_thought_tokens: What a thought in words may take beyond that.
        exactly: Decode as many as that whatever is said, so that arms do not differ by what they have to say.
    """

    max_new_tokens: int = 64
    max_thought_tokens: int = THOUGHT_TOKENS
    exactly: bool = False

    def of(self, arm: str) -> int:
        """Most tokens an arm decodes."""
        return self.max_new_tokens + (self.max_thought_tokens if arm == "cot" else 0)


def load_arms(
    run: Path, arms: Sequence[str], *, device: str | None = None, merged: bool = True
) -> dict[str, AudioThinker]:
    """The models of the arms; vanilla and text chain-of-thought share theirs.

    Args:
        merged: Put adapters into the weights, as a model that is served has them; the stock model has none. Quantised
            weights stay as they are, for they would be quantised no more.

    Raises:
        RunError: If the run cannot be loaded, or has no block for `coat`.
        PluginError: If the block cannot be left out.
    """
    loaded = load_spec(RunFolder(run).spec, need="backbone")
    if "coat" in arms and loaded.spec.thinking is None:
        raise RunError(
            f"{run}: was trained without a thinking block (thinking: off); leave coat out: --arms vanilla,cot"
        )
    models: dict[str, AudioThinker] = {}
    if "coat" in arms:
        models["coat"] = infer.load(run, device=device)
    if {"vanilla", "cot"} & {*arms}:
        stock = without_block(infer.load(run, trained=False, device=device))
        models |= {arm: stock for arm in ("vanilla", "cot") if arm in arms}
    if merged:
        for model in {id(model): model for model in models.values()}.values():
            _merge(model)
    return {arm: models[arm] for arm in arms}


def _merge(model: AudioThinker) -> None:
    backbone: Any = model.backbone
    if hasattr(backbone, "merge") and getattr(getattr(backbone, "options", None), "quantize", "none") == "none":
        backbone.merge()


@dataclass(frozen=True)
class Candidate:
    """A row that may be asked about.

    Attributes:
        seconds: Of its sounds together.
        made: Whether its sound was made of others.
    """

    row: Row
    seconds: float
    made: bool = False


@dataclass
class Pool:
    """Rows by range.

    Attributes:
        notes: What is to be said of them: ranges without rows, rows left out.
    """

    rows: dict[str, list[Candidate]]
    notes: list[str] = field(default_factory=list)


def gather(
    rows: Rows, spans: Sequence[Span], preparer: Preparer, *, per: int, repeats: int, fill: bool = False
) -> Pool:
    """Rows for each range, drawn in an order that is the same every time.

    Reading stops when every range has `per` rows for each repeat.

    Args:
        per: Rows of a range in one repeat.
        fill: Where a range has fewer, make sounds of the others', one after another, and ask the others' questions.

    Raises:
        DataError: If no range has a row.
    """
    found: dict[str, list[Candidate]] = {span.name: [] for span in spans}
    outside, text, bad, others = 0, 0, list[str](), list[Candidate]()
    for index in permutation(len(rows), 0, "latency"):
        if all(len(there) >= per * repeats for there in found.values()):
            break
        try:
            row: Row = rows[int(index)]
            lengths = [sound.duration(ref) for ref in row.audios]
        except DataError as error:
            bad.append(str(error))
            continue
        if not lengths:
            text += 1
            continue
        if reasons := [reason for seconds in lengths if (reason := _cannot_hear(preparer, seconds))]:
            bad.append(str(row.fail(reasons[0])))
            continue
        one = Candidate(row, sum(lengths))
        name = next((span.name for span in spans if span.holds(one.seconds)), None)
        others += [one] if len(lengths) == 1 else []
        outside += name is None
        if name is not None:
            found[name].append(one)
    notes = [f"{text} rows without sound were left out."] if text else []
    notes += [f"{outside} rows are in no range."] if outside else []
    notes += [f"{len(bad)} rows could not be used, first: {bad[0]}"] if bad else []
    for span in spans:
        short = per - len(found[span.name])
        if fill and short > 0 and others:
            made = [m for i in range(short) if (m := _make(others, span, (i + 0.5) / short, preparer)) is not None]
            found[span.name] += made
            notes += [f"{span.name} s: {len(made)} sounds were made of shorter ones."] if made else []
        if not found[span.name]:
            notes.append(f"{span.name} s: there is no row of this length.")
        elif len(found[span.name]) < per:
            notes.append(f"{span.name} s: there are {len(found[span.name])} rows, not {per}.")
    if not any(found.values()):
        raise DataError(f"{rows.path}: no row has a sound of these ranges: {' '.join(notes)}")
    return Pool(found, notes)


def _cannot_hear(preparer: Preparer, seconds: float) -> str:
    return (
        f"{seconds:.0f} s is over the limit of {sound.LONGEST_ASKED:g} s"
        if seconds > sound.LONGEST_ASKED
        else preparer.cannot_hear(seconds)
    )


def _make(others: Sequence[Candidate], span: Span, share: float, preparer: Preparer) -> Candidate | None:
    """A sound of a length within a range, by `share` from its low end to its high one; None if it cannot be heard."""
    rate = preparer.sample_rate
    wanted = round((span.low + share * (span.high - span.low)) * rate)
    if _cannot_hear(preparer, wanted / rate):
        return None
    parts: list[np.ndarray] = []
    order = permutation(len(others), round(share * 1e6), "made", span.name)
    while sum(map(len, parts)) < wanted:  # around again where all the others together are shorter
        for i in order:
            samples, own = sound.read(others[i].row.audios[0], sound.LONGEST_ASKED)
            parts.append(sound.resample(samples, own, rate))
            if sum(map(len, parts)) >= wanted:
                break
    row = others[order[0]].row
    name = f"{row.id}, made {wanted / rate:.1f} s long"
    ref = AudioRef(Path(name), samples=(np.concatenate(parts)[:wanted], rate))
    return Candidate(replace(row, id=name, audios=(ref,)), wanted / rate, made=True)


def measure(
    models: Mapping[str, AudioThinker],
    pool: Pool,
    limits: Limits,
    *,
    per: int = 8,
    repeats: int = 3,
    warmup: int = 1,
    say: Say = lambda done, total: None,
) -> Iterator[Request]:
    """Ask, and take the time.

    Each row is asked by every arm in turn, a different one first each time, so that what else the machine does hits all
    alike.

    Args:
        models: By arm, from `load_arms`.
        per: Rows of a range in one repeat.
        repeats: Seeds of rows and order. Where a range has no more than `per` rows, all of them are taken each time.
        warmup: Times that every arm is asked about the longest row of each range before anything counts.

    Raises:
        DataError: If a row's sound cannot be read.
        PluginError: If a backbone's `generate` tells a streamer nothing.
    """
    for there in pool.rows.values():
        for arm, model in models.items():
            for _ in range(warmup if there else 0):
                longest = max(there, key=lambda one: one.seconds)
                ask(model, arm, longest, Limits(_WARM_TOKENS, 0))
    plans = [plan_of(pool, per, repeat) for repeat in range(repeats)]
    done, total = 0, len(models) * sum(map(len, plans))
    say(done, total)
    for repeat, plan in enumerate(plans):
        for place, (span, one) in enumerate(plan):
            for arm in in_turn(models, place + repeat):
                request = ask(models[arm], arm, one, limits)
                yield replace(request, range=span, repeat=repeat)
                done += 1
                say(done, total)


def in_turn(arms: Iterable[str], number: int) -> list[str]:
    """All arms, another one first each time, so that what else the machine does hits all alike."""
    found = list(arms)
    first = number % len(found)
    return [*found[first:], *found[:first]]


def plan_of(pool: Pool, per: int, seed: int) -> list[tuple[str, Candidate]]:
    """What is asked in one repeat, in its order."""
    drawn = []
    for span, there in pool.rows.items():
        drawn += [(span, there[i]) for i in permutation(len(there), seed, "rows", span)[:per]]
    return [drawn[i] for i in permutation(len(drawn), seed, "order")]


def ask(model: AudioThinker, arm: str, one: Candidate, limits: Limits) -> Request:
    """One request, timed; its range and repeat are left open.

    Raises:
        DataError: If the sound cannot be read.
        PluginError: If the backbone's `generate` tells a streamer nothing.
    """
    row = asked_to_think(one.row) if arm == "cot" else one.row
    clock = Stopwatch(next(model.backbone.model.parameters()).device)
    most = limits.of(arm)
    exactly = {"min_new_tokens": most} if limits.exactly else {}
    begun = clock.now()
    inputs = model.prepare([row])
    prepared = clock.now()
    model.backbone.generate(inputs, max_new_tokens=most, streamer=clock, **exactly)
    if not clock.times:
        name = type(model.backbone).__name__
        raise PluginError(f"{name}: its generate() does not hand tokens to `streamer`, so that no time can be taken")
    return Request(
        arm=arm,
        range="",
        repeat=0,
        row=one.row.id,
        sound_s=one.seconds,
        prompt_tokens=int(inputs.tokens["attention_mask"].sum()),
        forced_prefix=forced_prefix(inputs),
        decoded_tokens=len(clock.times),
        ttft_s=clock.times[0] - begun,
        decode_s=clock.times[-1] - clock.times[0],
        prepare_s=prepared - begun,
        made=one.made,
    )


def forced_prefix(inputs: Inputs) -> int:
    """Tokens of the thinking blocks in a prompt: the thinking positions, and a start and an end for each block."""
    places = inputs.think_index[inputs.think_mask].sort().values
    if not len(places):
        return 0
    blocks = 1 + int((places.diff() > 1).sum())  # two blocks have at least an end and a start between them
    return len(places) + 2 * blocks


def machine(model: AudioThinker) -> str:
    """What it was measured on, in words."""
    device = next(model.backbone.model.parameters()).device
    words = [platform.machine(), f"{os.cpu_count()} virtual cores, {torch.get_num_threads()} thread(s)"]
    if device.type == "cuda":
        words.append(torch.cuda.get_device_name(device))
    load = os.getloadavg()[0]
    return ", ".join(words) + f"; load average at the end {load:.1f}"


def about(
    run: Path,
    models: Mapping[str, AudioThinker],
    limits: Limits,
    pool: Pool,
    *,
    repeats: int,
    warmup: int,
    merged: bool,
) -> dict[str, Any]:
    """What results say of themselves beside the figures."""
    from importlib.metadata import version

    names = ("coatkit", "torch", "transformers")
    some = next(iter(models.values()))
    parameter = next(some.backbone.model.parameters())
    notes = [*pool.notes]
    if limits.exactly:
        notes.append("As many tokens as allowed were decoded whatever was said.")
    return {
        "run": str(run),
        "step": models["coat"].step if "coat" in models else None,
        "source": "this process, transformers' generate, one request at a time",
        "arms": {arm: ARMS[arm] for arm in models},
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "machine": machine(some),
        "adapters_merged": merged,
        "max_new_tokens": limits.max_new_tokens,
        "max_thought_tokens": limits.max_thought_tokens if "cot" in models else None,
        "exactly": limits.exactly,
        "repeats": repeats,
        "warmup": warmup,
        "libraries": {name: version(name) for name in names},
        "notes": notes,
    }
