"""`coatkit plugins`."""

from __future__ import annotations

import click


@click.command()
def command() -> None:
    """List installed experts, heads and backbones, and plugins that failed to load.

    \b
    Example:
      coatkit plugins
    """
    from coatkit.plugins import all_manifests, registry

    header = ("kind", "name", "dim", "rate", "weights", "from", "summary")
    rows = [header]
    for installed in all_manifests():
        m = installed.manifest
        rate = "-" if m.frame_rate is None else f"{m.frame_rate:.4g} Hz"
        dim = "-" if m.dim is None else str(m.dim)
        origin = f"{installed.distribution} {installed.version}"
        rows.append((m.kind, m.name, dim, rate, m.weights_licence, origin, m.summary))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        click.echo(f"{'  '.join(cells)}  {row[-1]}".rstrip())
    for (kind, name), offers in registry().installed.items():
        if len(offers) > 1:
            sides = " and ".join(f"{o.distribution} {o.version}" for o in offers)
            click.echo(f"conflict: {kind} {name} is offered by {sides}; uninstall one", err=True)
    for broken in registry().broken:
        click.echo(f"failed: {broken.distribution} {broken.version} ({broken.entry_point}): {broken.error}", err=True)
