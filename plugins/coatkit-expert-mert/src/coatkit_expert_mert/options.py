"""Options of the MERT expert. Imports no torch, so a spec can be checked without it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coatkit_expert_mert import WEIGHTS

LAYERS = 12
"""Transformer layers of MERT-v1-95M. Its hidden states are numbered 0 (what the first layer gets) to 12."""


class Options(BaseModel):
    """What a spec may set for `mert`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int | list[int] | Literal["average"] = Field(
        default=LAYERS,
        description="Which hidden state is the feature: 0 is the input of the first layer, after the positional "
        "embedding; n is the output of layer n. A list is averaged; `average` averages all 13. The default, the last "
        "one, is ours: it is the model's own output. Layers above the highest one named are not computed.",
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="`default`: MERT-v1-95M as `coatkit fetch mert` brings it. `random`: random weights from a fixed "
        "seed, for tests. Anything else: path of a checkpoint of the same layout (`.bin`, `.pt` or `.safetensors`), "
        "or of a folder with it and its config.json.",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, value: Any) -> Any:
        if value != "average":
            # One message instead of one for each form it could have had.
            indices = list(value) if isinstance(value, list | tuple) else [value]
            numbers = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= LAYERS for i in indices)
            if not indices or not numbers or len(set(indices)) < len(indices):
                raise ValueError(
                    f"{value!r} is not a number from 0 to {LAYERS}, a list of different ones, or 'average'"
                )
        return value

    @property
    def indices(self) -> tuple[int, ...]:
        """The hidden states that are averaged, in order."""
        if self.layers == "average":
            return tuple(range(LAYERS + 1))
        return tuple(sorted(self.layers)) if isinstance(self.layers, list) else (int(self.layers),)

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets that these options need."""
        return (WEIGHTS.name,) if self.weights == "default" else ()
