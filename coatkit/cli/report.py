"""`coatkit report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="The page; else report.html in the first RUN."
)
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """One page on one run, or on several side by side.

    What differs in their specs, the curve of every loss term, which teachers pull apart (where the spec said
    gradients_every), evaluations, probes, latency and views that are in their folders, and what they were made with.
    The page needs no network. Needs the extra: pip install 'coatkit[analysis]'.

    \b
    Examples:
      coatkit report RUN
      coatkit report runs/sft runs/all --out sft-and-all.html
    """
    from coatkit.analysis.report import report

    click.echo(report(runs, out or runs[0] / "report.html"))
