"""`coatkit mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--stage", metavar="NAME", help="Only the mixture of this stage.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write here; else into the cache.")
@click.option("--dry-run", is_flag=True, help="Print the numbers alone.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. data.mixture.rows=20.")
def command(spec: Path, stage: str | None, out: Path | None, dry_run: bool, overrides: tuple[str, ...]) -> None:
    """Draw the mixtures of SPEC into shuffled Parquet files, each with a sidecar that says what was drawn.

    Training draws what is not there by itself, into the same cache, and uses it again. The same spec and the same
    rows give the same mixture.

    \b
    Examples:
      coatkit mix examples/mixture/spec.yaml
      coatkit mix spec.yaml --dry-run --set data.mixture.max_epochs=2
      coatkit mix spec.yaml --stage multi-task --out mixed.parquet
    """
    from coatkit.errors import SpecError
    from coatkit.spec_data import MixtureSpec
    from coatkit.spec_file import load_spec
    from coatkit.spec_reader import near

    loaded = load_spec(spec, overrides)
    stages = loaded.spec.stages
    if stage is not None and stage not in (names := [s.name for s in stages]):
        raise SpecError([f"{spec}: there is no stage {stage!r}{near(stage, names)}"])
    found: dict[str, tuple[MixtureSpec, list[str]]] = {}
    for one in stages:
        data = loaded.rows_of(one)
        if isinstance(data, MixtureSpec) and stage in (None, one.name):
            found.setdefault(data.model_dump_json(), (data, []))[1].append(one.name)
    if not found:
        which = "no stage" if stage is None else f"stage {stage!r} does not draw"
        raise SpecError([f"{spec}: {which}{' draws' if stage is None else ''} from a mixture; write data.mixture"])
    if out is not None and len(found) > 1:
        stages_ = "; ".join(", ".join(names) for _, names in found.values())
        raise SpecError([f"--out: the stages draw from {len(found)} mixtures ({stages_}); name one with --stage"])
    from coatkit.data.mixture import mix

    policy = loaded.spec.data
    for data, names in found.values():
        click.echo(f"stage {', '.join(names)}: {data.rows:,} rows, seed {data.seed}")
        made = mix(data, out, on_bad_row=policy.on_bad_row, max_bad_rows=policy.max_bad_rows, dry=dry_run)
        _print_table(made.data)
        if not made.there:
            click.echo("not written: a dry run")
            continue
        how = "written" if made.made else "there already"
        size = made.path.stat().st_size
        click.echo(f"{how}: {made.path} ({f'{size / 1e6:.1f} MB' if size > 1e6 else f'{size / 1e3:.0f} kB'})")
        click.echo(f"what was drawn: {made.path.with_suffix('.json')}")


def _print_table(data: dict[str, Any]) -> None:
    lines: list[tuple[str, ...]] = [("category", "source", "pool", "requested", "actual", "epochs", "a row comes")]
    for category in data["categories"]:
        sources = category["sources"]
        alone = len(sources) == 1
        lines.append((category["category"], _named(sources[0]) if alone else "", *_numbers(category)))
        lines += [("", _named(source), *_numbers(source)) for source in sources if not alone]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  " + "  ".join(cells).rstrip())
    asked = "" if data["rows"] == data["requested"] else f" of {data['requested']:,} asked for"
    bad = f"; {len(data['bad_rows'])} bad rows set aside" if data["bad_rows"] else ""
    click.echo(f"  {data['rows']:,} rows{asked}{bad}")


def _numbers(entry: dict[str, Any]) -> tuple[str, ...]:
    least, most = entry["repeats"]
    times = f"{least} x" if least == most else f"{least} to {most} x"
    return f"{entry['pool']:,}", f"{entry['requested']:,}", f"{entry['actual']:,}", f"{entry['epochs']:.3g}", times


def _named(source: dict[str, Any]) -> str:
    """The end of its path, its filter, and how many rows it has where not all may be drawn."""
    kept = {**source["filter"].get("where", {}), **{k: v for k, v in source["filter"].items() if k != "where"}}
    filters = "".join(f", {key}: {_values(value)}" for key, value in kept.items())
    left = f" (of {source['rows']:,})" if source["pool"] < source["rows"] else ""
    return f"{Path(*Path(source['path']).parts[-2:])}{filters}{left}"


def _values(value: Any) -> str:
    import json

    values = value if isinstance(value, list) else [value]
    return "/".join(one if isinstance(one, str) else json.dumps(one) for one in values)
