"""Options of the built-in heads, apart from the heads so that checking a spec does not import torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LinearHeadOptions(BaseModel):
    """The linear head has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TransformerHeadOptions(BaseModel):
    """Options of the Transformer head; the paper gives its layout but not these numbers, so the defaults are ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(8, ge=1, description="attention heads; must divide the backbone's width")
    feedforward: float = Field(
        4.0, gt=0, description="width of the feed-forward layer, as a multiple of the backbone's"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the block")
