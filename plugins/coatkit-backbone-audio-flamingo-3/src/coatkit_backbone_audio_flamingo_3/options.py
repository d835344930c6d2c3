"""Options of the `audio-flamingo-3` backbone. Imports no torch."""

from __future__ import annotations

from coatkit import BackboneOptions
from coatkit_backbone_audio_flamingo_3 import WEIGHTS


class Options(BackboneOptions):
    """Options of the `audio-flamingo-3` backbone: those of every backbone."""

    def assets(self) -> tuple[str, ...]:
        """Names of the manifest's assets these options need; none for random weights or a local folder."""
        return (WEIGHTS.name,) if self.weights == "default" else ()
