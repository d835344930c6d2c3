"""The one hook a plugin implements. `hookimpl` marks the implementation; the entry-point group is `coatkit`."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from coatkit.manifest import Manifest

GROUP = "coatkit"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def coatkit_manifests() -> Iterable[Manifest]:
    """The experts, heads and backbones this plugin offers. Must be quick and must not import torch."""
    raise NotImplementedError
