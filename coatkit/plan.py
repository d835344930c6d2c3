"""What a spec will cost, before any weight is fetched: parameters, floating-point operations, memory, storage, time.

The backbone and the heads are built in their real sizes on torch's meta device, which computes shapes and nothing else,
and torch's own counter counts the operations of forward and backward there. Only the audio tower is counted by formula
(`Backbone.tower_flops`), because its stock forward looks at values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coatkit import build
from coatkit.data import audio as sound
from coatkit.data.rows import Rows
from coatkit.data.sources import open_data
from coatkit.errors import DataError, PluginError
from coatkit.protocols import Backbone, Expert, Sketch
from coatkit.spec import StageSpec
from coatkit.spec_file import LoadedSpec

GPUS = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 180e9),
    "l40s": (362e12, 48e9),
    "rtx4090": (165e12, 24e9),
    "mi300x": (1307e12, 192e9),
}
"""Name to bfloat16 operations per second without sparsity, and bytes of memory, from the makers' data sheets."""
_SAMPLE = 2000
"""Rows looked at; the mean of so many is within a few percent."""
_PROBES = (256, 1024)


@dataclass(frozen=True)
class RowShape:
    """One row, in what it costs.

    Attributes:
        seconds: Seconds of each sound.
        text: Tokens of text, the answer's among them.
        answer: Tokens of the answer.
    """

    seconds: tuple[float, ...]
    text: float
    answer: float


