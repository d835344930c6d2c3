"""What is wrong with a spec beyond its types: files that are not there, names and numbers that do not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from coatkit.spec_data import MixtureSpec, SourceSpec
from coatkit.spec_reader import Path_, SpecReader, near

if TYPE_CHECKING:
    from coatkit.spec_file import LoadedSpec

PARTS = ("default", "lora", "lm", "tokens", "projector", "tower", "heads")
"""What a stage's `lr` may name; and `heads.NAME`."""


def check_files(loaded: LoadedSpec, reader: SpecReader) -> Iterator[str]:
    """Files and folders the spec names must be there."""
    data = loaded.spec.data
    named: list[tuple[Path_, SourceSpec | None]] = [
        (("data", "train"), data.train),
        (("data", "heldout"), data.heldout),
    ]
    mixtures: list[tuple[Path_, MixtureSpec | None]] = [(("data", "mixture"), data.mixture)]
    for i, stage in enumerate(loaded.spec.stages):
        named.append((("stages", i, "train"), stage.train))
        mixtures.append((("stages", i, "mixture"), stage.mixture))
    for path, mixture in mixtures:
        for name, category in mixture.categories.items() if mixture is not None else ():
            named += [((*path, "categories", name, "sources", i), s) for i, s in enumerate(category.sources)]
    for path, source in named:
        if source is not None and not os.path.exists(loaded.path(source.path)):
            at = (*path, "path") if (*path, "path") in reader.lines else path
            yield reader.say(at, f"there is no file {loaded.path(source.path)}")
    for place, chosen in loaded.chosen.items():
        weights = chosen.options.get("weights")
        if not isinstance(weights, str) or os.path.exists(os.path.expanduser(weights)):
            continue
        at = (*_place(place), "weights")
        if weights.startswith(("/", "~")):  # `./` has been made so; anything else may be a name the component knows
            yield reader.say(at, f"there is no file or folder {weights}")
        elif "/" in weights and os.path.exists(loaded.path(weights)):
            yield reader.say(at, f"there is none here, but one beside the spec; write ./{weights}")


def check_stages(loaded: LoadedSpec, reader: SpecReader) -> Iterator[str]:
    """What the types alone cannot say of the stages."""
    spec = loaded.spec
    used: set[str] = set()
    # Another's backbone may have other parts; these are those of every one with the option `train`.
    usual = "backbone" in loaded.chosen and "train" in loaded.chosen["backbone"].options
    for i, stage in enumerate(spec.stages):
        at: Path_ = ("stages", i)
        for name in stage.weights:
            if name not in spec.experts:
                yield reader.say((*at, "weights", name), f"no expert of this name{near(name, list(spec.experts))}")
        used |= set(stage.active)
        if not stage.active and stage.ce_weight == 0:
            yield reader.say(at, "nothing to learn: no expert is active and ce_weight is 0")
        parts = [*PARTS, *(f"heads.{name}" for name in spec.experts)]
        for part in stage.lr if usual else ():
            if part not in parts:
                yield reader.say((*at, "lr", part), f"no part of this name{near(part, parts)}")
        if stage.warmup_steps > stage.steps:
            yield reader.say((*at, "warmup_steps"), f"more than the stage's {stage.steps} steps")
        if stage.name in [s.name for s in spec.stages[:i]]:
            yield reader.say((*at, "name"), f"{stage.name!r} is taken by an earlier stage")
    for name in (spec.calibrate.losses or {}) if spec.calibrate else ():
        if name not in spec.experts:
            yield reader.say(("calibrate", "losses", name), f"no expert of this name{near(name, list(spec.experts))}")
    for i, name in enumerate(spec.cache.names):
        if name != "tower" and name not in spec.experts:
            at_name: Path_ = ("cache", "names", i) if ("cache", "names", i) in reader.lines else ("cache",)
            yield reader.say(at_name, f"no expert is called {name!r}{near(name, [*spec.experts, 'tower'])}")
    for name in sorted(set(spec.experts) - used):
        loaded.notes.append(f"expert {name!r} is active in no stage, so it is not loaded")


def _place(place: str) -> Path_:
    """Where a component stands in the spec: `heads.NAME` is `experts.NAME.head` there."""
    kind, _, name = place.partition(".")
    return ("experts", name, "head") if kind == "heads" else ("experts", name) if name else (kind,)
