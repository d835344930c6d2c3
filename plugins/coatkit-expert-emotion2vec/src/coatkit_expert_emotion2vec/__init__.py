"""Paralinguistics expert for coatkit: emotion2vec (Ma et al., 2023) and emotion2vec+. Imports no torch."""

from __future__ import annotations

from typing import Literal

from coatkit import Asset, Manifest, hookimpl

NAME = "emotion2vec"
Variant = Literal["base", "plus-seed", "plus-base", "plus-large"]
LICENCE = "FunASR Model Open Source License 1.0"
"""What the cards on the model hub point to (`license: other`, `model-license`); there is no SPDX identifier for it."""

_HUB = "hub:emotion2vec/emotion2vec_"
WEIGHTS: dict[Variant, Asset] = {
    "base": Asset(
        name="emotion2vec_base.pt",
        source=f"{_HUB}base@0c9a3152734f9d7a7a05b4ee6bfb3c109d288664#emotion2vec_base.pt",
        sha256="4f14ddf7ba394bcafdd4bff6ae0f24ab2e4134260d4dd42c58ea791a201b02dd",
        size=1_125_606_009,
        licence=LICENCE,
    ),
    "plus-seed": Asset(
        name="emotion2vec_plus_seed.pt",
        source=f"{_HUB}plus_seed@7be9a30d52bdc793cc24e6f7d25358d6648927c1#model.pt",
        licence=LICENCE,
    ),
    "plus-base": Asset(
        name="emotion2vec_plus_base.pt",
        source=f"{_HUB}plus_base@b318240bfe67db81a8c572ecb37ce9c3759b81c9#model.pt",
        licence=LICENCE,
    ),
    "plus-large": Asset(
        name="emotion2vec_plus_large.pt",
        source=f"{_HUB}plus_large@6c303ba987b86b93193de93e34bb2b077a6bedc4#model.pt",
        sha256="be501a01f26fcdc7663a062dff86af839afbaef7c4de32f5e42d7e1ad2784da4",
        size=1_945_790_254,
        licence=LICENCE,
    ),
}


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    """The one expert of this package, `emotion2vec`."""
    return [
        Manifest(
            kind="expert",
            name=NAME,
            target="coatkit_expert_emotion2vec.expert:Emotion2vec",
            summary="Paralinguistics, how something is said: frame features of emotion2vec or emotion2vec+",
            options="coatkit_expert_emotion2vec.options:Options",
            sample_rate=16_000,
            frame_rate=50.0,
            dim=None,  # 768, or 1024 with `variant: plus-large`
            code_licence="Apache-2.0",
            weights_licence=LICENCE,
            flops_per_second=13.9e9,
            assets=tuple(WEIGHTS.values()),
            citation=(
                "Ma, Zheng, Ye, Li, Gao, Zhang, Chen: emotion2vec: Self-Supervised Pre-Training for Speech Emotion "
                "Representation, 2023, arXiv:2312.15185"
            ),
        )
    ]
