"""Options of the `audio` expert. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Which of the backbone's audio features are rebuilt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Literal["consumed", "tower"] = Field(
        "consumed", description="what the language model consumes (after the projector), or the audio tower's output"
    )
