"""Speech expert for coatkit: the student encoder of SpidR (Poli et al., 2025). Imports no torch."""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl

NAME = "spidr"
WEIGHTS = Asset(
    name="spidr_base.pt",
    source="https://dl.fbaipublicfiles.com/shared/devai/assets/models/spidr_base.pt",
    licence="CC-BY-NC-4.0",
)


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one expert of this package, `spidr`."""
    return [
        Manifest(
            kind="expert",
            name=NAME,
            target="coatkit_expert_spidr.expert:Spidr",
            summary="Speech: the student encoder of SpidR; weights not for commercial use",
            options="coatkit_expert_spidr.options:Options",
            sample_rate=16_000,
            frame_rate=50.0,
            dim=768,
            code_licence="Apache-2.0",
            weights_licence="CC-BY-NC-4.0",
            flops_per_second=13.8e9,
            assets=(WEIGHTS,),
            citation=(
                "Poli, Luthra, Benchekroun, Higuchi, Gleize, Shen et al.: SpidR: Learning Fast and Stable Linguistic "
                "Units for Spoken Language Models Without Supervision, TMLR 2025, arXiv:2512.20308"
            ),
        )
    ]
