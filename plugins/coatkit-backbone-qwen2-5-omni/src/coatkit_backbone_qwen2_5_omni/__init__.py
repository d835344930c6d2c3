"""coatkit plugin: the backbone `qwen2.5-omni`, the thinker of Qwen2.5-Omni-7B.

It is transformers' `Qwen2_5OmniThinkerForConditionalGeneration`, unchanged. This module holds what coatkit reads to
list and check plugins, and loads no torch.
"""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl

NAME = "qwen2.5-omni"

WEIGHTS = Asset(name="qwen2.5-omni-7b", source="hub:Qwen/Qwen2.5-Omni-7B", licence="Apache-2.0")
"""The whole model repository, speech output included; the revision is pinned when it is first fetched."""

MANIFEST = Manifest(
    kind="backbone",
    name=NAME,
    target="coatkit_backbone_qwen2_5_omni.backbone:Qwen25Omni",
    summary="Qwen2.5-Omni-7B's thinker: an audio encoder of 2 s blocks and Qwen2.5-7B (8.3 B parameters)",
    options="coatkit_backbone_qwen2_5_omni.options:Options",
    sample_rate=16_000,
    frame_rate=25.0,
    dim=3584,
    code_licence="Apache-2.0",
    weights_licence="Apache-2.0",
    assets=(WEIGHTS,),
    citation="Xu et al., Qwen2.5-Omni Technical Report, arXiv:2503.20215",
)


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one backbone this package offers."""
    return [MANIFEST]
