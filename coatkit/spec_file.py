"""Reading a spec: safe YAML in, a checked `LoadedSpec` out, or every problem at once with file, line and suggestion."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from coatkit.assets import needed
from coatkit.errors import PluginError, SpecError
from coatkit.files import from_json, read_text
from coatkit.manifest import Asset, Kind
from coatkit.plugins import Component, registry
from coatkit.spec import ComponentSpec, Spec, StageSpec
from coatkit.spec_check import check_files, check_stages
from coatkit.spec_data import MixtureSpec, SourceSpec
from coatkit.spec_reader import Path_, SpecReader, near
from coatkit.trust import guarded

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

    def rows_of(self, stage: StageSpec) -> SourceSpec | MixtureSpec:
        """Where a stage's rows come from, with absolute paths and the mixture's seed."""
        return self.located(self.spec.rows_of(stage))

    def located(self, source: SourceSpec | MixtureSpec) -> SourceSpec | MixtureSpec:
        """A source or mixture with absolute paths and, for a mixture, a seed."""
        data = source.model_dump(mode="json")
        if isinstance(source, SourceSpec):
            return SourceSpec.model_validate({**data, "path": str(self.path(source.path))})
        for inner in _sources_in({"mixture": data}):
            inner["path"] = str(self.path(inner["path"]))
        seed = self.spec.seed if source.seed is None else source.seed
        return MixtureSpec.model_validate({**data, "seed": seed})

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
        for part in (data["data"], *data["stages"]):
            for source in _sources_in(part):
                source["path"] = str(self.path(source["path"]))
        if data["cache"]["folder"] is not None:
            data["cache"]["folder"] = str(self.path(data["cache"]["folder"]))
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
        gone = {f"heads.{name}" for name in spec.experts}
        stages = [stage.model_copy(update={"weights": {}, "lr": _without(stage.lr, gone)}) for stage in spec.stages]
        cache = spec.cache.model_copy(update={"names": [name for name in spec.cache.names if name == "tower"]})
        loaded.spec = spec = spec.model_copy(update={"experts": {}, "stages": stages, "cache": cache})
        loaded.notes.append("thinking is off: no expert is used, and the answers alone are learnt")
    problems = [
        *_resolve(loaded, reader, need),
        *(check_files(loaded, reader) if need == "all" else ()),
        *check_stages(loaded, reader),
    ]
    if problems:
        raise SpecError(problems)
    _drop_unused(loaded)
    return loaded


def _drop_unused(loaded: LoadedSpec) -> None:
    """Leave out experts that teach in no stage: an arm of an ablation turns them off by weight alone."""
    spec = loaded.spec
    used = {name for stage in spec.stages for name in stage.active}
    gone = {f"heads.{name}" for name in set(spec.experts) - used}
    stages = [
        s.model_copy(update={"weights": _without(s.weights, set(s.weights) - used), "lr": _without(s.lr, gone)})
        for s in spec.stages
    ]
    experts = {name: expert for name, expert in spec.experts.items() if name in used}
    cache = spec.cache.model_copy(update={"names": [n for n in spec.cache.names if n == "tower" or n in used]})
    loaded.spec = spec.model_copy(update={"experts": experts, "stages": stages, "cache": cache})
    for place in list(loaded.chosen):
        if place != "backbone" and place.partition(".")[2] not in used:
            del loaded.chosen[place]


def _without(rates: dict[str, float], gone: set[str]) -> dict[str, float]:
    return {name: rate for name, rate in rates.items() if name not in gone}


def _resolve(loaded: LoadedSpec, reader: SpecReader, need: Need) -> Iterator[str]:
    """Find every component and check its options; yields problems."""
    spec = loaded.spec
    wanted: list[tuple[str, Kind, ComponentSpec, Path_]] = [("backbone", "backbone", spec.backbone, ("backbone",))]
    for name, expert in spec.experts.items() if need != "backbone" else ():
        wanted.append((f"experts.{name}", "expert", expert, ("experts", name)))
        own = ("experts", name, "head") if expert.head else ("head",)
        wanted.append((f"heads.{name}", "head", spec.head_of(name), own))
    # A run's spec lies beside its record; nothing else does. Where it is a link, the folder it was named in counts too.
    is_run = any((folder / "run.json").exists() for folder in (reader.path.parent, *reader.folders[:1]))
    said: set[str] = set()
    for place, kind, entry, path in wanted:
        problems: list[str] = []
        try:
            component = registry().resolve(kind, entry.use, loaded.folder)
            component = guarded(component, reader.folders, of_run=is_run)
            options = _check_options(component, _locate(entry.options, loaded), path, reader, problems)
            loaded.chosen[place] = Chosen(component, options)
        except PluginError as error:
            use: Path_ = (*path, "use")
            at = use if use in reader.lines or use in reader.origin else path
            problems.append(reader.say(at, f"{error}{_made_with(loaded.folder, place)}"))
        fresh = [p for p in problems if p not in said]  # one wrong default head is one problem, not one per expert
        said.update(fresh)
        yield from fresh


def _made_with(folder: Path, place: str) -> str:
    """For the spec of a run: the plugin and version that the run had, as its record has them; else nothing."""
    try:
        then = from_json(read_text(folder / "run.json"))["components"][place]
        package, version = str(then["from"]), str(then["version"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    if not version or not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", f"{package}=={version}"):
        return ""
    return f"\n  this run was made with {package} {version}; install it again: pip install {package}=={version}"


def _locate(options: dict[str, Any], loaded: LoadedSpec) -> dict[str, Any]:
    """Options with `weights: ./place` or `projector: ./place` made absolute; a spec's paths are relative to it."""
    places = {key: options.get(key) for key in ("weights", "projector")}
    told = {key: p for key, p in places.items() if isinstance(p, str) and p.startswith(("./", "../", "~"))}
    return {**options, **{key: str(loaded.path(place)) for key, place in told.items()}}


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


def _sources_in(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sources in the plain data of `data` or of a stage."""
    yield from (entry[key] for key in ("train", "heldout") if entry.get(key) is not None)
    for category in ((entry.get("mixture") or {}).get("categories") or {}).values():
        yield from category["sources"]
