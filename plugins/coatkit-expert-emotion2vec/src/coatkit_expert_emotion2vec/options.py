"""Options of the emotion2vec expert. Imports no torch, so a spec can be checked without it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from coatkit_expert_emotion2vec import WEIGHTS, Variant


class Options(BaseModel):
    """What a spec may set for `emotion2vec`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: Variant = Field(
        default="base",
        description="Which model: `base` is emotion2vec as pre-trained without labels. `plus-seed`, `plus-base` and "
        "`plus-large` are emotion2vec+, fine-tuned on emotion labels. Features have 768 values, of `plus-large` 1024.",
    )
    weights: str = Field(
        default="default",
        min_length=1,
        description="`default`: the variant's weights as `coatkit fetch emotion2vec` brings them. `random`: random "
        "weights from a fixed seed, for tests. Anything else: path of a checkpoint in upstream's layout and of the "
        "variant's size.",
    )

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets that these options need."""
        return (WEIGHTS[self.variant].name,) if self.weights == "default" else ()
