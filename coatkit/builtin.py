"""The heads that come with coatkit, registered through the same entry point as any plugin's."""

from __future__ import annotations

from coatkit.hookspecs import hookimpl
from coatkit.manifest import Manifest


@hookimpl
def coatkit_manifests() -> list[Manifest]:
    return [
        Manifest(
            kind="head",
            name="transformer",
            target="coatkit.heads:TransformerHead",
            options="coatkit.head_options:TransformerHeadOptions",
            summary="one Transformer block (attention + feed-forward), then a linear map: the paper's head",
            code_licence="Apache-2.0",
        ),
        Manifest(
            kind="head",
            name="linear",
            target="coatkit.heads:LinearHead",
            options="coatkit.head_options:LinearHeadOptions",
            summary="one linear map: the paper's ablation",
            code_licence="Apache-2.0",
        ),
    ]
