"""Options every backbone takes; a plugin's own options model subclasses `BackboneOptions`. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class LoraOptions(BaseModel):
    """Low-rank adapters, on the language model unless `train` says otherwise (paper: rank 16, alpha 32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="rank of the adapters (paper: 16)")
    alpha: float = Field(32, gt=0, description="scale: the update is multiplied by alpha / rank (paper: 32)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the language model's linear layers that get an adapter",
    )


class TrainOptions(BaseModel):
    """What learns in each part of the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: Literal["lora", "full", "none"] = Field(
        "lora", description="language model (paper: lora); full: its layers, final norm and output matrix"
    )
    projector: Literal["lora", "full", "none"] = Field(
        "none", description="projector from audio tower to language model"
    )
    tower: Literal["lora", "full", "none"] = Field("none", description="audio tower (paper: frozen)")
    tokens: Literal["new", "all", "none"] = Field("new", description="embedding rows: the three new ones, all, or none")


class BackboneOptions(BaseModel):
    """Options of every transformers backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the frozen weights")
    lora: LoraOptions = Field(LoraOptions(), description="adapters of what is trained as `lora`")
    train: TrainOptions = Field(TrainOptions(), description="what learns in each part")
    gradient_checkpointing: bool = Field(False, description="recompute language-model layers in the backward pass")
    compile: bool = Field(False, description="compile the language model's layers (torch.compile), for long runs")
    weights: str = Field("default", description="`default`, `random` (tests only; announced), or a local folder")
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="hold the language model's frozen layers in 8 or 4 bits (QLoRA; needs coatkit[qlora])"
    )

    @field_validator("quantize")
    @classmethod
    def _can_be_quantized(cls, mode: str, info: ValidationInfo) -> str:
        train = info.data.get("train")  # missing when it is wrong itself
        if mode == "none":
            return mode
        if info.data.get("compile"):
            raise ValueError("layers of 8 or 4 bits are not compiled; leave out compile")
        if train is not None and train.lm == "full":
            raise ValueError("weights of 8 or 4 bits cannot be learnt; with it, train.lm must be lora or none")
        if find_spec("bitsandbytes") is None:
            raise ValueError("it needs bitsandbytes, which is not installed; pip install 'coatkit[qlora]'")
        return mode
