"""`coatkit doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("place", type=click.Path(path_type=Path, exists=True), required=False, metavar="[SPEC|RUN]")
@click.option("--all", "everything", is_flag=True, help="Read all fetched weights, not only the first 2 GB.")
def command(place: Path | None, everything: bool) -> None:
    """Look at the environment, the plugins, the cache and the machine, and at a SPEC or RUN; say what is wrong.

    Loads no torch, fetches nothing, and runs no code of a spec or run. Exits with 0 when all is well, and with 1 when
    something is wrong; each such line is followed by its remedy.

    \b
    Examples:
      coatkit doctor
      coatkit doctor examples/quickstart/spec.yaml
      coatkit doctor examples/quickstart/runs/quickstart --all
    """
    from coatkit.doctor import examine

    wrong = 0
    for finding in examine(place, everything=everything):
        wrong += finding.state == "wrong"
        click.echo(f"{finding.state:5}  {_plain(finding.what)}")
        if finding.remedy:
            click.echo(f"       -> {_plain(finding.remedy)}")
    click.echo(f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong" if wrong else "nothing is wrong")
    sys.exit(1 if wrong else 0)


def _plain(text: str) -> str:
    """What was found, which may hold what a file says: nothing that a terminal would obey."""
    from coatkit.errors import printable

    return printable(text[:2_000], "\n").replace("\n", "\n       ")
