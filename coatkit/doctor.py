"""What `coatkit doctor` looks at: environment, plugins, cache, disk and memory, and a spec or run. No torch is loaded.

Each check yields findings; a wrong one says its remedy.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coatkit.assets import asset_path, cache_dir, present, sha256
from coatkit.errors import CoatkitError, SpecError, other_format
from coatkit.files import from_json, read_text, without_waiting
from coatkit.plugins import registry

RUN_FORMAT, CHECKPOINT_FORMAT, STORE_FORMAT = 1, 2, 1
"""As in run_folder, checkpoint and store, which load torch."""

_GB = 1e9
_HASHED = 2 * _GB
"""Bytes of fetched weights that are read by default."""
_LEAST_DISK, _LEAST_MEMORY = 1 * _GB, 2 * _GB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: `wrong` makes the command fail; a `note` is worth knowing.
        what: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    state: Literal["ok", "note", "wrong"]
    what: str
    remedy: str = ""


def examine(place: Path | None = None, *, everything: bool = False) -> Iterator[Finding]:
    """All findings, in the order they are shown.

    Args:
        place: A spec's file or a run's folder to look at too.
        everything: Read all fetched weights, and not only the first 2 GB.
    """
    yield from _environment()
    yield from _plugins()
    yield from _cache(everything)
    yield from _stores()
    yield from _machine()
    if place is not None and place.is_dir():
        yield from _run(place)
    elif place is not None:
        yield from _spec(place)


def _environment() -> Iterator[Finding]:
    try:
        needs = importlib.metadata.metadata("coatkit")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("wrong", "coatkit is not installed, only importable", "pip install -e . in its folder")
        return
    from packaging.specifiers import SpecifierSet

    here = ".".join(map(str, sys.version_info[:3]))
    if needs and not SpecifierSet(needs).contains(here):
        yield Finding("wrong", f"Python {here}; coatkit needs {needs}", "make an environment with a newer Python")
    else:
        yield Finding("ok", f"Python {here} in {sys.prefix}")
    names = {"coatkit"}
    for offers in registry().installed.values():
        names |= {offer.distribution for offer in offers}
    problems = [found for name in sorted(names) for found in _unmet(name)]
    yield from problems
    if not problems:
        versions = " ".join(f"{name} {_version(name)}" for name in ("coatkit", "torch", "transformers"))
        yield Finding("ok", f"{versions}; everything that coatkit and its plugins need is there")


def _unmet(distribution: str) -> Iterator[Finding]:
    """Requirements of a distribution, without its extras, that this environment does not meet."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            needed = Requirement(line)
        except InvalidRequirement:
            yield Finding("note", f"{distribution}: its requirement {line!r:.80} cannot be read")
            continue
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{needed.name}{needed.specifier}'"
        found = _version(needed.name)
        if found is None:
            yield Finding("wrong", f"{distribution} needs {needed.name}{needed.specifier}, which is missing", remedy)
        elif not needed.specifier.contains(found, prereleases=True):
            yield Finding(
                "wrong", f"{distribution} needs {needed.name}{needed.specifier}; {found} is installed", remedy
            )


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugins() -> Iterator[Finding]:
    found = registry()
    yield Finding("ok", f"{len(found.installed)} plugins of {len({k for k, _ in found.installed})} kinds are listed")
    for broken in found.broken:
        yield Finding(
            "wrong",
            f"plugin {broken.distribution} {broken.version} failed to load: {broken.error:.300}",
            f"pip install --upgrade {broken.distribution}, or uninstall it",
        )
    for (kind, name), offers in found.installed.items():
        if len(offers) > 1:
            sides = " and ".join(f"{offer.distribution} {offer.version}" for offer in offers)
            yield Finding("wrong", f"{kind} {name} is offered by {sides}", "uninstall one of them")


