"""coatkit plugin: the backbone's own audio features as an expert. This module loads no torch."""

from __future__ import annotations

from coatkit import Manifest, hookimpl


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one expert this package offers."""
    return [
        Manifest(
            kind="expert",
            name="audio",
            target="coatkit_expert_audio.expert:AudioFeatures",
            options="coatkit_expert_audio.options:Options",
            summary="the backbone's own audio features (reconstruction, MSE)",
            code_licence="Apache-2.0",
            citation="Continuous Audio Thinking, arXiv:2606.18273",
        )
    ]
