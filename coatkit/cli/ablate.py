"""`coatkit ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from coatkit.analysis.ablate_arms import Arm
    from coatkit.analysis.ablate_study import Study


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--suite", type=click.Path(path_type=Path), help="For a training spec: what to evaluate on.")
@click.option("--seeds", metavar="A,B,...", help="Seeds of each arm; else the study's.  [default: 0,1,2]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the base, so every arm.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study; else its `output`.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs trained and asked at once.")
@click.option("--in-process", is_flag=True, help="One after another here: starts faster, but a crash ends it all.")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Then save and stop; go on another time.")
@click.option("--restart", is_flag=True, help="Throw away answers that are there; trained runs stay.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; loads no torch.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json.")
def command(
    spec: Path,
    suite: Path | None,
    seeds: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    jobs: int,
    in_process: bool,
    max_minutes: float | None,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train and evaluate every arm of the study SPEC for each seed, and set the arms side by side.

    SPEC is a study (docs/analysis.md), or a training spec, which gets the paper's arms. Stopped by Ctrl-C or by
    --max-minutes, it goes on where it was when called again. A run that fails is told and stops no other; then the exit
    code is 3.

    \b
    Examples:
      coatkit ablate study.yml --dry-run
      coatkit ablate study.yml --jobs 2 --max-minutes 50
      coatkit ablate spec.yaml --suite suite.yml --seeds 0,1,2
    """
    from coatkit.analysis.ablate_arms import arms_of
    from coatkit.analysis.ablate_study import is_study, read_study, study_of_spec
    from coatkit.errors import RunError, SpecError

    if is_study(spec):
        if suite is not None:
            raise SpecError([f"--suite {suite}: a study says this itself: {spec}"])
        study = read_study(spec, seeds=_numbers(seeds), out=out, overrides=overrides)
    else:
        if suite is None:
            raise SpecError([f"{spec}: is a training spec, so name what to evaluate on: --suite SUITE"])
        study = study_of_spec(spec, suite, seeds=_numbers(seeds), out=out, overrides=overrides)
    if dry_run:
        arms, notes = arms_of(study)
        for line in _plan(study, arms, notes):
            click.echo(line)
        return
    click.echo("loading torch ...", err=True)
    import json

    from coatkit.analysis.ablate import ablate
    from coatkit.analysis.ablate_table import lines_of, remarks

    results = ablate(
        study,
        jobs=jobs,
        in_process=in_process,
        max_minutes=max_minutes,
        restart=restart,
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        for line in [*_aligned(lines_of(results), left=2), *remarks(results)]:
            click.echo(line)
    click.echo(f"{study.output}: table.md, results.json", err=as_json)
    failed = {name: run["reason"] for name, run in results["runs"].items() if run["state"] == "failed"}
    if failed:
        lines = [f"{len(failed)} of {len(results['runs'])} runs failed; called again, they are tried again"]
        raise RunError("\n".join([*lines, *(f"  {name}: {reason}" for name, reason in failed.items())]))


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    from coatkit.errors import SpecError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise SpecError([f"--seeds {text}: expected whole numbers with commas between, like 0,1,2"]) from None


def _plan(study: Study, arms: list[Arm], notes: list[str]) -> list[str]:
    from coatkit.analysis.ablate_arms import controls_of

    by_name = {arm.name: arm for arm in arms}
    table: list[tuple[str, ...]] = [("arm", "steps", "rows", "experts", "differs from the base in")]
    said = []
    for arm in arms:
        parts = arm.parts_from(by_name[arm.baseline])
        mark = "*" if parts else ""
        said += [f"{arm.name}*: not the same training as {arm.baseline}: other {', '.join(parts)}"] if parts else []
        rows = "by tokens" if arm.rows is None else str(arm.rows)
        block = "" if arm.spec.thinking is not None else " (no block)"
        experts = (", ".join(arm.spec.experts) or "none") + block
        table.append(
            (arm.name, f"{arm.spec.total_steps}{mark}", f"{rows}{mark}", experts, " ".join(arm.changes) or "-")
        )
    seeds = ", ".join(map(str, study.spec.seeds))
    lines = [f"{study.name}: base {study.base}, suite {study.suite_path}"]
    lines += [f"  {line}" for line in _aligned(table, left=1, ragged=(3, 4))]
    lines += [*said, *(f"note: {note}" for note in notes)]
    if study.spec.controls:
        lines.append(f"controls of {', '.join(controls_of(study, arms))}: {', '.join(study.spec.controls)}")
    baselines = ", ".join(dict.fromkeys(arm.baseline for arm in arms))
    return [
        *lines,
        f"{len(arms) * len(study.spec.seeds)} runs, seeds {seeds}; compared with {baselines}; {study.output}",
    ]


def _aligned(table: list[tuple[str, ...]], *, left: int, ragged: tuple[int, ...] = ()) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells: Any = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(w) if i < left or i in ragged else c.rjust(w) for i, (c, w) in cells).rstrip())
    return lines
