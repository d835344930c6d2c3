"""Reading a spec: safe YAML in, a checked `LoadedSpec` out, or every problem at once with file, line and suggestion."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from coatkit.assets import needed
from coatkit.errors import PluginError, SpecError
from coatkit.manifest import Asset, Kind
from coatkit.plugins import Component, registry
from coatkit.spec import ComponentSpec, Spec
from coatkit.spec_reader import Path_, SpecReader, near

Need = Literal["all", "components", "backbone"]


@dataclass(frozen=True)
class Chosen:
    """A component with its checked options."""

    component: Component
    options: dict[str, Any]


@dataclass
class LoadedSpec:
    """A checked spec, the folder its paths are relative to, and the components it names.

    Attributes:
        chosen: `backbone`, `experts.NAME` and `heads.NAME` to their components.
        notes: Things worth saying that are not wrong.
    """

    spec: Spec
    folder: Path
    chosen: dict[str, Chosen] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def path(self, text: str) -> Path:
        """A path of the spec, absolute."""
        return Path(os.path.realpath(self.folder / os.path.expanduser(text)))

    @property
    def output(self) -> Path:
        return self.path(self.spec.output)

    def assets(self, of: str = "") -> list[tuple[str, Asset]]:
        """Weights the chosen components need with these options, each once; only of those in places like `experts.`"""
        wanted: list[tuple[str, Asset]] = []
        for place, chosen in self.chosen.items():
            if place.startswith(of):
                model = chosen.component.options_model()
                found = needed(chosen.component.manifest, model, chosen.options)
                wanted += [pair for pair in found if pair not in wanted]
        return wanted

    def resolved(self) -> dict[str, Any]:
        """The spec with every default filled in and every path absolute, as plain data."""
        data = self.spec.model_dump(mode="json")
        data["output"] = str(self.output)
        for key in ("train", "heldout"):
            if data["data"][key] is not None:
                data["data"][key] = str(self.path(data["data"][key]))
        for stage in data["stages"]:
            if stage["train"] is not None:
                stage["train"] = str(self.path(stage["train"]))
        for place, chosen in self.chosen.items():
            entry: Any = data["backbone"] if place == "backbone" else None
            if place.startswith("experts."):
                entry = data["experts"][place.removeprefix("experts.")]
            elif place.startswith("heads."):
                entry = data["experts"][place.removeprefix("heads.")]
                entry["head"] = entry["head"] or dict(data["head"])
                entry = entry["head"]
            use = chosen.component.target if chosen.component.manifest is None else chosen.component.use
            entry.update(chosen.options, use=use)
        return data


def load_spec(path: Path, overrides: Sequence[str] = (), *, need: Need = "all") -> LoadedSpec:
    """Read and check a spec file.

    Args:
        path: The YAML file.
        overrides: `dotted.path=value` texts, applied last; the value is YAML.
        need: What must be there: `all`, the `components` without the data, or only the `backbone`, which is enough to
            answer from a finished run.

    Raises:
        SpecError: With every problem found.
    """
    reader = SpecReader(path)
    data = reader.read(overrides)
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        raise SpecError([reader.problem(e, Spec) for e in error.errors()]) from None
    loaded = LoadedSpec(spec, path.resolve().parent)
    if spec.thinking is None and spec.experts:
        # One switch gives the control: experts teach at the thinking positions, so without those there are none.
        stages = [stage.model_copy(update={"weights": {}}) for stage in spec.stages]
        loaded.spec = spec = spec.model_copy(update={"experts": {}, "stages": stages})
        loaded.notes.append("thinking is off: no expert is used, and the answers alone are learnt")
    problems = [
        *_resolve(loaded, reader, need),
        *(_check_files(loaded, reader) if need == "all" else ()),
        *_check_stages(loaded, reader),
    ]
    if problems:
        raise SpecError(problems)
    _drop_unused(loaded)
    return loaded


def _drop_unused(loaded: LoadedSpec) -> None:
    """Leave out experts that teach in no stage: an arm of an ablation turns them off by weight alone."""
    spec = loaded.spec
    used = {name for stage in spec.stages for name in stage.active}
    stages = [s.model_copy(update={"weights": {k: w for k, w in s.weights.items() if k in used}}) for s in spec.stages]
    experts = {name: expert for name, expert in spec.experts.items() if name in used}
    loaded.spec = spec.model_copy(update={"experts": experts, "stages": stages})
    for place in list(loaded.chosen):
        if place != "backbone" and place.partition(".")[2] not in used:
            del loaded.chosen[place]


def _resolve(loaded: LoadedSpec, reader: SpecReader, need: Need) -> Iterator[str]:
    """Find every component and check its options; yields problems."""
    spec = loaded.spec
    wanted: list[tuple[str, Kind, ComponentSpec, Path_]] = [("backbone", "backbone", spec.backbone, ("backbone",))]
    for name, expert in spec.experts.items() if need != "backbone" else ():
        wanted.append((f"experts.{name}", "expert", expert, ("experts", name)))
        own = ("experts", name, "head") if expert.head else ("head",)
        wanted.append((f"heads.{name}", "head", spec.head_of(name), own))
    said: set[str] = set()
    for place, kind, entry, path in wanted:
        problems: list[str] = []
        try:
            component = registry().resolve(kind, entry.use, loaded.folder)
            options = _check_options(component, _locate(entry.options, loaded), path, reader, problems)
            loaded.chosen[place] = Chosen(component, options)
        except PluginError as error:
            use: Path_ = (*path, "use")
            problems.append(reader.say(use if use in reader.lines or use in reader.origin else path, str(error)))
        fresh = [p for p in problems if p not in said]  # one wrong default head is one problem, not one per expert
        said.update(fresh)
        yield from fresh


def _locate(options: dict[str, Any], loaded: LoadedSpec) -> dict[str, Any]:
    """Options with `weights: ./place` made absolute; like every path of a spec it is relative to the spec."""
    weights = options.get("weights")
    if isinstance(weights, str) and weights.startswith(("./", "../", "~")):
        return {**options, "weights": str(loaded.path(weights))}
    return options


def _check_options(
    component: Component, options: dict[str, Any], path: Path_, reader: SpecReader, problems: list[str]
) -> dict[str, Any]:
    model = component.options_model()
    if model is not None:
        try:
            checked: BaseModel = model.model_validate(options)
        except ValidationError as error:
            problems += [reader.problem(e, model, path) for e in error.errors()]
            return options
        return checked.model_dump(mode="json")
    names = component.option_names()
    if names is not None:
        for key in options:
            if key not in names:
                problems.append(reader.say((*path, key), f"unknown option of {component.use}{near(key, names)}"))
    return options


def _check_files(loaded: LoadedSpec, reader: SpecReader) -> Iterator[str]:
    """Files the spec names must be there."""
    spec = loaded.spec
    files: list[tuple[Path_, str | None]] = [
        (("data", "train"), spec.data.train),
        (("data", "heldout"), spec.data.heldout),
    ]
    files += [(("stages", i, "train"), stage.train) for i, stage in enumerate(spec.stages)]
    for path, text in files:
        if text is not None and not os.path.isfile(loaded.path(text)):
            yield reader.say(path, f"there is no file {loaded.path(text)}")


def _check_stages(loaded: LoadedSpec, reader: SpecReader) -> Iterator[str]:
    """What the types alone cannot say of the stages."""
    spec = loaded.spec
    used: set[str] = set()
    for i, stage in enumerate(spec.stages):
        at: Path_ = ("stages", i)
        for name in stage.weights:
            if name not in spec.experts:
                yield reader.say((*at, "weights", name), f"no expert of this name{near(name, list(spec.experts))}")
        used |= set(stage.active)
        if not stage.active and stage.ce_weight == 0:
            yield reader.say(at, "nothing to learn: no expert is active and ce_weight is 0")
        if stage.warmup_steps > stage.steps:
            yield reader.say((*at, "warmup_steps"), f"more than the stage's {stage.steps} steps")
        if stage.name in [s.name for s in spec.stages[:i]]:
            yield reader.say((*at, "name"), f"{stage.name!r} is taken by an earlier stage")
    for name in sorted(set(spec.experts) - used):
        loaded.notes.append(f"expert {name!r} is active in no stage, so it is not loaded")
