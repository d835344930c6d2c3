"""Options of the SpidR expert. Imports no torch, so a spec can be checked without it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from coatkit_expert_spidr import WEIGHTS

LAYERS = 12
"""Transformer layers of the student."""


class Options(BaseModel):
    """What a spec may set for `spidr`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(
        default=LAYERS,
        ge=1,
        le=LAYERS,
        strict=True,
        description="The student's layer whose output, after its residual and norm, is the feature. The last one by "
        "default, which is the encoder's output. Layers above it are not computed.",
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="`default`: spidr_base as `coatkit fetch spidr` brings it. `random`: random weights from a fixed "
        "seed, for tests. Anything else: path of a checkpoint of the same layout (`.pt` or `.safetensors`).",
    )

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets that these options need."""
        return (WEIGHTS.name,) if self.weights == "default" else ()
