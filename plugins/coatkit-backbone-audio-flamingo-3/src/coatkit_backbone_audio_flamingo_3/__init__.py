"""coatkit plugin: the backbone `audio-flamingo-3`, NVIDIA's Audio Flamingo 3 (7B) in transformers' own class.

This module holds what coatkit reads to list and check plugins, and loads no torch.
"""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl

NAME = "audio-flamingo-3"

WEIGHTS = Asset(
    name="weights",
    source="hub:nvidia/audio-flamingo-3-hf",
    licence="LicenseRef-NVIDIA-OneWay-Noncommercial",
)
"""The whole model folder. Its revision is pinned by the lock file when it is first fetched."""

MANIFEST = Manifest(
    kind="backbone",
    name=NAME,
    target="coatkit_backbone_audio_flamingo_3.backbone:AudioFlamingo3",
    summary="Audio Flamingo 3: AF-Whisper encoder and Qwen2.5-7B (8.3 B parameters); non-commercial weights",
    options="coatkit_backbone_audio_flamingo_3.options:Options",
    sample_rate=16_000,
    frame_rate=25.0,
    dim=3584,
    code_licence="Apache-2.0",
    weights_licence=WEIGHTS.licence,
    assets=(WEIGHTS,),
    citation="Goel et al., Audio Flamingo 3: Advancing Audio Intelligence with Fully Open Large Audio Language Models, "
    "arXiv:2507.08128",
)


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one backbone this package offers."""
    return [MANIFEST]
