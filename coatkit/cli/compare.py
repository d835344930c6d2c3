"""`coatkit compare`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print numbers for a program.")
def command(first: Path, second: Path, as_json: bool) -> None:
    """Compare the evaluations in the folders FIRST and SECOND, which `coatkit eval` wrote, row by row.

    The difference of each task comes with a 95 % interval and a p-value of the paired bootstrap; where answers are
    right or wrong, with McNemar's exact test as well. Evaluations of different rows are refused.

    \b
    Example:
      coatkit compare RUN/eval/heldout-untrained RUN/eval/heldout
    """
    import json
    from dataclasses import asdict

    from coatkit.evaluation.compare import compare
    from coatkit.evaluation.metrics import LOWER_IS_BETTER

    found = compare(first, second)
    if as_json:
        data = {name: {"metric": metric, **asdict(pair)} for name, (metric, pair) in found.items()}
        click.echo(json.dumps(data, indent=1))
        return
    table = [("task", "metric", "rows", "first", "second", "difference", "95 % interval", "p", "p (McNemar)")]
    for name, (metric, pair) in found.items():
        exact = "-" if pair.p_mcnemar is None else _p(pair.p_mcnemar)
        table.append(
            (
                name,
                metric + (", lower is better" if metric in LOWER_IS_BETTER else ""),
                str(pair.rows),
                f"{pair.first:.1f}",
                f"{pair.second:.1f}",
                f"{pair.difference:+.1f}",
                f"{pair.low:+.1f} to {pair.high:+.1f}",
                _p(pair.p),
                exact,
            )
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        click.echo("  ".join(cells).rstrip())
    for name, (_, pair) in found.items():
        if pair.left_out:
            click.echo(f"{name}: {pair.left_out} rows left out that the judge did not rate in both")


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
