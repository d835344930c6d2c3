"""Options of the basic-pitch expert. Imports no torch, so a spec can be checked without it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What a spec may set for `basic-pitch`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    aux_weight: float = Field(
        default=0.5,
        ge=0,
        description="Weight of the pitch loss beside the MSE (w_aux). The default is ours: the paper's value is "
        "unknown. 0 leaves the pitch loss out.",
    )
    focal_gamma: float = Field(
        default=2.0, ge=0, description="Focusing strength of the focal loss; 0 gives plain binary cross-entropy."
    )
    focal_alpha: float | None = Field(
        default=None, ge=0, le=1, description="Weight of the active bins in the focal loss; none by default."
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="`default`: the weights shipped with the package. `random`: the learned layers drawn anew with a "
        "fixed seed, a control for what the trained ones teach. Anything else: path of a safetensors file.",
    )
