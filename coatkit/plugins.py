"""Finding components: installed plugins through pluggy entry points, and a user's own classes by file or module.

A plugin that fails to load is recorded and reported by `coatkit plugins`; it never stops a command that does not need
it. Names resolve to a `Component`, which can validate options without importing the component's code.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pluggy

from coatkit import hookspecs
from coatkit.errors import PluginError, printable
from coatkit.manifest import KINDS, Kind, Manifest

_LONGEST_REASON = 500
"""Characters of what a plugin raised that are kept."""
_BASES: Mapping[Kind, str] = {"expert": "Expert", "head": "Head", "backbone": "Backbone"}


@dataclass(frozen=True)
class Installed:
    """A manifest and where it came from."""

    manifest: Manifest
    distribution: str
    version: str


@dataclass(frozen=True)
class Broken:
    """An entry point that could not be loaded, and why."""

    entry_point: str
    distribution: str
    version: str
    error: str


@dataclass(frozen=True)
class Component:
    """An expert, head or backbone a spec has chosen, found but not imported.

    Attributes:
        kind: expert, head or backbone.
        use: What the spec wrote: a plugin's name, `./file.py:Class` or `module:Class`.
        target: `module:Class`, or `/path/file.py:Class`.
        manifest: The plugin's manifest; None for a user's class.
        distribution: Distribution and version of a plugin, or the file of a user's class.
        gate: Asked before a user's code runs, and raises where it may not (`coatkit.trust`).
    """

    kind: Kind
    use: str
    target: str
    manifest: Manifest | None
    distribution: str
    version: str = ""
    gate: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    def enter(self) -> None:
        """To be called before code of this component runs, here or in another interpreter.

        Raises:
            PluginError: If it may not.
        """
        if self.gate is not None:
            self.gate()

    def option_names(self) -> list[str] | None:
        """Names of the options a user's class takes, read from its source; None when that does not tell."""
        if self.manifest is None and (path := self.source_file()) is not None:
            return _init_keywords(path, self.target.rpartition(":")[2])
        return None

    def options_model(self) -> Any | None:
        """The plugin's pydantic options model, or None if it has none.

        Raises:
            PluginError: If the manifest names a model that cannot be imported.
        """
        if self.manifest is None or self.manifest.options is None:
            return None
        return self._import(self.manifest.options)

    def source_file(self) -> Path | None:
        """The file of a user's class, found without importing it; None where that is not possible."""
        place, _, _ = self.target.rpartition(":")
        if place.endswith(".py"):
            return Path(place)
        if self.manifest is not None:
            return None
        top, *rest = place.split(".")
        found = _find_module(top)
        if found is None or found.origin is None:
            return None
        path = Path(found.origin).parent.joinpath(*rest) if rest else Path(found.origin)
        for candidate in (path, path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def load_class(self) -> type[Any]:
        """Import the class.

        Raises:
            PluginError: If it cannot be imported, is missing, or is not of the right kind.
        """
        from coatkit import protocols

        cls = self._import(self.target)
        base = getattr(protocols, _BASES[self.kind])
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise PluginError(f"{self.use}: {self.target} is not a subclass of coatkit.{base.__name__}")
        return cls

    def _import(self, reference: str) -> Any:
        place, _, name = reference.rpartition(":")
        self.enter()
        try:
            module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        except (Exception, SystemExit) as error:  # anything can happen in foreign code; it is named, not passed on bare
            raise PluginError(
                f"{self.use}: importing {reference} (from {self.distribution}) failed: {type(error).__name__}: {error}"
            ) from error
        try:
            return getattr(module, name)
        except AttributeError as error:
            raise PluginError(f"{self.use}: there is no {name!r} in {place}") from error


@dataclass
class Registry:
    """Every installed component, and what went wrong while looking."""

    installed: dict[tuple[Kind, str], list[Installed]] = field(default_factory=lambda: defaultdict(list))
    broken: list[Broken] = field(default_factory=list)

    def names(self, kind: Kind) -> list[str]:
        return sorted(name for k, name in self.installed if k == kind)

    def find(self, kind: Kind, name: str) -> Installed:
        """The one plugin that offers `name`.

        Raises:
            PluginError: If none does (with the nearest name and the package to try), or if two do.
        """
        offers = self.installed.get((kind, name), [])
        if len(offers) > 1:
            sides = " and ".join(f"{o.distribution} {o.version}" for o in offers)
            raise PluginError(
                f"{kind} {name!r} is offered by {sides}; uninstall one, or name the class: use: module:Class"
            )
        if offers:
            return offers[0]
        lines = [f"no {kind} named {name!r} is installed"]
        if near := difflib.get_close_matches(name, self.names(kind), n=1):
            lines.append(f"did you mean {near[0]!r}?")
        lines.append(f"installed: {', '.join(self.names(kind)) or 'none'}")
        if kind != "head" and re.fullmatch(r"[A-Za-z0-9._-]+", name):
            lines.append(f"a plugin would be installed with: pip install coatkit-{kind}-{name}")
        lines += [f"note: {b.distribution} {b.version} failed to load: {b.error}" for b in self.broken]
        raise PluginError("\n  ".join(lines))

    def resolve(self, kind: Kind, use: str, folder: Path) -> Component:
        """Find what a spec's `use` names; `./file.py:Class` is relative to `folder`.

        Raises:
            PluginError: If it is not found; a user's file is read, never run.
        """
        if ":" not in use and use.endswith(".py"):
            raise PluginError(f"{use}: name the class in the file too: use: {use}:Class")
        if ":" not in use:
            found = self.find(kind, use)
            return Component(kind, use, found.manifest.target, found.manifest, found.distribution, found.version)
        place, _, name = use.rpartition(":")
        if place.endswith(".py"):
            path = Path(os.path.realpath(folder / os.path.expanduser(place)))
            if not os.path.isfile(path):
                raise PluginError(f"{use}: there is no file {path}")
            component = Component(kind, use, f"{path}:{name}", None, str(path))
        else:
            component = Component(kind, use, use, None, place)
            if _find_module(place.partition(".")[0]) is None:
                raise PluginError(f"{use}: there is no module {place.partition('.')[0]!r} in this environment")
        source = component.source_file()
        classes = None if source is None else _classes(source)
        if classes is not None and name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            shown = [known for known in classes if known[:1].isupper()]
            hint = f"; did you mean {near[0]!r}?" if near else f"; classes there: {', '.join(shown) or 'none'}"
            raise PluginError(f"{use}: {source} defines no class {name!r}{hint}")
        return component


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


@functools.cache
def registry() -> Registry:
    """Scan the installed plugins once per process."""
    found = Registry()
    for entry in _entries(found):
        distribution, version = "unknown", "?"
        try:
            if entry.dist:  # reading these fails where the installation is damaged
                distribution, version = entry.dist.name, entry.dist.version
            # One manager per plugin: what a broken one raises can be told from its neighbours'.
            manager = pluggy.PluginManager(hookspecs.GROUP)
            manager.add_hookspecs(hookspecs)
            with contextlib.redirect_stdout(_Nowhere()):  # what it prints is no part of any command's output
                manager.register(entry.load(), name=entry.name)
                manager.check_pending()
                manifests = [m for offered in manager.hook.coatkit_manifests() for m in offered]
            if not manifests:
                raise PluginError("it offers no manifest: is coatkit_manifests() missing or unmarked by @hookimpl?")
            for manifest in manifests:
                if not isinstance(manifest, Manifest):
                    raise PluginError(f"coatkit_manifests() gave a {type(manifest).__name__}, not a Manifest")
            for manifest in manifests:
                found.installed[manifest.kind, manifest.name].append(Installed(manifest, distribution, version))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found.broken.append(Broken(f"{entry.name} = {entry.value}", distribution, version, _reason(error)))
    return found


def _entries(found: Registry) -> list[importlib.metadata.EntryPoint]:
    """Every plugin's entry point; a distribution whose list of them cannot be read is told and left out."""
    try:
        return list(importlib.metadata.entry_points(group=hookspecs.GROUP))
    except Exception:  # one damaged distribution spoils the list of all
        entries: list[importlib.metadata.EntryPoint] = []
        names: set[str] = set()
        for distribution in importlib.metadata.distributions():
            name = "unknown"
            try:
                name = str(distribution.name)
                if name not in names:  # one of this name that comes later on the path is hidden
                    entries += distribution.entry_points.select(group=hookspecs.GROUP)
            except Exception as error:
                found.broken.append(Broken("entry_points.txt", name, "?", _reason(error)))
            names.add(name)
        return entries


def _reason(error: BaseException) -> str:
    """What a plugin raised, in words that can be listed."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # it may fail to say even this
        said = "(an error without words)"
    said = printable(said[:_LONGEST_REASON])
    return f"{type(error).__name__}: {said}".strip()


def _import_file(path: Path) -> Any:
    name = f"coatkit_user_{path.stem}_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))  # bytes: a BOM or a coding line is honoured
    except SyntaxError as error:
        raise PluginError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "too deeply nested"
        raise PluginError(f"{path}: cannot be read as Python: {reason}") from error


def _find_module(top: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: `__main__`, or no name at all
        return None


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those under `if` and `try` too."""
    for node in body:
        yield node
        for name in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _top_level(getattr(node, name, []))


def _classes(path: Path) -> list[str] | None:
    """Names of classes a module defines or passes on; None where its source does not tell."""
    names = []
    for node in _top_level(_parse(path).body):
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            return None
    return None if "*" in names else names


def _init_keywords(path: Path, name: str) -> list[str] | None:
    for node in _top_level(_parse(path).body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            if node.decorator_list:  # a dataclass, say, makes its own __init__
                return None
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    if item.args.kwarg:
                        return None
                    positional = [*item.args.posonlyargs, *item.args.args][1:]
                    return [a.arg for a in (*positional, *item.args.kwonlyargs) if a not in item.args.posonlyargs]
            # Without an __init__ of its own a class that only subclasses Expert takes no options.
            bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            return [] if bases <= set(_BASES.values()) else None
    return None


def all_manifests() -> list[Installed]:
    """Every installed component, ordered by kind and name."""
    found = registry()
    return [o for kind in KINDS for name in found.names(kind) for o in found.installed[kind, name]]
