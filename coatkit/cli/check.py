"""`coatkit check`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. stages.0.steps=20.")
def command(spec: Path, overrides: tuple[str, ...]) -> None:
    """Check SPEC: keys, types, plugins, options and files. Loads no torch and runs no user code.

    Exits with 0 when all is well, and with 2 after naming every problem.

    \b
    Example:
      coatkit check examples/quickstart/spec.yaml
    """
    from coatkit.assets import present
    from coatkit.spec_file import load_spec

    loaded = load_spec(spec, overrides)
    checked = loaded.spec
    click.echo(f"{spec}: ok")
    for place, chosen in loaded.chosen.items():
        if not place.startswith("heads."):
            component = chosen.component
            click.echo(f"  {place}: {component.use} ({component.distribution} {component.version})".replace(" )", ")"))
    for stage in checked.stages:
        teachers = ", ".join(f"{name} x {stage.weights[name]:g}" for name in stage.active) or "none"
        click.echo(f"  stage {stage.name}: {stage.steps} steps, experts {teachers}")
    for owner, asset in loaded.assets():
        if not present(owner, asset):
            click.echo(f"  missing: {owner}: {asset.name} ({asset.licence}); coatkit fetch {spec}")
    for note in loaded.notes:
        click.echo(f"  note: {note}")
