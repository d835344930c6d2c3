"""`coatkit fetch`."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("what")
def command(what: str) -> None:
    """Bring the weights that WHAT needs into the cache: a spec file, or the name of an expert or backbone.

    Files with a known SHA-256 are verified. Nothing else in coatkit downloads. COATKIT_CACHE moves the cache.

    \b
    Examples:
      coatkit fetch examples/quickstart/spec.yaml
      coatkit fetch mini
    """
    from coatkit.assets import Progress, asset_path, fetch

    wanted = _of_spec(Path(what)) if what.endswith((".yaml", ".yml")) else _of_name(what)
    if not wanted:
        click.echo("nothing to fetch: everything ships with its package")
    for owner, asset in wanted:
        size = f", {asset.size / 1e6:.0f} MB" if asset.size else ""
        there = asset_path(owner, asset).exists()
        click.echo(f"{owner}: {asset.name} ({asset.licence}{size}): {'in the cache' if there else 'fetching'}")
        show: Progress | None = _show if sys.stderr.isatty() else None
        fetch(owner, asset, show)


def _show(name: str, done: int, total: int | None) -> None:
    click.echo(f"\r  {name}: {done / 1e6:.0f}{f' of {total / 1e6:.0f}' if total else ''} MB", nl=False, err=True)


def _of_spec(path: Path) -> list[tuple[str, Any]]:
    from coatkit.spec_file import load_spec

    wanted = []
    for chosen in load_spec(path, need="components").chosen.values():
        if chosen.component.manifest is not None:
            wanted += _needed(chosen.component.manifest, chosen.component.options_model(), chosen.options)
    return wanted


def _of_name(name: str) -> list[tuple[str, Any]]:
    from coatkit.errors import PluginError
    from coatkit.manifest import Kind
    from coatkit.plugins import registry

    kinds: tuple[Kind, ...] = ("backbone", "expert")
    found = [kind for kind in kinds if name in registry().names(kind)]
    if not found:
        known = [n for kind in kinds for n in registry().names(kind)]
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; installed: {', '.join(known) or 'none'}"
        raise PluginError(f"no expert or backbone named {name!r} is installed{hint}")
    wanted = []
    for kind in found:
        component = registry().resolve(kind, name, Path())
        wanted += _needed(component.manifest, component.options_model(), {})
    return wanted


def _needed(manifest: Any, model: Any, options: dict[str, Any]) -> list[tuple[str, Any]]:
    """The manifest's assets, or those of them that the options' own `assets()` names."""
    names = None
    if model is not None and hasattr(model, "assets"):
        names = model.model_validate(options).assets()
    return [(manifest.name, asset) for asset in manifest.assets if names is None or asset.name in names]
