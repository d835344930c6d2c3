"""A spec's YAML: safe plain data out, with the file and line of every key, and pydantic's errors in the user's words.

A spec may extend another: its keys are put over those of the other, mapping by mapping. What `--set` gives comes last.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from coatkit.errors import SpecError
from coatkit.files import read_text

Path_ = tuple[str | int, ...]
_KEY_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge")}
_VALUE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
_NOT_PLAIN = "only text, numbers, true, false, null, lists and keys with values may stand here; a date goes in quotes"
_MAX_BYTES = 1 << 18


class SpecReader:
    """A YAML file, and what it extends, with the place of every key, for messages.

    Attributes:
        lines: `file:line` of every key.
        origin: The `--set` that last wrote a key.
        folders: That of the file, and those of what it extends.
    """

    def __init__(self, path: Path, above: tuple[Path, ...] = ()) -> None:
        self.path = path
        self.lines: dict[Path_, str] = {}
        self.origin: dict[Path_, str] = {}
        self.folders = [path.resolve().parent]
        self._above = above
        self._visits = 0

    def read(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The spec as plain data: the file, over what it extends, under the overrides.

        Raises:
            SpecError: If it cannot be read, or is no YAML of plain values.
        """
        data = self._parse()
        if "extends" in data:
            data = self._extend(data)
        for override in overrides:
            self._override(data, override)
        return data

    def _parse(self) -> dict[str, Any]:
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise SpecError([f"{self.path}: larger than {_MAX_BYTES >> 10} KiB; this is not a spec"])
            text = read_text(self.path)
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
        found: dict[str, Any] = _unshared(data)
        return found

    def _extend(self, data: dict[str, Any]) -> dict[str, Any]:
        """Put the file's keys over those of the spec it extends; see docs/spec.md for the rules."""
        named = data.pop("extends")
        if not isinstance(named, str):
            raise SpecError([self.say(("extends",), f"expected the path of another spec, found {named!r:.60}")])
        # Beside the file as it was named; where that is a link and nothing is there, beside the file it leads to.
        real = self.path.resolve()
        places = [Path(os.path.normpath(p / os.path.expanduser(named))) for p in (self.path.parent, real.parent)]
        chain = (*self._above, real)
        try:
            below = next((place for place in places if place.is_file()), None)
            ring = below is not None and below.resolve() in chain
        except (OSError, ValueError):  # a name the file system cannot hold
            below, ring = None, False
        if ring:
            raise SpecError([self.say(("extends",), f"{below} extends this spec in turn")])
        if below is None:
            real_one = f", nor, where this link leads, {places[1]}" if places[1] != places[0].absolute() else ""
            raise SpecError([self.say(("extends",), f"there is no file {places[0]}{real_one}")])
        if "output" not in data:
            raise SpecError([self.say(("extends",), "a spec that extends another needs an output of its own")])
        base = SpecReader(below, chain)
        # A spec's paths start from the folder its file is really in, through whatever links it was named.
        data_below = base.read()
        self.folders += base.folders
        under = _moved(data_below, os.path.relpath(below.resolve().parent, real.parent))
        lines = {path: place for path, place in self.lines.items() if path[0:1] != ("extends",)}
        if isinstance(data.get("stages"), dict) and isinstance(under.get("stages"), list):
            changes, names = data.pop("stages"), [_name_of(stage) for stage in under["stages"]]
            if unknown := [name for name in changes if name not in names]:
                where = ("stages", unknown[0])
                raise SpecError([self.say(where, f"{below} has no stage of this name{near(unknown[0], names)}")])
            kept = [i for i, name in enumerate(names) if changes.get(name, {}) is not None]
            under["stages"] = [_merged(under["stages"][i], changes.get(names[i], {})) for i in kept]
            base.lines = _renumbered(base.lines, {old: new for new, old in enumerate(kept)})
            lines = _renumbered(lines, {names[old]: new for new, old in enumerate(kept)})
        self.lines = {**base.lines, **lines}
        merged: dict[str, Any] = _merged(under, data)
        return merged

    def _walk(self, node: yaml.Node, path: Path_, problems: list[str]) -> None:
        # Aliases share nodes, so a few lines can name billions of them; a spec is never that large.
        self._visits += 1
        if self._visits > 20_000 or len(path) > 40:
            raise SpecError([f"{self.path}: too large or too deeply nested for a spec"])
        self.lines.setdefault(path, f"{self.path}:{node.start_mark.line + 1}")
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
                    first = first.rpartition(":")[2]
                    problems.append(f"{self.path}:{line}: {_dotted((*path, name))}: given twice, first on line {first}")
                self.lines[*path, name] = f"{self.path}:{line}"
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
        parsed = _unshared(parsed)
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
        place = self.lines.get(known, f"{self.path}:1")
        return f"{place}: {_dotted(path)}: {what}" if path else f"{place}: {what}"

    def problem(self, error: Any, model: type[BaseModel], at: Path_ = ()) -> str:
        """A pydantic error in the user's words."""
        kind, given = error["type"], error.get("input")
        path = (*at, *self._real_path(error["loc"], at, missing=kind == "missing"))
        if kind == "extra_forbidden":
            return self.say(path, f"unknown key{near(str(path[-1]), _keys_at(model, path[len(at) : -1]))}")
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

    def _real_path(self, loc: Sequence[str | int], at: Path_, missing: bool) -> Path_:
        """Drop what pydantic adds to a location (union branches, `[key]`) and the file does not have."""
        real: list[str | int] = []
        for part in loc:
            here = (*at, *real, part)
            known = here in self.lines or any(origin[: len(here)] == here for origin in self.origin)
            # A source may be a bare path, and pydantic then speaks of a `path` the file does not have.
            if known or (part is loc[-1] and part != "[key]" and (missing or part != "path")):
                real.append(part)
        return tuple(real)


