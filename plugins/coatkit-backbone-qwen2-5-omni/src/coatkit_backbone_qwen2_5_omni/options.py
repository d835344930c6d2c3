"""Options of the `qwen2.5-omni` backbone. Imports no torch."""

from __future__ import annotations

from coatkit import BackboneOptions
from coatkit_backbone_qwen2_5_omni import WEIGHTS


class Options(BackboneOptions):
    """Options of the `qwen2.5-omni` backbone: those of every backbone."""

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets these options need; none for random weights or a local folder."""
        return (WEIGHTS.name,) if self.weights == "default" else ()
