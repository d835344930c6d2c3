"""Which features of the store are those of a spec: their identity, their place, and opening them for training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from coatkit.assets import cache_dir
from coatkit.errors import RunError
from coatkit.files import file_sha256
from coatkit.model import CoatModel
from coatkit.protocols import Backbone
from coatkit.spec_file import Chosen, LoadedSpec
from coatkit.store import About, Dtype, Store

TOWER = "tower"


def root_of(loaded: LoadedSpec) -> Path:
    """The store's folder."""
    folder = loaded.spec.cache.folder
    return cache_dir() / "features" if folder is None else loaded.path(folder)


def about_expert(name: str, expert: Any, rate: float, dtype: Dtype, source: Any = None) -> About:
    """What an expert's stored features are.

    Args:
        expert: Loaded; here or in another interpreter.
        rate: Thinking positions per second, Hz.
        source: See `source_of`, for an expert in another interpreter.

    Raises:
        RunError: If it has no features of its own.
    """
    if getattr(expert, "uses_backbone", False):
        raise RunError(
            f"cache: {name!r}: this expert's features are the backbone's own; store `tower` instead, which spares"
            " running the audio tower"
        )
    fingerprint = expert.fingerprint if isinstance(expert.fingerprint, str) else expert.fingerprint()
    identity = {"fingerprint": fingerprint, "rate": rate, "upsampling": expert.upsampling, "dim": expert.dim}
    return About(name, identity, dtype, source)


def about_tower(backbone: Backbone, dtype: Dtype) -> About:
    """What the stored frames of a backbone's audio tower are.

    Raises:
        RunError: If the tower learns, so that its frames change as training goes.
    """
    tower: Any = getattr(backbone, "tower", None)
    if not isinstance(tower, nn.Module):
        raise RunError(f"cache: {TOWER}: {type(backbone).__name__} names no audio tower; leave it out of cache")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise RunError(
            f"cache: {TOWER}: something in the audio tower learns, so what it gives cannot be stored; leave it out of"
            " cache, or freeze it with backbone.train: {tower: none, projector: none}"
        )
    digest = hashlib.sha256(f"{type(backbone).__qualname__} {backbone.preparer.sample_rate}".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
    identity = {"tower": digest.hexdigest(), "rate": backbone.preparer.frame_rate, "dim": backbone.audio_dims["tower"]}
    return About(TOWER, identity, dtype)


def source_of(chosen: Chosen) -> dict[str, Any]:
    """What an expert that is run in another interpreter is known by here, where it cannot be loaded."""
    file = chosen.component.source_file()
    return {
        "use": chosen.component.use if file is None else file.name,
        "options": chosen.options,
        "version": chosen.component.version,
        "code": None if file is None else file_sha256(file),
    }


def elsewhere(loaded: LoadedSpec, name: str) -> About | None:
    """The stored features of an expert that was run in another interpreter; None when there are none."""
    if name not in loaded.spec.cache.names:
        return None
    source, root = source_of(loaded.chosen[f"experts.{name}"]), root_of(loaded)
    for file in sorted(root.glob("*/about.json")) if root.is_dir() else ():
        about = About.read(file.parent)
        if about.source == source and about.dtype == loaded.spec.cache.dtype:
            return about
    return None


def open_stores(loaded: LoadedSpec, model: CoatModel) -> dict[str, Store]:
    """The store of every name in the spec's `cache`.

    Raises:
        RunError: If one cannot be stored, or is not there yet; names the command that makes it.
    """
    found: dict[str, Store] = {}
    cache, backbone = loaded.spec.cache, model.backbone
    for name in cache.names:
        if name == TOWER:
            about = about_tower(backbone, cache.dtype)
        else:
            about = elsewhere(loaded, name) or about_expert(
                name, model.experts[name], backbone.preparer.thinking_rate, cache.dtype
            )
        folder = about.folder(root_of(loaded))
        if not (folder / "about.json").is_file():
            raise RunError(
                f"cache: there are no {cache.dtype} features of {name!r} as this spec has it in {folder.parent}; make"
                " them with: coatkit cache SPEC"
            )
        found[name] = Store(folder)
    return found