@dataclass(frozen=True)
class Work:
    """Floating-point operations, a multiply-add counted as two."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StagePlan:
    """One stage: its steps, what a step works on, and the operations of it by part."""

    name: str
    steps: int
    rows_per_step: float
    tokens_per_step: float
    work: dict[str, Work]

    @property
    def flops_per_step(self) -> float:
        return sum(work.total for work in self.work.values())


@dataclass(frozen=True)
class Plan:
    """What `coatkit plan` prints.

    Attributes:
        trainable: Parameters that learn, by part.
        frozen: Parameters that do not, of the backbone.
        tokens_per_row: Mean tokens of a row: text, audio and thinking positions.
        memory: Bytes on each device by use, an estimate.
        store: Bytes of each expert's features over the rows, float16.
        hours: Hours of sound in the rows.
        uncounted: Experts whose operations nothing declares.
    """

    trainable: dict[str, int]
    frozen: int
    rows: int
    hours: float
    tokens_per_row: float
    stages: list[StagePlan]
    memory: dict[str, float]
    store: dict[str, float]
    uncounted: list[str]

    def seconds(self, flops_per_second: float, devices: int, utilisation: float) -> float:
        """Seconds of all stages on `devices` GPUs that reach `utilisation` of their peak."""
        total = sum(stage.flops_per_step * stage.steps for stage in self.stages)
        return total / (flops_per_second * devices * utilisation)

    def as_data(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return asdict(self)


def make_plan(loaded: LoadedSpec, *, devices: int = 1, shard: bool = False, row: RowShape | None = None) -> Plan:
    """Plan a spec.

    Args:
        loaded: The spec.
        devices: Processes that share the rows of a step.
        shard: Whether weights, gradients and moments are spread over them (FSDP) or repeated (DDP).
        row: Plan for rows like this instead of those of the data.

    Raises:
        PluginError: If the backbone cannot be planned.
        DataError: If the rows cannot be read.
    """
    spec = loaded.spec
    backbone, sketch = _sketch(loaded)
    experts = {name: _expert(loaded, name, backbone) for name in spec.experts}
    heads = {name: _head(loaded, name, backbone, experts[name]) for name in spec.experts}
    ratio = 0.0 if spec.thinking is None else spec.thinking.tokens_per_audio_token
    rate = _audio_rate(loaded)
    language = _language_model(sketch.decoder, backbone.hidden_size)
    curves = {name: _head_curve(head, backbone.hidden_size) for name, head in heads.items()}
    read: dict[str, tuple[list[RowShape], int]] = {}
    stages: list[StagePlan] = []
    shapes: list[RowShape] = []
    rows = 0
    for stage in spec.stages:
        if row:  # rows that are only described are as many as a stage takes: it passes over them once
            found, count = [row], math.ceil(stage.steps * (stage.batch.rows or 1))
        else:
            data = loaded.rows_of(stage)
            key = data.model_dump_json()
            if key not in read:
                read[key] = _rows(open_data(data))
            found, count = read[key]
        shapes, rows = found, max(rows, count)
        stages.append(_stage(stage, found, rate, ratio, backbone, sketch, language, curves, loaded))
    parts = {**backbone.parts(), **{f"heads.{name}": list(head.parameters()) for name, head in heads.items()}}
    trainable = {part: sum(p.numel() for p in parameters) for part, parameters in parts.items()}
    seconds = sum(sum(shape.seconds) for shape in shapes) / len(shapes) * rows
    store = {
        name: seconds * expert.frame_rate * expert.dim * 2
        for name, expert in experts.items()
        if not expert.uses_backbone
    }
    longest = max(shapes, key=lambda shape: _tokens(shape, rate, ratio))
    return Plan(
        trainable=trainable,
        frozen=sum(p.numel() for p in backbone.model.parameters() if not p.requires_grad),
        rows=rows,
        hours=seconds / 3600,
        tokens_per_row=sum(_tokens(shape, rate, ratio) for shape in shapes) / len(shapes),
        stages=stages,
        memory=_memory(
            backbone, sketch, language, heads, loaded, _tokens(longest, rate, ratio), longest.answer, devices, shard
        ),
        store=store,
        uncounted=[n for n, e in experts.items() if not e.uses_backbone and _expert_flops(loaded, n) is None],
    )


def _sketch(loaded: LoadedSpec) -> tuple[Backbone, Sketch]:
    chosen = loaded.chosen["backbone"]
    backbone: Backbone = build.construct(chosen.component, thinking=loaded.spec.thinking, **chosen.options)
    with build.loading(chosen.component):
        return backbone, backbone.sketch()


def _expert(loaded: LoadedSpec, name: str, backbone: Backbone) -> Expert:
    """An expert that is made but not loaded: its rate and width are known by then."""
    chosen = loaded.chosen[f"experts.{name}"]
    expert: Expert = build.construct(chosen.component, **chosen.options)
    with build.loading(chosen.component):
        expert.bind(backbone)
    return expert


def _head(loaded: LoadedSpec, name: str, backbone: Backbone, expert: Expert) -> nn.Module:
    chosen = loaded.chosen[f"heads.{name}"]
    with torch.device("meta"):
        return build.load_head(chosen.component, chosen.options, backbone.hidden_size, expert.dim, 0, name)


def _audio_rate(loaded: LoadedSpec) -> float:
    manifest = loaded.chosen["backbone"].component.manifest
    if manifest is None or manifest.frame_rate is None:
        raise PluginError("the backbone's manifest gives no frame_rate, so rows cannot be planned")
    return manifest.frame_rate


def _rows(manifest: Rows) -> tuple[list[RowShape], int]:
    """Shapes of rows spread evenly over a manifest, and how many rows that has; bad rows are passed over."""
    shapes = []
    for i in range(0, len(manifest), max(1, len(manifest) // _SAMPLE)):
        try:
            row = manifest[i]
            seconds = tuple(sound.duration(ref) for ref in row.audios)
        except DataError:
            continue
        text = sum(len(message.content.encode()) for message in row.messages) / 4 + 24
        answer = sum(len(message.content.encode()) for message in row.messages if message.role == "assistant") / 4 + 1
        shapes.append(RowShape(seconds, text, answer))
    if not shapes:
        raise DataError(f"{manifest.path}: no row can be read")
    return shapes, len(manifest)


def _tokens(shape: RowShape, rate: float, ratio: float) -> float:
    return shape.text + sum(rate * s * (1 + ratio) for s in shape.seconds) + (2 * len(shape.seconds) if ratio else 0)


@dataclass(frozen=True)
class _Curve:
    """Operations over n positions, a n + b n^2 each way, and bytes per position that are kept for the way back."""

    forward: tuple[float, float]
    backward: tuple[float, float]
    kept: float

    def work(self, positions: float) -> Work:
        return Work(*(a * positions + b * positions**2 for a, b in (self.forward, self.backward)))


def _curve(run: Callable[[int], Tensor]) -> _Curve:
    """Count a network at two lengths: its operations are a quadratic without a constant."""
    counts = []
    for positions in _PROBES:
        with FlopCounterMode(display=False) as counter, _keeping(positions) as kept:
            result = run(positions)
            forward = counter.get_total_flops()
            if result.requires_grad:
                result.sum().backward()  # type: ignore[no-untyped-call]
            counts.append((forward, counter.get_total_flops() - forward, kept[0]))
    (t, u), (one, two) = _PROBES, counts
    squares = [(two[i] / u - one[i] / t) / (u - t) for i in (0, 1)]
    forward, backward = ((one[i] / t - squares[i] * t, squares[i]) for i in (0, 1))
    return _Curve(forward, backward, two[2] / u)


@contextmanager
def _keeping(positions: int) -> Iterator[list[float]]:
    """Bytes that autograd keeps, but for weights and attention maps, which fused attention does not keep."""
    total = [0.0]

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        attention = tensor.ndim >= 3 and tuple(tensor.shape[-2:]) == (positions, positions)
        if not isinstance(base, nn.Parameter) and not attention:
            total[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _language_model(decoder: nn.Module, width: int) -> _Curve:
    dtype = next(decoder.parameters()).dtype

    def run(tokens: int) -> Tensor:
        embeds = torch.zeros(1, tokens, width, device="meta", dtype=dtype, requires_grad=True)
        # Given whole, the mask is used as it is; else transformers looks at values to make one.
        mask = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=dtype)
        hidden: Tensor = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return _curve(run)


def _head_curve(head: nn.Module, width: int) -> _Curve:
    def run(positions: int) -> Tensor:
        states = torch.zeros(1, positions, width, device="meta", requires_grad=True)
        made: Tensor = head(states, torch.ones(1, positions, dtype=torch.bool, device="meta"))
        return made

    return _curve(run)


def _stage(
    stage: StageSpec,
    shapes: Sequence[RowShape],
    rate: float,
    ratio: float,
    backbone: Backbone,
    sketch: Sketch,
    language: _Curve,
    curves: dict[str, _Curve],
    loaded: LoadedSpec,
) -> StagePlan:
    """Mean work of a row times the rows of a step."""
    tokens = [_tokens(shape, rate, ratio) for shape in shapes]
    mean = sum(tokens) / len(tokens)
    if stage.batch.rows is not None:
        rows = float(stage.batch.rows)
    else:
        rows = float(stage.batch.tokens or 1) / mean
    scale = rows / len(shapes)

    def add(works: Sequence[Work]) -> Work:
        return Work(scale * sum(w.forward for w in works), scale * sum(w.backward for w in works))

    work = {"language model": add([language.work(t) for t in tokens])}
    answers = [2.0 * backbone.hidden_size * sketch.vocabulary * shape.answer for shape in shapes]
    work["output logits"] = add([Work(a, a) for a in answers])
    heard = [s for shape in shapes for s in shape.seconds]
    tower = [sketch.tower_flops(s) for s in heard]
    work["audio tower"] = add([Work(t, 2 * t if sketch.tower_learns else 0.0) for t in tower])
    for name in stage.active:
        work[f"head {name}"] = add([curves[name].work(rate * ratio * s) for s in heard])
        declared = _expert_flops(loaded, name)
        if declared is not None:
            work[f"expert {name}"] = add([Work(declared * s, 0.0) for s in heard])
    return StagePlan(stage.name, stage.steps, rows, rows * mean, work)


def _expert_flops(loaded: LoadedSpec, name: str) -> float | None:
    """Operations of an expert per second of sound, where its manifest says; the backbone's own features cost none."""
    manifest = loaded.chosen[f"experts.{name}"].component.manifest
    return None if manifest is None else manifest.flops_per_second


