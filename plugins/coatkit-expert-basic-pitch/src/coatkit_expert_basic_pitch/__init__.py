"""Pitch expert for coatkit: the contour branch of basic-pitch (Bittner et al., ICASSP 2022). Imports no torch."""

from __future__ import annotations

from coatkit import Manifest, hookimpl


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one expert of this package, `basic-pitch`."""
    return [
        Manifest(
            kind="expert",
            name="basic-pitch",
            target="coatkit_expert_basic_pitch.expert:BasicPitch",
            summary="Polyphonic pitch of voices and instruments: basic-pitch contour features, weights included",
            options="coatkit_expert_basic_pitch.options:Options",
            sample_rate=22_050,
            frame_rate=22_050 / 256,
            dim=2_112,
            code_licence="Apache-2.0",
            weights_licence="Apache-2.0",
            flops_per_second=0.45e9,
            citation=(
                "Bittner, Bosch, Rubinstein, Meseguer-Brocal, Ewert: A Lightweight Instrument-Agnostic Model for "
                "Polyphonic Note Transcription and Multipitch Estimation, ICASSP 2022"
            ),
        )
    ]
