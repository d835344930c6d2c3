"""What a spec will cost, before any weight is fetched: parameters, floating-point operations, memory, storage, time.

The backbone and the heads are built in their real sizes on torch's meta device, which computes shapes and nothing else,
and torch's own counter counts the operations of forward and backward there. Only the audio tower is counted by formula
(`Backbone.tower_flops`), because its stock forward looks at values, and experts by what their manifests say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from coatkit import build
from coatkit.assets import needed
from coatkit.data.sources import open_data
from coatkit.errors import PluginError, foreign_code
from coatkit.plan_costs import Curve, Memory, Network, Work, head_curve, language_curve
from coatkit.plan_rows import Lengths, StageRows, described, different_seconds, lay_out, look_at
from coatkit.plan_rows import RowShape as RowShape
from coatkit.protocols import Backbone, Expert, Sketch
from coatkit.spec import StageSpec
from coatkit.spec_data import SourceSpec
from coatkit.spec_file import LoadedSpec


@dataclass(frozen=True)
class Gpu:
    """A GPU, from its maker's data sheet.

    Attributes:
        half: Bfloat16 operations per second, without sparsity.
        single: Float32 operations per second, without tensor cores: experts compute in real float32.
        memory: Bytes.
    """

    half: float
    single: float
    memory: float


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 80e9),
    "h100": Gpu(989e12, 67e12, 80e9),
    "h200": Gpu(989e12, 67e12, 141e9),
    "b200": Gpu(2250e12, 75e12, 180e9),
    "l40s": Gpu(362e12, 91.6e12, 48e9),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9),
    "mi300x": Gpu(1307e12, 163.4e12, 192e9),
}
PARALLEL = {
    "ddp": "the model repeated on each, gradients exchanged in buffers as large as they are",
    "fsdp": "weights, gradients and moments spread over them; in a step two decoder layers are whole at a time,"
    " and all other parts throughout",
}
"""Ways of sharing the work between devices, and what is assumed of them."""
_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0}
_QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Bytes per parameter: nf4 has a scale of 8 bits for each block of 64; int8 one for each row, next to nothing."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: its rows and steps, what a mean step works on, and the operations of it by part.

    Attributes:
        experts: Those that teach, with their loss weights.
        rows: Rows it draws from.
        hours: Hours of sound in these.
        tokens_per_row: Mean tokens of a row: text, audio and thinking positions.
        longest_row: Tokens of the longest row looked at.
        passes: How often it goes over its rows.
        tokens_per_step: Tokens of a mean step, without padding.
        padded_tokens_per_step: With padding; that many are computed.
        work: Operations of a mean step by part, padding included.
        memory: What a device needs, by way of sharing the work (a key of `PARALLEL`).
    """

    name: str
    steps: int
    experts: dict[str, float]
    rows: int
    hours: float
    tokens_per_row: float
    longest_row: float
    passes: float
    rows_per_step: float
    tokens_per_step: float
    padded_tokens_per_step: float
    work: dict[str, Work]
    memory: dict[str, Memory]

    @property
    def flops_per_step(self) -> float:
        return sum(work.total for work in self.work.values())


@dataclass(frozen=True)
class Plan:
    """What `coatkit plan` prints.

    Attributes:
        trainable: Parameters that learn, by part.
        frozen: Parameters of the backbone that do not, by part.
        rows: Different rows of all stages.
        hours: Hours of sound in these.
        store: Bytes of each expert's features over the different sounds of the stages that it teaches in.
        store_dtype: Type they are kept in.
        dtype: Type the backbone computes in.
        devices: Number of devices.
        notes: What could not be counted, and why.
    """

    trainable: dict[str, int]
    frozen: dict[str, int]
    rows: int
    hours: float
    stages: list[StagePlan]
    store: dict[str, float]
    store_dtype: str
    dtype: str
    devices: int
    notes: list[str]

    def memory(self, parallel: str) -> tuple[StagePlan, Memory]:
        """The stage that needs most on a device, and how much."""
        worst = max(self.stages, key=lambda stage: stage.memory[parallel].total)
        return worst, worst.memory[parallel]

    def seconds(self, gpu: Gpu, utilisation: float) -> float:
        """Seconds of all stages on GPUs that reach `utilisation` of their peak in each type."""
        total = 0.0
        for stage in self.stages:
            for work in stage.work.values():
                peak = gpu.single if work.exact or self.dtype == "float32" else gpu.half
                total += stage.steps * work.total / (peak * self.devices * utilisation)
        return total

    def as_data(self) -> dict[str, Any]:
        """Everything, as plain data."""
        data = asdict(self)
        for stage, plain in zip(self.stages, data["stages"], strict=True):
            plain["flops_per_step"] = stage.flops_per_step
            for name, memory in stage.memory.items():
                plain["memory"][name]["total"] = memory.total
        return data


