"""Options of the `qwen2-audio` backbone. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coatkit import BackboneOptions
from coatkit_backbone_qwen2_audio import WEIGHTS


class Options(BackboneOptions):
    """Options of the `qwen2-audio` backbone."""

    long_audio: Literal["refuse", "segments"] = Field(
        "refuse",
        description="a sound of over 30 s, the most the model was made for: `refuse` it, or hear it in `segments` of"
        " 30 s whose audio tokens follow one another",
    )

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets these options need; none for random weights or a local folder."""
        return (WEIGHTS.name,) if self.weights == "default" else ()
