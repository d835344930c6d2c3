"""coatkit plugin: the backbone `qwen2-audio`, Qwen2-Audio-7B-Instruct.

It is transformers' `Qwen2AudioForConditionalGeneration`, unchanged. This module holds what coatkit reads to list and
check plugins, and loads no torch.
"""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl

NAME = "qwen2-audio"

WEIGHTS = Asset(name="qwen2-audio-7b-instruct", source="hub:Qwen/Qwen2-Audio-7B-Instruct", licence="Apache-2.0")
"""The whole model repository; the revision is pinned when it is first fetched."""

MANIFEST = Manifest(
    kind="backbone",
    name=NAME,
    target="coatkit_backbone_qwen2_audio.backbone:Qwen2Audio",
    summary="Qwen2-Audio-7B-Instruct: a Whisper large-v3 encoder and Qwen-7B (8.4 B parameters)",
    options="coatkit_backbone_qwen2_audio.options:Options",
    sample_rate=16_000,
    frame_rate=25.0,
    dim=4096,
    code_licence="Apache-2.0",
    weights_licence="Apache-2.0",
    assets=(WEIGHTS,),
    citation="Chu et al., Qwen2-Audio Technical Report, arXiv:2407.10759",
)


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one backbone this package offers."""
    return [MANIFEST]
