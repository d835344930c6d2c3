"""Whose code may run. Installed plugins may; a class that a spec names by file or module runs only under these rules.

- A spec's own file runs where it lies, seen through links, in the folder of the spec that names it. Its path is said.
- A module runs where it belongs to an installed plugin.
- A run folder is data: a file that it names runs where this very content has run from a spec before, on this machine.
- `--allow-code`, or `COATKIT_ALLOW_CODE=1`, lets all run.

What has run is kept by its SHA-256 in the cache, and not in the run folder, which its sender could write.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from coatkit.assets import cache_dir
from coatkit.errors import PluginError
from coatkit.files import file_sha256, write_atomic
from coatkit.hookspecs import GROUP
from coatkit.plugins import Component

VARIABLE = "COATKIT_ALLOW_CODE"
_REMEDY = "if you trust it, say --allow-code (or COATKIT_ALLOW_CODE=1)"
_said: set[str] = set()


def allowed() -> bool:
    """Whether the person has let all code run."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def guarded(
    component: Component, folders: Sequence[Path], *, of_run: bool, place: str = "the spec's folder"
) -> Component:
    """A component that asks before its code is run.

    Args:
        folders: Those of the spec that names it, and of those it extends.
        of_run: The spec is a run folder's, which is refused when its code is to run, and not earlier: most of what is
            done with a run needs no expert.
        place: What the first folder is, in words for a refusal.

    Raises:
        PluginError: If a spec's own code is refused; says why, and the remedy.
    """
    if component.manifest is not None:
        return component
    reason = _refusal(component, folders, of_run, place)
    if reason and not of_run and not allowed():
        raise PluginError(reason)
    return dataclasses.replace(component, gate=functools.partial(_enter, component, reason))


def _refusal(component: Component, folders: Sequence[Path], of_run: bool, inside: str) -> str:
    """Why a user's class may not run; empty where it may."""
    use, (place, _, _) = component.use, component.target.rpartition(":")
    if not place.endswith(".py"):
        top = place.partition(".")[0]
        if top in _plugin_modules():
            return ""
        return f"{use}: {top!r} belongs to no installed plugin of coatkit, so its code is not run; {_REMEDY}"
    if of_run:
        return (
            ""
            if _has_run(Path(place))
            else (
                f"{use}: a run folder's code is not run unless the same file has run here from a spec before; read"
                f" {place}, and {_REMEDY}"
            )
        )
    if any(Path(place).is_relative_to(os.path.realpath(folder)) for folder in folders):
        return ""
    return f"{use}: {place} is not inside {inside} ({folders[0]}), so its code is not run; {_REMEDY}"


def _enter(component: Component, reason: str) -> None:
    """Called before code runs: refuses, or says so once, and remembers the file."""
    if reason and not allowed():
        raise PluginError(reason)
    path = component.source_file()
    if path is None or str(path) in _said:
        return
    _said.add(str(path))
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        print(f"coatkit: {component.use}: runs the code in {path}", file=sys.stderr)
    try:
        note = _note_of(path)
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, f"{path}\n")
    except OSError:
        pass  # a cache that cannot be written costs no run; `view` of it will ask for --allow-code


def _has_run(path: Path) -> bool:
    try:
        return _note_of(path).exists()
    except OSError:
        return False


def _note_of(path: Path) -> Path:
    return cache_dir() / "allowed-code" / file_sha256(path)


@functools.cache
def _plugin_modules() -> frozenset[str]:
    found = importlib.metadata.entry_points(group=GROUP)
    return frozenset({"coatkit", *(entry.value.partition(":")[0].partition(".")[0].strip() for entry in found)})
