"""`coatkit new`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from coatkit.manifest import Kind


@click.command()
@click.argument("kind", type=click.Choice(["expert", "head", "backbone"]))
@click.argument("name")
@click.option(
    "--to",
    "folder",
    default=".",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder the package's folder is made in.",
)
@click.option(
    "--license",
    "licence",
    default="apache-2.0",
    show_default=True,
    type=click.Choice(["apache-2.0", "mit", "bsd-3-clause", "none"]),
    help="Licence of your code; none leaves it out.",
)
def command(kind: Kind, name: str, folder: Path, licence: str) -> None:
    """Start a plugin package of your own: an expert, a head or a backbone called NAME.

    What it writes installs, is listed and passes its conformance suite at once: a small real encoder, network or model
    stands where yours goes, marked TODO. Nothing is written where the name is taken or the folder is there.

    \b
    Examples:
      coatkit new expert timbre
      coatkit new head pooled --to ~/plugins --license mit
      coatkit new backbone my-model
    """
    from coatkit.scaffold import write_package

    place = write_package(kind, name, folder, licence)
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        click.echo(f"  {path.relative_to(place)}")
    click.echo(f"{place}: written. Next:\n  cd {place}\n  pip install -e '.[test]'\n  pytest -rs\n  grep -rn TODO .")
