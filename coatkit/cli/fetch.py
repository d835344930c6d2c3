"""`coatkit fetch`."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("what")
@click.option("--lock", type=click.Path(path_type=Path), help="Check and pin SHA-256 in this file too, to share it.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the spec first.")
def command(what: str, lock: Path | None, overrides: tuple[str, ...]) -> None:
    """Bring the weights that WHAT needs into the cache: a spec file, or the name of an expert or backbone.

    Files are verified by SHA-256: the plugin's, or the one pinned when the file was first fetched, in the cache's
    assets.lock and in the file given with --lock. An interrupted download goes on where it stopped. Nothing else in
    coatkit downloads. COATKIT_CACHE moves the cache.

    \b
    Examples:
      coatkit fetch examples/quickstart/spec.yaml
      coatkit fetch mini
      coatkit fetch spec.yaml --lock coatkit.lock
    """
    from coatkit.assets import fetch, present

    wanted = _of_spec(Path(what), overrides) if what.endswith((".yaml", ".yml")) else _of_name(what)
    if not wanted:
        click.echo("nothing to fetch: everything ships with its package")
    for owner, asset in wanted:
        size = f", {asset.size / 1e6:.0f} MB" if asset.size else ""
        there = present(owner, asset)
        click.echo(f"{owner}: {asset.name} ({asset.licence}{size}): {'in the cache' if there else 'fetching'}")
        digest = fetch(owner, asset, _show if sys.stderr.isatty() else None, lock)
        how = "as the plugin says" if asset.sha256 else "pinned" if not there else "as pinned"
        click.echo(f"  SHA-256 {digest}, {how}")


def _show(name: str, done: int, total: int | None) -> None:
    end = done == total
    share = f" of {total / 1e6:.0f}" if total else ""
    click.echo(f"\r  {name}: {done / 1e6:.0f}{share} MB", nl=end, err=True)


def _of_spec(path: Path, overrides: tuple[str, ...]) -> list[tuple[str, Any]]:
    from coatkit.spec_file import load_spec

    return load_spec(path, overrides, need="components").assets()


def _of_name(name: str) -> list[tuple[str, Any]]:
    from coatkit.assets import needed
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
    wanted: list[tuple[str, Any]] = []
    for kind in found:
        component = registry().resolve(kind, name, Path())
        wanted += needed(component.manifest, component.options_model(), {})
    return wanted