def _merged(under: Any, over: Any, at: Path_ = ()) -> Any:
    """Mappings key by key, the upper one's keys winning; anything else is replaced.

    A head or expert of another kind is replaced too, since the options beside it were the other's. A backbone is not:
    backbones share most of theirs, and null takes one away.
    """
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    for one, other in (("train", "mixture"), ("mixture", "train")):  # rows come from either
        if over.get(one) is not None and over.get(other) is None and (at == ("data",) or at == ()):
            under = {key: value for key, value in under.items() if key != other}
    if _is_component(at):
        stands = under.get("use", "transformer" if at[-1] == "head" else at[-1])  # as the spec's models fill it in
        if over.get("use", stands) != stands:
            return over
    kept = {key: _merged(under[key], value, (*at, key)) if key in under else value for key, value in over.items()}
    return {key: value for key, value in {**under, **kept}.items() if value is not None or at[:1] != ("backbone",)}


def _is_component(at: Path_) -> bool:
    """Whether a head or an expert stands at this place."""
    return at == ("head",) or (at[:1] == ("experts",) and (len(at) == 2 or (len(at) == 3 and at[2] == "head")))


def _renumbered(lines: Mapping[Path_, str], index: Mapping[Any, int]) -> dict[Path_, str]:
    """Places of keys after stages got other numbers, or numbers for names; those of dropped stages are left out."""
    moved: dict[Path_, str] = {}
    for path, place in lines.items():
        if path[0:1] != ("stages",) or len(path) == 1:
            moved[path] = place
        elif path[1] in index:
            moved["stages", index[path[1]], *path[2:]] = place
    return moved


def _moved(data: dict[str, Any], folder: str) -> dict[str, Any]:
    """A spec of another folder with its paths made relative to this one: `folder` is that one, seen from here."""

    def from_here(text: str) -> str:
        return text if text.startswith(("/", "~")) else os.path.normpath(os.path.join(folder, text))

    def options(value: Any, of: str = "") -> Any:
        """Weights begin with a dot, which is how they are told from names; a file with a class may do without."""
        if isinstance(value, dict):
            return {key: options(inner, key) for key, inner in value.items()}
        if isinstance(value, str):
            dotted, of_class = value.startswith(("./", "../")), value.rpartition(":")[0].endswith(".py")
            if (dotted or (of == "use" and of_class)) and (moved := from_here(value)) != value:
                return os.path.join(".", moved)
        return value

    moved: dict[str, Any] = dict(data)
    moved.update({key: options(data[key]) for key in ("backbone", "experts", "head") if key in data})
    if isinstance(moved.get("output"), str):
        moved["output"] = from_here(moved["output"])
    for key in ("data", "stages"):
        entries = moved.get(key)
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict):
                _move_sources(entry, from_here)
    cache = moved.get("cache")
    if isinstance(cache, dict) and isinstance(cache.get("folder"), str):
        cache["folder"] = from_here(cache["folder"])
    return moved


def _move_sources(entry: dict[str, Any], moved: Callable[[str], str]) -> None:
    """Change the paths of `train`, `heldout` and `mixture` in place."""

    def source(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": moved(value["path"])}
        return moved(value) if isinstance(value, str) else value

    entry.update({name: source(entry[name]) for name in ("train", "heldout") if name in entry})
    mixture = entry.get("mixture")
    categories = mixture.get("categories") if isinstance(mixture, dict) else None
    for category in categories.values() if isinstance(categories, dict) else ():
        if isinstance(category, dict) and isinstance(category.get("sources"), list):
            category["sources"] = [source(value) for value in category["sources"]]


def _unshared(value: Any) -> Any:
    """A copy in which every place has a value of its own: those that share a YAML anchor share it no longer."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _name_of(stage: Any) -> str:
    return str(stage.get("name", "")) if isinstance(stage, dict) else ""


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


def near(word: str, choices: Sequence[str]) -> str:
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