def make_plan(loaded: LoadedSpec, *, devices: int = 1, row: RowShape | Sequence[RowShape] | None = None) -> Plan:
    """Plan a spec.

    Args:
        loaded: The spec.
        devices: Processes that share the rows of a step.
        row: Plan for a row like this, as many as each stage takes, or for these rows, instead of those of the data.

    Raises:
        PluginError: If a component cannot be made, or the backbone cannot be planned.
        DataError: If the rows cannot be read.
    """
    spec = loaded.spec
    notes: list[str] = []
    network, experts = _network(loaded, notes)
    flops = {name: value for name in spec.experts if (value := _expert_flops(loaded, name)) is not None}
    notes += [
        f"expert {name}: its operations are not counted, for nothing declares them"
        for name, expert in experts.items()
        if not expert.uses_backbone and name not in flops
    ]
    sizes = _expert_sizes(loaded, experts, notes)
    sources: dict[str, StageRows] = {}
    keys: list[str] = []
    stages: list[StagePlan] = []
    for index, stage in enumerate(spec.stages):
        key = spec.rows_of(stage).model_dump_json()
        if isinstance(row, RowShape):
            found = described(row, stage.batch, stage.steps, network.lengths)
            if key not in sources or sources[key].count < found.count:
                sources[key] = found
        else:
            if key not in sources:
                sources[key] = _look(loaded, stage) if row is None else StageRows(row, len(row))
            found = sources[key]
        keys.append(key)
        stages.append(_stage(stage, found, (spec.seed, index), network, devices, flops, sizes))
    taught = {
        name: [sources[k] for k in dict.fromkeys(k for k, s in zip(keys, spec.stages, strict=True) if name in s.active)]
        for name in experts
    }
    backbone, sketch = network.backbone, network.sketch
    parts = {**backbone.parts(), **{f"heads.{name}": list(head.parameters()) for name, head in network.heads.items()}}
    dtype, stored_rate = spec.cache.dtype, backbone.preparer.frame_rate * network.lengths.ratio
    return Plan(
        trainable={part: sum(p.numel() for p in parameters) for part, parameters in parts.items()},
        frozen=dict(sketch.frozen)
        or {"backbone": sum(p.numel() for p in backbone.model.parameters() if not p.requires_grad)},
        rows=sum(rows.count for rows in sources.values()),
        hours=sum(rows.seconds for rows in sources.values()) / 3600,
        stages=stages,
        store={
            # The store keeps targets at the thinking positions, whatever the expert's own rate.
            name: different_seconds(taught[name]) * stored_rate * (expert.dim * _BYTES[dtype] + scale)
            for scale in [4.0 if dtype == "int8" else 0.0]
            for name, expert in experts.items()
            if not expert.uses_backbone
        },
        store_dtype=dtype,
        dtype=str(sketch.dtype).removeprefix("torch."),
        devices=devices,
        notes=notes,
    )


def _look(loaded: LoadedSpec, stage: StageSpec) -> StageRows:
    data, limits = loaded.rows_of(stage), loaded.spec.data
    rows = open_data(data, on_bad_row=limits.on_bad_row, max_bad_rows=limits.max_bad_rows)
    keep = data.filter if isinstance(data, SourceSpec) else None  # a mixture's rows have been through theirs
    return look_at(rows, limits.max_seconds, keep)


def _stage(
    stage: StageSpec,
    rows: StageRows,
    seed: tuple[int, ...],
    network: Network,
    devices: int,
    flops: dict[str, float],
    sizes: dict[str, float],
) -> StagePlan:
    layout = lay_out(rows, stage.batch, seed, devices, network.lengths)
    tokens = [network.lengths.tokens(shape) for shape in rows.shapes]
    rows_per_step = layout.mean([len(part.rows) for part in layout.parts])
    experts = sum(sizes.get(name, 0.0) for name in stage.active)
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        experts={name: stage.weights[name] for name in stage.active},
        rows=rows.count,
        hours=rows.seconds / 3600,
        tokens_per_row=sum(tokens) / len(tokens),
        longest_row=max(tokens),
        passes=stage.steps * rows_per_step / rows.count,
        rows_per_step=rows_per_step,
        tokens_per_step=layout.mean([network.lengths.tokens(shape) for part in layout.parts for shape in part.rows]),
        padded_tokens_per_step=layout.mean([part.positions for part in layout.parts]),
        work=network.work(stage.active, layout, flops),
        memory={
            name: network.memory(stage.active, layout, experts, devices, shards=name == "fsdp")
            for name in (PARALLEL if devices > 1 else ("ddp",))
        },
    )


