"""Options of the PANNs expert. Imports no torch, so a spec can be checked without it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

CHECKPOINT = "Cnn14_DecisionLevelMax_mAP=0.385.pth"
"""Name of the checkpoint on Zenodo, and of the manifest's asset."""


class Options(BaseModel):
    """What a spec may set for `panns`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field(
        default="default",
        min_length=1,
        description="`default`: the checkpoint that `coatkit fetch panns` brings. `random`: random weights with a "
        "fixed seed, for tests and as a control. Anything else: path of a checkpoint in upstream's layout.",
    )

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets that these options need."""
        return (CHECKPOINT,) if self.weights == "default" else ()
