"""`coatkit probe`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Rows, or a suite (.yml, .yaml).")
@click.option("--label", metavar="KEY", help="Of the rows: what to read off the states.  [default: the right answer]")
@click.option("--group", metavar="KEY", help="Of the rows: speaker or track, never on both sides.  [default: the file]")
@click.option("--steps", default="all", show_default=True, help="Checkpoints, e.g. 0,500,1000; 0 is before training.")
@click.option("--c", "c", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="C.")
@click.option("--folds", default=5, show_default=True, type=click.IntRange(2), help="Of the cross-validation.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of folds, shuffled labels and bootstrap.")
@click.option("--correct", type=click.Path(path_type=Path, file_okay=False), help="An evaluation of the same rows.")
@click.option("--metric", default="exact", show_default=True, help="Of rows that are no suite: exact or choice.")
@click.option("--limit", type=click.IntRange(1), help="Take the first so many rows of each task.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Rows heard together.")
@click.option("--skip-bad", is_flag=True, help="Leave bad rows out.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; else RUN/probe/NAME.")
@click.option("--device", help="Torch device; the best there is when left out.")
def command(
    run: Path,
    data: Path,
    label: str | None,
    group: str | None,
    steps: str,
    c: float,
    folds: int,
    seed: int,
    correct: Path | None,
    metric: str,
    limit: int | None,
    batch: int,
    skip_bad: bool,
    out: Path | None,
    device: str | None,
) -> None:
    """Say what can be read off the states of RUN, over its checkpoints, with linear probes.

    Probes read the mean thinking state and the state before the answer; as controls, the stock model's state before the
    answer, and shuffled labels. Then: does the probe's confidence foretell whether the run's answer is right? Writes
    results.json, table.md and probe.png. Called again, it uses the states that are there. Needs the extra: pip install
    'coatkit[analysis]'.

    \b
    Examples:
      coatkit probe RUN --data suite.yml
      coatkit probe RUN --data test.jsonl --label emotion --group speaker --c 0.01 --steps 0,500,1000
      coatkit probe RUN --data suite.yml --correct RUN/eval/heldout
    """
    from coatkit.errors import SpecError
    from coatkit.evaluation.suite import read_suite
    from coatkit.run_folder import RunFolder

    RunFolder(run).read_record()
    chosen = None
    if steps != "all":
        try:
            chosen = [int(word) for word in steps.split(",")]
        except ValueError:
            raise SpecError([f"--steps {steps}: write numbers of steps, e.g. 0,500,1000, or all"]) from None
    if metric not in ("exact", "choice"):
        raise SpecError([f"--metric {metric}: answers must be right or wrong here: exact or choice"])
    from coatkit.evaluation.items import tasks_of_rows, tasks_of_suite

    if data.suffix in (".yaml", ".yml"):
        suite = read_suite(data)
        name, tasks = suite.name or data.stem, tasks_of_suite(suite, limit)
    else:
        name, tasks = data.stem, tasks_of_rows(data, metric=metric, limit=limit)
    from coatkit.analysis.probe import Settings
    from coatkit.analysis.probe_report import run_probes, table

    folder = out or run / "probe" / name
    results = run_probes(
        run,
        tasks,
        folder,
        label=label,
        group=group,
        steps=chosen,
        correct=correct,
        settings=Settings(c, folds, seed),
        batch=batch,
        skip_bad=skip_bad,
        device=device,
        say=lambda line: click.echo(line, err=True),
    )
    for line in table(results):
        click.echo(line)
    click.echo(f"{click.format_filename(folder)}: results.json, table.md, probe.png")
