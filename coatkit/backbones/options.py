"""Options every backbone takes; a plugin's own options model subclasses `BackboneOptions`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LoraOptions(BaseModel):
    """Low-rank adapters on the language model (paper: rank 16, alpha 32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the language model's linear layers that get an adapter",
    )


class TrainOptions(BaseModel):
    """What learns in each part of the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: Literal["lora", "full", "none"] = Field("lora", description="language model")
    projector: Literal["full", "none"] = Field("none", description="projector from audio tower to language model")
    tower: Literal["full", "none"] = Field("none", description="audio tower (paper: frozen)")
    tokens: Literal["new", "all", "none"] = Field("new", description="embedding rows: the three new ones, all, or none")


class BackboneOptions(BaseModel):
    """Options of every transformers backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the frozen weights")
    lora: LoraOptions = LoraOptions()
    train: TrainOptions = TrainOptions()
    gradient_checkpointing: bool = Field(False, description="recompute language-model layers in the backward pass")
    weights: str = Field("default", description="`default`, `random` (tests only; announced), or a local folder")