def _cache(everything: bool) -> Iterator[Finding]:
    place = cache_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".doctor-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding(
            "wrong",
            f"cache {place} cannot be written: {error.strerror or error}",
            "make it writable, or set COATKIT_CACHE=FOLDER",
        )
    else:
        yield Finding("ok", f"cache {place}: {_size(place) / _GB:.2f} GB, writable")
    lock = place / "assets.lock"
    if not lock.exists():
        return
    try:
        entries = from_json(read_text(lock))["assets"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        yield Finding("wrong", f"{lock} is damaged", f"delete {lock} and fetch again")
        return
    read, checked, left = 0.0, 0, 0
    for key, entry in entries:
        path = place / "assets" / key
        if not isinstance(entry, dict) or ".." in Path(key).parts or not path.exists():
            continue
        size = _size(path)
        if not everything and read + size > _HASHED:
            left += 1
            continue
        read, checked = read + size, checked + 1
        try:
            same = sha256(path) == entry.get("sha256")
        except OSError as error:
            yield Finding("wrong", f"{path} cannot be read: {error.strerror or error}", "make it readable")
            continue
        if not same:
            owner = key.partition("/")[0]
            remedy = f"delete {path}, then: coatkit fetch {owner}"
            yield Finding("wrong", f"{key} is not as it was fetched: its SHA-256 differs", remedy)
    yield Finding("ok", f"{checked} fetched weights were read and compared with their SHA-256")
    if left:
        yield Finding("note", f"{left} more were not read, for they are large", "coatkit doctor --all reads them")


def _stores() -> Iterator[Finding]:
    for about in sorted((cache_dir() / "features").glob("*/about.json")):
        yield from _format(about, STORE_FORMAT, f"feature store {about.parent}", f"delete {about.parent}; it is remade")


def _format(path: Path, known: int, name: str, older: str) -> Iterator[Finding]:
    try:
        found = from_json(read_text(path))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        yield Finding("wrong", f"{name}: {path.name} is damaged", older)
        return
    if found != known:
        newer = isinstance(found, int) and found > known
        yield Finding("wrong", f"{name}: {other_format(found, known)}", "" if newer else older)


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder; links are not followed."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def _machine() -> Iterator[Finding]:
    yield from _disk(cache_dir(), "of the cache", "free some space, or set COATKIT_CACHE=FOLDER")
    memory = _memory()
    if memory is not None:
        low = memory < _LEAST_MEMORY
        remedy = "close other programs; `coatkit plan SPEC` says what a run takes" if low else ""
        yield Finding("note" if low else "ok", f"memory: {memory / _GB:.1f} GB free", remedy)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > cores:
        yield Finding("wrong", f"OMP_NUM_THREADS={threads}, but {cores} cores may be used", "unset OMP_NUM_THREADS")
    else:
        yield Finding("ok", f"{cores} cores{f', OMP_NUM_THREADS={threads}' if threads else ''}")
    yield from _gpu()


def _disk(place: Path, whose: str, remedy: str) -> Iterator[Finding]:
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return
    low = free < _LEAST_DISK
    yield Finding("wrong" if low else "ok", f"disk {whose}: {free / _GB:.1f} GB free", remedy if low else "")


def _memory() -> float | None:
    """Bytes that may still be taken: of the machine or, where less, of the container; None where nothing tells."""
    free: list[float] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # ValueError: `max`, no limit
        pass
    return min(free) if free else None


def _gpu() -> Iterator[Finding]:
    smi, cuda = shutil.which("nvidia-smi"), _torch_cuda()
    names: list[str] = []
    if smi is not None:
        try:
            query = [smi, "--query-gpu=name", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            names = [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []
        except (OSError, subprocess.SubprocessError):
            pass
    if not names:
        yield Finding("ok", "no GPU of NVIDIA is seen; runs compute on the CPU")
    elif cuda is None:
        yield Finding(
            "wrong", f"GPU {', '.join(names)}, but torch is built without CUDA", "install a torch wheel with CUDA"
        )
    else:
        yield Finding("ok", f"GPU {', '.join(names)}; torch is built for CUDA {cuda}")


def _torch_cuda() -> str | None:
    """The CUDA that torch is built for, read and not imported; None for a torch without."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        tree = ast.parse(Path(found.origin).with_name("version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if (
            isinstance(target, ast.Name)
            and target.id == "cuda"
            and isinstance(value := getattr(node, "value", None), ast.Constant)
        ):
            return value.value if isinstance(value.value, str) else None
    return None


def _spec(place: Path) -> Iterator[Finding]:
    from coatkit.spec_file import load_spec

    try:
        loaded = load_spec(place)
    except SpecError as error:
        for problem in error.problems:
            yield Finding("wrong", problem, f"change it; coatkit check {place} says the same")
        return
    except CoatkitError as error:
        yield Finding("wrong", str(error))
        return
    yield Finding("ok", f"{place}: its keys, plugins and files are in order")
    for owner, asset in loaded.assets():
        if not present(owner, asset):
            where = asset_path(owner, asset)
            yield Finding("wrong", f"weights are missing: {owner}: {asset.name} ({where})", f"coatkit fetch {place}")
    yield from _disk(loaded.output, "of the output", "free some space, or name another place with --set output=...")
    if (loaded.output / "run.json").exists():
        yield from _run(loaded.output)


def _run(folder: Path) -> Iterator[Finding]:
    record = folder / "run.json"
    if not record.exists():
        yield Finding("wrong", f"{folder} is no run folder: it has no run.json", "name the folder a spec calls output")
        return
    problems = list(_format(record, RUN_FORMAT, f"run {folder}", "train it anew, or use the coatkit that made it"))
    yield from problems
    if problems:
        return
    yield from _made_with(folder, from_json(read_text(record)))
    checkpoints = sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "state.json").is_file())
    sound = 0
    for checkpoint in checkpoints:
        wrong = list(_format(checkpoint / "state.json", CHECKPOINT_FORMAT, str(checkpoint), f"delete {checkpoint}"))
        for name in ("model.safetensors", "optimizer.safetensors"):
            if not _whole(checkpoint / name):
                remedy = f"delete {checkpoint}; --resume then goes on from the one before"
                wrong.append(Finding("wrong", f"{checkpoint / name} is missing or cut off", remedy))
        yield from wrong
        sound += not wrong
    if sound:
        yield Finding("ok", f"run {folder}: {sound} of {len(checkpoints)} checkpoints are whole")
    else:
        yield Finding("wrong", f"run {folder}: has no whole checkpoint", "coatkit train SPEC --resume")


def _made_with(folder: Path, record: Any) -> Iterator[Finding]:
    """What a run was made with and is not here, or in another version."""
    environment, components = record.get("environment"), record.get("components")
    made = environment.get("coatkit") if isinstance(environment, dict) else None
    if made is not None and made != _version("coatkit"):
        yield Finding("note", f"run {folder} was made by coatkit {made!s:.40}; this is {_version('coatkit')}")
    for place, entry in components.items() if isinstance(components, dict) else ():
        if not isinstance(entry, dict):
            continue
        origin, version = str(entry.get("from", "")), str(entry.get("version", ""))
        if not version:  # a user's own class
            if origin.endswith(".py") and not Path(origin).is_file():
                yield Finding(
                    "note", f"run {folder}: {place}: there is no file {origin:.200}, which view and probe need"
                )
        elif (here := _version(origin)) is None:
            yield Finding(
                "wrong", f"run {folder}: {place} is of {origin:.80}, not installed", f"pip install {origin:.80}"
            )
        elif here != version:
            yield Finding("note", f"run {folder}: {place} was made with {origin:.80} {version:.40}; {here} is here")


def _whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        size = path.stat().st_size
        with open(path, "rb", opener=without_waiting) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 0 < length <= min(size - 8, 100_000_000):
                return False
            header = from_json(stream.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        return bool(size == 8 + length + max(ends, default=0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        return False
