"""Sound event expert for coatkit: PANNs Cnn14_DecisionLevelMax (Kong et al., TASLP 2020). Imports no torch."""

from __future__ import annotations

from coatkit import Asset, Manifest, hookimpl
from coatkit_expert_panns.options import CHECKPOINT


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one expert of this package, `panns`."""
    return [
        Manifest(
            kind="expert",
            name="panns",
            target="coatkit_expert_panns.expert:Panns",
            summary="Sound events: PANNs Cnn14_DecisionLevelMax before its classifier of 527 AudioSet classes",
            options="coatkit_expert_panns.options:Options",
            sample_rate=32_000,
            frame_rate=3.125,
            dim=2_048,
            code_licence="Apache-2.0",
            weights_licence="CC-BY-4.0",
            flops_per_second=4.05e9,  # with direct convolutions; on a CPU ours does fewer
            assets=(
                Asset(
                    name=CHECKPOINT,
                    source="https://zenodo.org/records/3987831/files/Cnn14_DecisionLevelMax_mAP%3D0.385.pth?download=1",
                    sha256="dd3b4043a87d4ec13df8082c0fcfee3fb5084151808e47e060987a95eabdd142",
                    size=327_428_481,
                    licence="CC-BY-4.0",
                ),
            ),
            citation=(
                "Kong, Cao, Iqbal, Wang, Wang, Plumbley: PANNs: Large-Scale Pretrained Audio Neural Networks for Audio "
                "Pattern Recognition, IEEE/ACM TASLP 28, 2020"
            ),
        )
    ]