def _memory(
    backbone: Backbone,
    sketch: Sketch,
    language: _Curve,
    heads: dict[str, nn.Module],
    loaded: LoadedSpec,
    tokens: float,
    answer: float,
    devices: int,
    shard: bool,
) -> dict[str, float]:
    """Bytes on one device for its part of a step of the longest rows, `tokens` each of which `answer` are learnt.

    An estimate: the allocator's slack and the libraries' workspaces come on top.
    """

    def size(parameters: Iterable[nn.Parameter]) -> float:
        return float(sum(p.numel() * p.element_size() for p in parameters))

    parameters = [*backbone.model.parameters(), *(p for head in heads.values() for p in head.parameters())]
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    spread = devices if shard else 1
    units = [size(unit.parameters()) for unit in backbone.units()]
    # What is in no unit is whole while a step lasts; of the units, one is used while the next is gathered.
    whole = size(parameters) - sum(units) + 2 * max(units, default=0.0) if shard else 0.0
    rows = max(1.0, max((s.batch.rows or 1) / s.batch.accumulate for s in loaded.spec.stages) / devices)
    kept = language.kept * tokens * rows
    if loaded.chosen["backbone"].options.get("gradient_checkpointing"):
        layers = max(1, len(units))
        dtype = next(backbone.model.parameters()).element_size()
        kept = kept / layers + layers * backbone.hidden_size * dtype * tokens * rows
    return {
        "weights": size(parameters) / spread + whole,
        "gradients": 4.0 * learning / spread,
        "optimizer": 8.0 * learning / spread,
        "activations": kept,
        "logits": 3 * 4.0 * sketch.vocabulary * answer * rows,
    }
