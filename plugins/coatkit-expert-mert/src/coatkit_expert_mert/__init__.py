"""Music expert for coatkit: hidden states of MERT-v1-95M (Li et al., 2023). Imports no torch."""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl

NAME = "mert"
WEIGHTS = Asset(
    name="pytorch_model.bin",
    source="hub:m-a-p/MERT-v1-95M@12af15fef9d0ac838c3f475bfbbf26d2060dd4f5#pytorch_model.bin",
    sha256="a2b8b747f72c06e0595aeae41ae5473f4364938c6b39b2c58be38c48e6bd3fcd",
    size=377_552_987,
    licence="CC-BY-NC-4.0",
)


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one expert of this package, `mert`."""
    return [
        Manifest(
            kind="expert",
            name=NAME,
            target="coatkit_expert_mert.expert:Mert",
            summary="Music: hidden states of MERT-v1-95M, any layer or an average; weights not for commercial use",
            options="coatkit_expert_mert.options:Options",
            sample_rate=24_000,
            frame_rate=75.0,
            dim=768,
            code_licence="Apache-2.0",
            weights_licence="CC-BY-NC-4.0",
            flops_per_second=20.9e9,
            assets=(WEIGHTS,),
            citation=(
                "Li, Yuan, Zhang, Ma, Chen, Yin et al.: MERT: Acoustic Music Understanding Model with Large-Scale "
                "Self-supervised Training, 2023, arXiv:2306.00107"
            ),
        )
    ]
