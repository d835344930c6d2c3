"""From a checked spec to live components: classes imported, options applied, weights loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from coatkit.assets import require_all
from coatkit.errors import PluginError, foreign_code
from coatkit.features import elsewhere
from coatkit.model import CoatModel
from coatkit.plugins import Component
from coatkit.protocols import Backbone, Expert, Head
from coatkit.spec import ThinkingSpec
from coatkit.spec_file import Chosen, LoadedSpec
from coatkit.store import About


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers for one part, from the seed and its name: adding an expert changes no other part's start."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big"))
        yield


def construct(component: Component, *args: Any, **options: Any) -> Any:
    """Make a component with its options.

    Raises:
        PluginError: If its constructor refuses; names the component.
    """
    cls = component.load_class()
    with foreign_code(lambda error: f"{component.use}: cannot be made with {options}: {error}"):
        return cls(*args, **options)


def load_backbone(component: Component, options: Mapping[str, Any], thinking: Any, seed: int, device: str) -> Backbone:
    """A backbone with its weights on `device`."""
    settings = None if thinking is None else ThinkingSpec.model_validate(thinking)
    backbone: Backbone = construct(component, thinking=settings, **options)
    with loading(component), seeded(seed, "backbone"):
        backbone.load(torch.device(device))
    return backbone


def loading(component: Component) -> AbstractContextManager[None]:
    """Say which component failed while it was loaded."""
    return foreign_code(lambda error: f"{component.use}: cannot be loaded: {type(error).__name__}: {error}")


def load_expert(component: Component, options: Mapping[str, Any], backbone: Backbone | None, device: str) -> Expert:
    """An expert with its weights on `device`.

    Raises:
        PluginError: If it cannot be loaded, leaves `dim` or `frame_rate` unset, or needs a backbone and there is none.
    """
    expert = bound_expert(component, options, backbone)
    with loading(component), seeded(0, f"expert {component.use}"):
        expert.load(torch.device(device), torch.float32)
    for name in ("sample_rate", "frame_rate", "dim"):
        value = getattr(expert, name, None)
        if not isinstance(value, int | float) or value <= 0:
            raise PluginError(f"{component.use}: the expert's {name} is {value!r}; set it to a positive number")
    return expert


def bound_expert(component: Component, options: Mapping[str, Any], backbone: Backbone | None) -> Expert:
    """An expert that knows its backbone and has no weights yet.

    Raises:
        PluginError: If it cannot be made, or needs a backbone and there is none.
    """
    with seeded(0, f"expert {component.use}"):
        expert: Expert = construct(component, **options)
    if backbone is None and expert.uses_backbone:
        raise PluginError(f"{component.use}: this expert reads the backbone's features; pass one to load_expert")
    if backbone is not None:
        with loading(component):
            expert.bind(backbone)
    return expert


def load_head(
    component: Component, options: Mapping[str, Any], hidden_size: int, dim: int, seed: int, name: str
) -> Head:
    """A head for one expert, its start fixed by the seed and the expert's name."""
    with seeded(seed, f"head {name}"):
        head: Head = construct(component, hidden_size, dim, **options)
    return head


def expert_of(loaded: LoadedSpec, name: str, stored: About | None, backbone: Backbone, device: str) -> Expert:
    """A spec's expert with its weights; where it was run elsewhere (`features.elsewhere`), what its loss needs."""
    chosen = loaded.chosen[f"experts.{name}"]
    if stored is not None:
        return _unloaded(chosen, stored)
    return load_expert(chosen.component, chosen.options, backbone, device)


def head_of(loaded: LoadedSpec, name: str, backbone: Backbone, dim: int, device: str) -> Head:
    """The head of a spec's expert of width `dim`, as it starts."""
    chosen = loaded.chosen[f"heads.{name}"]
    return load_head(chosen.component, chosen.options, backbone.hidden_size, dim, loaded.spec.seed, name).to(device)


def _unloaded(chosen: Chosen, stored: About) -> Expert:
    """An expert that was run in another interpreter and cannot be loaded here: only its loss is used."""
    expert: Expert = construct(chosen.component, **chosen.options)
    expert.dim = int(stored.identity["dim"])
    expert.fingerprint = lambda: str(stored.identity["fingerprint"])  # type: ignore[method-assign]
    return expert


def build(loaded: LoadedSpec, device: str) -> CoatModel:
    """Backbone, experts and heads of a spec, as at the start of training."""
    spec = loaded.spec
    # Every missing expert is named at once, before minutes go into loading the backbone.
    require_all(loaded.assets("experts."), "coatkit fetch SPEC")
    chosen = loaded.chosen["backbone"]
    backbone = load_backbone(chosen.component, chosen.options, spec.thinking, spec.seed, device)
    experts: dict[str, Expert] = {}
    heads: dict[str, Head] = {}
    for name in spec.experts:
        experts[name] = expert_of(loaded, name, elsewhere(loaded, name), backbone, device)
        heads[name] = head_of(loaded, name, backbone, experts[name].dim, device)
    return CoatModel(backbone, heads, experts)
