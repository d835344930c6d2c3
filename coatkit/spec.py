"""The spec: pydantic models of the YAML a run is made from. Imports no torch.

Numbers the paper gives are named as the paper's; every other default is ours (docs/spec.md).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from coatkit.spec_data import Cache, CacheSpec, DataSpec, MixtureSpec, Source, SourceSpec, Strict, Text, unit

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ComponentSpec(BaseModel):
    """A component by name, and its own options beside it (checked against the component's option model)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    use: Text = Field(description="plugin name, ./file.py:Class or module:Class")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class HeadSpec(ComponentSpec):
    """How thinking states become an expert's features."""

    use: Text = Field("transformer", description="head: transformer (paper) or linear, or your own")


class ExpertSpec(ComponentSpec):
    """A frozen teacher; its key is its name in stages and logs."""

    use: Text = Field("", description="expert to use; the key itself when left out")
    head: HeadSpec | None = Field(None, description="head of this expert; the spec's `head` when left out")


class ThinkingSpec(Strict):
    """The thinking block [start, think x L, end]."""

    placement: Literal["response_prefix", "before_header"] = Field(
        "response_prefix", description="after the assistant header (paper: the forced prefix), or before it"
    )
    tokens_per_audio_token: float = Field(
        1.0,
        gt=0,
        le=4,
        description="thinking positions per audio token (paper: 1)",
        json_schema_extra=unit("positions per audio token"),
    )


class BatchSpec(Strict):
    """Rows of one optimizer step, over all devices."""

    rows: int | None = Field(
        None, ge=1, description="fixed number of rows (paper: 16)", json_schema_extra=unit("rows per step")
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="budget of tokens; rows of like length are batched together",
        json_schema_extra=unit("tokens per step"),
    )
    accumulate: int = Field(
        1, ge=1, description="parts each device works through in turn, to save memory", json_schema_extra=unit("parts")
    )
    pack: bool = Field(False, description="rows end to end in one sequence, not padded; where that is exact")

    @model_validator(mode="after")
    def _one_of(self) -> BatchSpec:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("give either rows or tokens")
        if self.rows is not None and self.accumulate > self.rows:
            raise ValueError(f"accumulate: {self.accumulate} is more than rows: {self.rows}")
        return self


def _one_rate(value: Any) -> Any:
    return {"default": value} if isinstance(value, str | int | float) and not isinstance(value, bool) else value


_Rate = Annotated[float, Field(ge=0, lt=10)]


class StageSpec(Strict):
    """One stage of training: its steps, data, active experts and their weights."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="name in logs and checkpoints")
    steps: int = Field(ge=1, description="optimizer steps", json_schema_extra=unit("steps"))
    lr: Annotated[dict[str, _Rate], BeforeValidator(_one_rate, json_schema_input_type=dict[str, _Rate] | _Rate)] = (
        Field(description="peak learning rate, or part (default, lora, tokens, projector, heads) to rate; 0: rests")
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up, to 0")
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the rate rises from 0", json_schema_extra=unit("steps")
    )
    batch: BatchSpec = Field(BatchSpec(rows=16), description="rows or tokens per step")
    weights: dict[str, Weight] = Field({}, description="loss weight of each active expert; 0 or left out: inactive")
    ce_weight: Weight = Field(1.0, description="weight of the response's cross-entropy")
    train: Source | None = Field(None, description="rows of this stage; data's when left out")
    mixture: MixtureSpec | None = Field(None, description="mixture of this stage; data's when left out")

    @field_validator("lr")
    @classmethod
    def _has_default(cls, value: dict[str, float]) -> dict[str, float]:
        if "default" not in value:
            raise ValueError("needs a 'default' rate beside the named parts")
        if not any(value.values()):
            raise ValueError("every rate is 0, so nothing would learn; give one above 0, or leave the stage out")
        return value

    @model_validator(mode="after")
    def _one_of(self) -> StageSpec:
        if self.train is not None and self.mixture is not None:
            raise ValueError("give either train or mixture")
        return self

    @property
    def active(self) -> list[str]:
        """Names of the experts that teach in this stage."""
        return [name for name, weight in self.weights.items() if weight > 0]


class OptimizerSpec(Strict):
    """AdamW."""

    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the first and second moments")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this global norm")
    between_stages: Literal["reset", "keep"] = Field(
        "reset", description="forget or carry the moments into a new stage"
    )
    max_skipped: int = Field(
        10, ge=0, description="stop when more steps than this gave NaN or Inf", json_schema_extra=unit("steps")
    )


class CheckpointSpec(Strict):
    """When training state is saved; it always is at the end of a stage and on SIGTERM or SIGINT."""

    every: int = Field(50, ge=1, description="steps between checkpoints", json_schema_extra=unit("steps"))
    keep: int = Field(2, ge=1, description="checkpoints kept; older ones are removed")


class CalibrateSpec(Strict):
    """Loss weights by a calibration pass before training (ours, not the paper's)."""

    rows: int = Field(
        64, ge=1, description="rows of the first steps that are heard for it", json_schema_extra=unit("rows")
    )
    losses: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        None, description="loss of predicting each expert's mean; measured where left out, and in the run's own spec"
    )


def _thinking(value: Any) -> Any:
    return None if value is False or value == "off" else value


def _experts(value: Any) -> Any:
    """Fill `use` with the expert's key, and read an empty entry (`panns:`) as no options."""
    if not isinstance(value, dict):
        return value
    filled = {}
    for name, entry in value.items():
        entry = {} if entry is None else entry
        filled[name] = {"use": str(name), **entry} if isinstance(entry, dict) else entry
    return filled


ExpertName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Spec(Strict):
    """A run: a backbone, some experts and a list of stages."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="name of the run")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    backbone: ComponentSpec = Field(description="the audio language model")
    thinking: Annotated[
        ThinkingSpec | None,
        BeforeValidator(_thinking, json_schema_input_type=ThinkingSpec | Literal["off"] | Literal[False] | None),
    ] = Field(
        ThinkingSpec(),
        description="the thinking block; off gives plain supervised fine-tuning",
    )
    experts: Annotated[
        dict[ExpertName, ExpertSpec],
        BeforeValidator(_experts, json_schema_input_type=dict[ExpertName, ExpertSpec | None]),
    ] = Field({}, description="the teachers")
    head: HeadSpec = Field(HeadSpec(), description="head of every expert that names none")
    data: DataSpec = Field(description="rows")
    cache: Cache = Field(CacheSpec(), description="what is read from the feature store (docs/data.md)")
    stages: list[StageSpec] = Field(min_length=1, description="trained one after another")
    optimizer: OptimizerSpec = Field(OptimizerSpec(), description="AdamW's settings")
    checkpoint: CheckpointSpec = Field(CheckpointSpec(), description="saving")
    calibrate: CalibrateSpec | None = Field(
        None, description="divide each expert's loss by that of predicting its mean, measured before training"
    )
    gradients_every: int = Field(
        0,
        ge=0,
        description="steps between looks at each loss's own gradient on what all share; 0: never",
        json_schema_extra=unit("steps"),
    )
    output: Text = Field(description="run folder, relative to the spec")

    @field_serializer("thinking")
    def _off(self, value: ThinkingSpec | None) -> Any:
        return "off" if value is None else value.model_dump()

    def head_of(self, expert: str) -> HeadSpec:
        """The head an expert gets."""
        return self.experts[expert].head or self.head

    def rows_of(self, stage: StageSpec) -> SourceSpec | MixtureSpec:
        """Where a stage's rows come from."""
        found = stage.train or stage.mixture or self.data.train or self.data.mixture
        assert found is not None, "DataSpec has one"
        return found

    def weights_of(self, stage: StageSpec) -> dict[str, float]:
        """What the losses of a stage are multiplied by: `ce`, and every expert; calibrated where that is asked for."""
        scales = (self.calibrate.losses if self.calibrate else None) or {}
        return {"ce": stage.ce_weight, **{name: w / scales.get(name, 1.0) for name, w in stage.weights.items()}}

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)
