"""Weights that do not ship with a package: where they are cached, how they are fetched, how they are checked.

Only `coatkit fetch` (the function `fetch` here) reaches the network. Everything else calls `require`, which finds a
fetched file or raises an error naming that command.

What a manifest gives no digest for is pinned when it is first fetched: the cache's `assets.lock`, and a lock file of
the user's own where one is named, keep source, revision and SHA-256, and a later fetch must bring the same. The
cache's lets go of what it pinned when a manifest names another source; the user's own does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coatkit.errors import AssetError
from coatkit.files import from_json, read_text
from coatkit.manifest import Asset, Manifest

if TYPE_CHECKING:
    from coatkit.download import Progress


def cache_dir() -> Path:
    """The cache folder: `COATKIT_CACHE`, else `XDG_CACHE_HOME`/coatkit, else ~/.cache/coatkit."""
    if place := os.environ.get("COATKIT_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coatkit"


def asset_path(owner: str, asset: Asset) -> Path:
    """Where an asset of the plugin component `owner` lies once fetched."""
    return cache_dir() / "assets" / owner / asset.name


def needed(manifest: Manifest | None, model: Any | None, options: Mapping[str, Any]) -> list[tuple[str, Asset]]:
    """The assets a component needs with these options, with the name that owns them.

    Args:
        manifest: The component's; None for a user's own class, which has no assets.
        model: Its options model. If that has a method `assets()`, it names those that are needed; all are otherwise.
    """
    if manifest is None:
        return []
    names = model.model_validate(options).assets() if model is not None and hasattr(model, "assets") else None
    return [(manifest.name, asset) for asset in manifest.assets if names is None or asset.name in names]


def present(owner: str, asset: Asset) -> bool:
    """Whether the asset has been fetched, from the source its manifest names now."""
    kept = _Lock(cache_dir() / "assets.lock").entry(owner, asset)
    return asset_path(owner, asset).exists() and kept.get("source", asset.source) == asset.source


def require(owner: str, asset: Asset) -> Path:
    """The fetched file (for `hub:` sources without `#FILE`, folder).

    Raises:
        AssetError: If it is missing; names the command that brings it.
    """
    path = asset_path(owner, asset)
    if not present(owner, asset):
        why = "was fetched from another source than now" if path.exists() else "is not in the cache"
        raise AssetError(f"{owner}: {asset.name} {why} ({path}).\n  Fetch it with: coatkit fetch {owner}")
    return path


def require_all(wanted: Sequence[tuple[str, Asset]], command: str) -> None:
    """Refuse, naming every asset that is missing at once.

    Raises:
        AssetError: If one is; `command` is said to bring them.
    """
    missing = [f"{owner}: {asset.name} ({asset.licence})" for owner, asset in wanted if not present(owner, asset)]
    if missing:
        raise AssetError(f"not in the cache ({cache_dir()}):\n  " + "\n  ".join(missing) + f"\n  Fetch with: {command}")


def fetch(owner: str, asset: Asset, progress: Progress | None = None, lock: Path | None = None) -> str:
    """Bring one asset into the cache, verify it, and pin it. One that is already there is verified again.

    Args:
        progress: Called while bytes arrive.
        lock: A lock file of the user's own, to share with others; it is checked, and added to, beside the cache's.

    Returns:
        Its SHA-256: of the file, or of a folder's names and digests.

    Raises:
        AssetError: If it cannot be fetched or its digest is wrong; nothing is left under its final name then.
    """
    from filelock import FileLock

    from coatkit.download import Arrived, download

    path = asset_path(owner, asset)
    locks = [_Lock(cache_dir() / "assets.lock"), *([_Lock(lock)] if lock else [])]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{asset.name}.lock"):
            pinned = [kept.entry(owner, asset) for kept in locks]
            pins = [pin for pin in pinned if pin.get("source") == asset.source]
            revision = next((pin["revision"] for pin in pins if pin.get("revision")), None)
            pins += [pin for pin in pinned[1:] if pin and pin not in pins]
            if asset.sha256:  # known before a byte is fetched
                _agree(owner, asset, asset.sha256, pins, "")
            if present(owner, asset):
                digest = sha256(path)
                remedy = f"Delete {path} and fetch it again."
                _agree(owner, asset, digest, [*pins, {"sha256": asset.sha256}], remedy)
            else:
                scratch = _scratch(path, asset)
                got: Arrived = download(owner, asset.name, asset.source, scratch, revision, progress, asset.size)
                digest, revision = sha256(got.path), got.revision
                try:
                    given = [*pins, {"sha256": asset.sha256}, {"sha256": got.sha256}]
                    _agree(owner, asset, digest, given, "It was not kept. Try again, or report it.")
                    _put_in_place(got.path, path)
                finally:
                    shutil.rmtree(scratch)
            entry = {"source": asset.source, "revision": revision, "sha256": digest}
            for kept in locks:
                kept.add(owner, asset, entry)
    except OSError as error:
        raise AssetError(
            f"{owner}: {asset.name} cannot be written to the cache ({path}): {error.strerror or error}.\n"
            "  COATKIT_CACHE=FOLDER puts the cache elsewhere."
        ) from error
    return digest


def sha256(path: Path) -> str:
    """Digest of a file; of a folder, that of its files' names and digests, hidden ones left out."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.relative_to(path).parts[0].startswith("."))
    lines = [f"{p.relative_to(path).as_posix()} {sha256(p)}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _agree(owner: str, asset: Asset, digest: str, pins: list[dict[str, Any]], remedy: str) -> None:
    for pin in pins:
        if pin.get("sha256") not in (None, digest):
            said = f" as pinned in {pin['file']}" if "file" in pin else ""
            anew = f"to take the new one, delete {owner}/{asset.name} from {pin.get('file')} and fetch it again."
            if (source := pin.get("source", asset.source)) != asset.source:
                why = f"The pin is of another source, {source}; {anew}"
            elif "file" in pin and digest == asset.sha256:
                why = f"The plugin itself expects another file than was pinned; {anew}"
            else:
                why = f"It is damaged or has changed. {remedy}"
            raise AssetError(
                f"{owner}: {asset.name} from {asset.source} has SHA-256 {digest}, expected {pin['sha256']}{said}.\n"
                f"  {why}"
            )


def _scratch(path: Path, asset: Asset) -> Path:
    """The folder a download goes to: an earlier try's, if it was of the same source."""
    scratch = path.parent / f".{asset.name}.part"
    note = scratch / "source"
    if scratch.exists() and not (note.exists() and note.read_text() == asset.source):
        shutil.rmtree(scratch)
    scratch.mkdir(exist_ok=True)
    note.write_text(asset.source)
    return scratch


def _put_in_place(got: Path, path: Path) -> None:
    if got.is_dir():
        shutil.rmtree(got / ".cache", ignore_errors=True)  # the hub client's notes
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(got, path)


class _Lock:
    """A JSON file of what was fetched: `assets` -> `OWNER/NAME` -> source, revision and sha256."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entry(self, owner: str, asset: Asset) -> dict[str, Any]:
        """What is kept of an asset, with the file that keeps it; empty where nothing is."""
        found = self._read().get(f"{owner}/{asset.name}")
        return {**found, "file": str(self.path)} if isinstance(found, dict) else {}

    def add(self, owner: str, asset: Asset, entry: dict[str, Any]) -> None:
        from filelock import FileLock

        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            kept = self._read()
            kept[f"{owner}/{asset.name}"] = entry
            beside = self.path.with_name(f".{self.path.name}.new")
            beside.write_text(json.dumps({"version": 1, "assets": kept}, indent=2, sort_keys=True) + "\n")
            os.replace(beside, self.path)

    def _read(self) -> dict[str, Any]:
        try:
            kept = from_json(read_text(self.path))["assets"]
            assert isinstance(kept, dict)
            return kept
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise AssetError(f"{self.path} is no lock file of coatkit; delete it to pin anew") from error