def _network(loaded: LoadedSpec, notes: list[str]) -> tuple[Network, dict[str, Expert]]:
    """The backbone and the heads, counted, and the experts whose rate and width are known before they are loaded."""
    spec = loaded.spec
    backbone, sketch = _sketch(loaded)
    language = language_curve(sketch, backbone.hidden_size)
    experts: dict[str, Expert] = {}
    heads: dict[str, nn.Module] = {}
    curves: dict[str, Curve] = {}
    for name in spec.experts:
        expert = _expert(loaded, name, backbone)
        unknown = [what for what in ("dim", "frame_rate") if not _positive(getattr(expert, what, None))]
        if unknown:
            words = {"dim": "width", "frame_rate": "frame rate"}
            said = " and ".join(words[what] for what in unknown)
            notes.append(
                f"expert {name}: neither it, nor its head, nor its features are counted: its {said} is known only after"
                f" loading. Set {' and '.join(unknown)} in the class, in __init__ or in bind() to have it planned"
            )
            continue
        experts[name], heads[name] = expert, _head(loaded, name, backbone, expert)
        try:
            with foreign_code(lambda error: f"{type(error).__name__}: {error}"):
                curves[name] = head_curve(heads[name], backbone.hidden_size, language.learns, sketch.dtype)
        except PluginError as error:
            use = loaded.chosen[f"heads.{name}"].component.use
            notes.append(
                f"head {name} ({use}): its operations and activations are not counted; on torch's meta device, which"
                f" has shapes and no values, it raised {error}"
            )
    options = loaded.chosen["backbone"].options
    ratio = 0.0 if spec.thinking is None else spec.thinking.tokens_per_audio_token
    network = Network(
        backbone=backbone,
        sketch=sketch,
        language=language,
        heads=heads,
        curves=curves,
        lengths=Lengths(backbone.preparer.frame_rate, ratio),
        checkpointing=bool(options.get("gradient_checkpointing")),
        quantized=_QUANTIZED.get(str(options.get("quantize"))),
    )
    return network, experts


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _sketch(loaded: LoadedSpec) -> tuple[Backbone, Sketch]:
    chosen = loaded.chosen["backbone"]
    backbone: Backbone = build.construct(chosen.component, thinking=loaded.spec.thinking, **chosen.options)
    with build.loading(chosen.component):
        return backbone, backbone.sketch()


def _expert(loaded: LoadedSpec, name: str, backbone: Backbone) -> Expert:
    """An expert that is made but not loaded: its rate and width are known by then, as a rule."""
    chosen = loaded.chosen[f"experts.{name}"]
    expert: Expert = build.construct(chosen.component, **chosen.options)
    with build.loading(chosen.component):
        expert.bind(backbone)
    return expert


def _head(loaded: LoadedSpec, name: str, backbone: Backbone, expert: Expert) -> nn.Module:
    chosen = loaded.chosen[f"heads.{name}"]

    def made() -> nn.Module:
        return build.load_head(chosen.component, chosen.options, backbone.hidden_size, expert.dim, 0, name)

    try:
        with torch.device("meta"):
            return made()
    except PluginError:  # perhaps it looks at values while it is made, which is its right
        return made().to("meta")


def _expert_flops(loaded: LoadedSpec, name: str) -> float | None:
    """Operations of an expert per second of sound, where its manifest says; the backbone's own features cost none."""
    manifest = loaded.chosen[f"experts.{name}"].component.manifest
    return None if manifest is None else manifest.flops_per_second


def _expert_sizes(loaded: LoadedSpec, experts: dict[str, Expert], notes: list[str]) -> dict[str, float]:
    """Bytes of the experts' weight files; those of unknown size are noted."""
    sizes: dict[str, float] = {}
    unknown = []
    for name in loaded.spec.experts:
        chosen = loaded.chosen[f"experts.{name}"]
        manifest = chosen.component.manifest
        found = [asset.size for _, asset in needed(manifest, chosen.component.options_model(), chosen.options)]
        if manifest is None or None in found:
            unknown.append(name)
        sizes[name] = float(sum(size for size in found if size is not None))
    if unknown:
        notes.append(f"experts {', '.join(unknown)}: memory of their weights is not counted, for its size is not known")
    return sizes
