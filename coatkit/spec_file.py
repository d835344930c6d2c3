"""Reading a spec: safe YAML in, a checked `LoadedSpec` out, or every problem at once with file, line and suggestion."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from coatkit.assets import needed
from coatkit.errors import PluginError, SpecError
from coatkit.manifest import Asset, Kind
from coatkit.plugins import Component, registry
from coatkit.spec import ComponentSpec, Spec

Path_ = tuple[str | int, ...]
Need = Literal["all", "components", "backbone"]
_KEY_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge")}
_VALUE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
_NOT_PLAIN = "only text, numbers, true, false, null, lists and keys with values may stand here; a date goes in quotes"
_MAX_BYTES = 1 << 18


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
    reader = _Reader(path)
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
    return loaded


class _Reader:
    """A YAML file with the line of every key, for messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Path_, int] = {}
        self.origin: dict[Path_, str] = {}
        self._visits = 0

    def read(self, overrides: Sequence[str]) -> dict[str, Any]:
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise SpecError([f"{self.path}: larger than {_MAX_BYTES >> 10} KiB; this is not a spec"])
            text = self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError([f"{self.path}: cannot be read: {error.strerror or error}"]) from None
        except UnicodeDecodeError as error:
            raise SpecError([f"{self.path}: not UTF-8 text (byte {error.start})"]) from None
        problems: list[str] = []
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if root is not None:
                self._walk(root, (), problems)
            if problems:
                raise SpecError(problems)
            data = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise SpecError([f"{self.path}:{line}: not valid YAML: {error.problem or error.context}"]) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SpecError([f"{self.path}: not valid YAML: {error}"]) from None
        if not isinstance(data, dict):
            raise SpecError([f"{self.path}: expected keys (name, backbone, data, stages, ...), found {data!r:.60}"])
        for override in overrides:
            self._override(data, override)
        return data

    def _walk(self, node: yaml.Node, path: Path_, problems: list[str]) -> None:
        # Aliases share nodes, so a few lines can name billions of them; a spec is never that large.
        self._visits += 1
        if self._visits > 20_000 or len(path) > 40:
            raise SpecError([f"{self.path}: too large or too deeply nested for a spec"])
        self.lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in _VALUE_TAGS:  # a run keeps its spec, and resumes from it: values must survive that
            problems.append(self.say(path, _NOT_PLAIN))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name: str = str(key.value)
                line = key.start_mark.line + 1
                if key.tag not in _KEY_TAGS:
                    at = _dotted((*path, name)) if isinstance(key, yaml.ScalarNode) else _dotted(path) or "a key"
                    problems.append(f"{self.path}:{line}: {at}: keys must be text; write this one in quotes")
                if (*path, name) in self.lines:
                    first = self.lines[*path, name]
                    problems.append(f"{self.path}:{line}: {_dotted((*path, name))}: given twice, first on line {first}")
                self.lines[*path, name] = line
                self._walk(value, (*path, name), problems)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._walk(value, (*path, i), problems)

    def _override(self, data: Any, text: str) -> None:
        name, equals, value = text.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise SpecError([f"--set {text}: expected key.path=value, e.g. --set stages.0.steps=20"])
        try:
            parsed = yaml.safe_load(value)
            plain = _plain(parsed)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise SpecError([f"--set {text}: {value!r:.80} is not valid YAML"]) from None
        if not plain:
            raise SpecError([f"--set {text}: {_NOT_PLAIN}"])
        path: Path_ = ()
        for key in keys:
            step: str | int = key
            if isinstance(data, list) and key.isascii() and key.isdigit() and len(key) < 10:
                step = int(key)
            path = (*path, step)
            if not (isinstance(data, dict) or (isinstance(step, int) and step < len(data))):
                size = f"; {_dotted(path[:-1])} has {len(data)}, counted from 0" if isinstance(data, list) else ""
                raise SpecError([f"--set {text}: there is no {_dotted(path)}{size}"])
            if len(path) == len(keys):
                data[step] = parsed
            elif isinstance(data, dict) and data.get(key) is None:
                data[key] = {}  # not there yet, or an empty entry such as `panns:`
            data = data[step]
        self.origin = {at: said for at, said in self.origin.items() if at[: len(path)] != path}
        self.origin[path] = f"--set {text}"

    def say(self, path: Path_, what: str) -> str:
        """`file:line: key.path: what`."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origin:
                return f"{self.origin[path[:end]]}: {_dotted(path)}: {what}"
        if path and path not in self.lines:  # made by an override of something within it
            for at, origin in self.origin.items():
                if at[: len(path)] == path:
                    return f"{origin}: {_dotted(path)}: {what}"
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known, 1)
        return f"{self.path}:{line}: {_dotted(path)}: {what}" if path else f"{self.path}:{line}: {what}"

    def problem(self, error: Any, model: type[BaseModel], at: Path_ = ()) -> str:
        """A pydantic error in the user's words."""
        path = (*at, *self._real_path(error["loc"], at))
        kind, given = error["type"], error.get("input")
        if kind == "extra_forbidden":
            return self.say(path, f"unknown key{_near(str(path[-1]), _keys_at(model, path[len(at) : -1]))}")
        if kind == "missing":
            return self.say(path, "missing; this key is required")
        if kind in ("model_type", "model_attributes_type", "dict_type"):
            keys = _keys_at(model, path[len(at) :])
            advice = f"; write {{use: {given}}}" if isinstance(given, str) and "use" in keys else ""
            return self.say(path, f"expected keys{_listed(keys)} with values, found {given!r:.80}{advice}")
        if kind == "string_pattern_mismatch":
            allowed = error["ctx"]["pattern"].removeprefix("^[").removesuffix("]+$")
            return self.say(path, f"{given!r:.80} may hold only the characters {allowed}")
        message = error["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if kind == "literal_error":
            options = [o.strip().strip("'") for o in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
            return self.say(path, f"{given!r:.80} is not one of {', '.join(options)}{_hint(str(given), options)}")
        shown = "" if kind == "value_error" and isinstance(given, dict) else f" (got {given!r:.80})"
        return self.say(path, f"{message}{shown}")

    def _real_path(self, loc: Sequence[str | int], at: Path_) -> Path_:
        """Drop what pydantic adds to a location (union branches, `[key]`) and the file does not have."""
        real: list[str | int] = []
        for part in loc:
            here = (*at, *real, part)
            known = here in self.lines or any(origin[: len(here)] == here for origin in self.origin)
            if known or (part is loc[-1] and part != "[key]"):
                real.append(part)
        return tuple(real)


def _resolve(loaded: LoadedSpec, reader: _Reader, need: Need) -> Iterator[str]:
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
    component: Component, options: dict[str, Any], path: Path_, reader: _Reader, problems: list[str]
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
                problems.append(reader.say((*path, key), f"unknown option of {component.use}{_near(key, names)}"))
    return options


def _check_files(loaded: LoadedSpec, reader: _Reader) -> Iterator[str]:
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


def _check_stages(loaded: LoadedSpec, reader: _Reader) -> Iterator[str]:
    """What the types alone cannot say of the stages."""
    spec = loaded.spec
    used: set[str] = set()
    for i, stage in enumerate(spec.stages):
        at: Path_ = ("stages", i)
        for name in stage.weights:
            if name not in spec.experts:
                yield reader.say((*at, "weights", name), f"no expert of this name{_near(name, list(spec.experts))}")
        used |= set(stage.active)
        if not stage.active and stage.ce_weight == 0:
            yield reader.say(at, "nothing to learn: no expert is active and ce_weight is 0")
        if stage.warmup_steps > stage.steps:
            yield reader.say((*at, "warmup_steps"), f"more than the stage's {stage.steps} steps")
        if stage.name in [s.name for s in spec.stages[:i]]:
            yield reader.say((*at, "name"), f"{stage.name!r} is taken by an earlier stage")
    for name in sorted(set(spec.experts) - used):
        loaded.notes.append(f"expert {name!r} is active in no stage")


def _keys_at(model: Any, path: Path_) -> list[str]:
    """Field names of the model found by walking `path` through annotations."""
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            found = model.model_fields.get(str(part))
            model = found.annotation if found else None
        else:
            arguments = typing.get_args(model)
            model = arguments[-1] if arguments else None
        if typing.get_origin(model) in (typing.Union, types.UnionType):
            model = next((a for a in typing.get_args(model) if a is not type(None)), None)
        if typing.get_origin(model) is typing.Annotated:
            model = typing.get_args(model)[0]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _hint(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _near(word: str, choices: Sequence[str]) -> str:
    return _hint(word, choices) or (f"; known: {', '.join(choices)}" if choices else "")


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float)


def _listed(words: Sequence[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)
