"""`coatkit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_LINE_EVERY = 15.0
"""Seconds between lines of progress."""


def _rubric(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from coatkit.evaluation.rubric import rubric

        click.echo(rubric(), nl=False)
        ctx.exit()


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Rows in any format coatkit reads, or a suite (.yaml) that names tasks.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="For rows: exact, choice, likelihood, f1, note, wer, bleu, chrf, judge; else each row's.",
)
@click.option("--choices", metavar="A,B,...", help="For rows: the answers there are, for choice, likelihood and f1.")
@click.option("--reference", metavar="KEY", help="For rows: key of the right answer; else the last assistant message.")
@click.option("--max-new-tokens", type=click.IntRange(1, 4096), help="For rows: longest answer. [default: 64]")
@click.option(
    "--judge",
    multiple=True,
    metavar="KEY=VALUE",
    help="For the metric judge: model=NAME, base_url=URL, ..., over the suite's.",
)
@click.option(
    "--show-rubric",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_rubric,
    help="Print what a judge is told.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first rows of each task.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Rows asked together.")
@click.option("--untrained", is_flag=True, help="The model as it was before training.")
@click.option("--vanilla", is_flag=True, help="As before training, and without the thinking block.")
@click.option("--cot", is_flag=True, help="Ask it to reason in words first (text chain-of-thought), a baseline.")
@click.option("--max-thought-tokens", type=click.IntRange(1, 4096), help="With --cot: longest thought. [default: 256]")
@click.option(
    "--shuffle-audio", is_flag=True, help="Exchange sounds between the rows of a task: what needs no hearing."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of --shuffle-audio.")
@click.option("--skip-bad", is_flag=True, help="Leave bad rows out and list them, where else they are refused.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; else RUN/eval/NAME.")
@click.option("--restart", is_flag=True, help="Throw away the answers that are there.")
@click.option("--device", help="Torch device; the best there is when left out.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json.")
def command(
    run: Path,
    data: Path,
    metric: str | None,
    choices: str | None,
    reference: str | None,
    max_new_tokens: int | None,
    judge: tuple[str, ...],
    limit: int | None,
    batch: int,
    untrained: bool,
    vanilla: bool,
    cot: bool,
    max_thought_tokens: int | None,
    shuffle_audio: bool,
    seed: int,
    skip_bad: bool,
    out: Path | None,
    restart: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Ask the trained model in RUN about every row of --data, greedily, and score what it says.

    Writes predictions.jsonl, batch by batch, and results.json. Stopped, it goes on where it was when called again.

    \b
    Examples:
      coatkit eval RUN --data heldout.jsonl --metric exact
      coatkit eval RUN --data suite.yaml
      coatkit eval RUN --data suite.yaml --shuffle-audio
      coatkit eval RUN --data suite.yaml --vanilla --cot
      coatkit eval RUN --data test.jsonl --metric choice --choices speech,music,noise
      coatkit eval RUN --data open.jsonl --metric judge --judge model=NAME --judge base_url=URL
    """
    import json

    from coatkit.errors import SpecError

    if max_thought_tokens is not None and not cot:
        raise click.UsageError("--max-thought-tokens: there is no thought in words without --cot")
    options = {"metric": metric, "choices": choices, "reference": reference, "max_new_tokens": max_new_tokens}
    given = {key: value for key, value in options.items() if value is not None}
    if metric is not None:
        from coatkit.evaluation.suite import METRICS
        from coatkit.spec_reader import near

        if metric not in METRICS:
            raise SpecError([f"--metric {metric}: there is no such metric{near(metric, METRICS)}"])
    put: dict[str, Any] = {}
    if judge:
        from coatkit.evaluation.suite import read_options

        put = read_options(judge)
    if data.suffix in (".yaml", ".yml"):
        if given:
            names = ", ".join(f"--{key.replace('_', '-')}" for key in given)
            raise SpecError([f"{names}: a suite says this itself, for each task: {data}"])
        from coatkit.evaluation.suite import read_suite

        suite = read_suite(data, put)
        from coatkit.evaluation.items import tasks_of_suite

        name, tasks = suite.name or data.stem, tasks_of_suite(suite, limit)
    else:
        from coatkit.evaluation.items import tasks_of_rows
        from coatkit.evaluation.suite import read_judge

        words = None if choices is None else [word.strip() for word in choices.split(",")]
        tasks = tasks_of_rows(
            data,
            metric=metric,
            choices=words,
            reference=reference,
            max_new_tokens=max_new_tokens or 64,
            limit=limit,
            judge=read_judge(put) if put else None,
        )
        name = data.stem
        if put and all(task.spec.metric != "judge" for task in tasks):
            raise SpecError(["--judge: no row has the metric judge; say --metric judge"])
    from coatkit.evaluation.cot import THOUGHT_TOKENS
    from coatkit.evaluation.evaluate import evaluate

    folder, results = evaluate(
        run,
        name,
        tasks,
        out=out,
        trained=not (untrained or vanilla),
        block=not vanilla,
        cot=(max_thought_tokens or THOUGHT_TOKENS) if cot else None,
        shuffle=seed if shuffle_audio else None,
        batch=batch,
        skip_bad=skip_bad,
        restart=restart,
        device=device,
        say=_Progress("asking about {} rows{}", "answered", "rows"),
        say_judged=_Progress("asking the judge about {} answers{}", "rated", "answers judged"),
    )
    click.echo(json.dumps(results, indent=1, ensure_ascii=False) if as_json else "\n".join(_table(results)))
    click.echo(f"{folder}: predictions.jsonl, results.json", err=as_json)


class _Progress:
    """A line at the start and every 15 seconds."""

    def __init__(self, start: str, before: str, what: str) -> None:
        self.start, self.before, self.what = start, before, what
        self.begun: tuple[float, int] | None = None
        self.said = 0.0

    def __call__(self, done: int, total: int) -> None:
        import time

        now = time.monotonic()
        if self.begun is None:
            self.begun, self.said = (now, done), now
            there = f", {done} {self.before} already" if done else ""
            click.echo(self.start.format(total, there), err=True)
        elif now - self.said >= _LINE_EVERY and done < total:
            left = (now - self.begun[0]) / (done - self.begun[1]) * (total - done)
            click.echo(f"{done}/{total} {self.what}, {left / 60:.1f} min left", err=True)
            self.said = now


def _table(results: dict[str, Any]) -> list[str]:
    what = [f"{results['run']}, " + (f"step {results['step']}" if results["trained"] else "untrained")]
    what += [] if results["block"] else ["without the thinking block"]
    what += [] if results["cot"] is None else [f"text chain-of-thought of up to {results['cot']} tokens"]
    what += [] if results["shuffled_sounds"] is None else [f"sounds SHUFFLED (seed {results['shuffled_sounds']})"]
    lines = [f"{'; '.join(what)}: {results['data']}"]
    rows = [("task", "metric", "rows", "score", "95 % interval", "unread", "most frequent")]
    for name, task in results["tasks"].items():
        unread = "-" if "parse_failures" not in task else f"{task['parse_failures']}"
        frequent = task["details"].get("most_frequent_reference")
        span = "-" if task["low"] is None else f"{task['low']:.1f} to {task['high']:.1f}"
        rows.append((name, task["metric"], str(task["rows"]), _number(task["score"]), span, unread, _number(frequent)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    for name, task in results["tasks"].items():
        if task["bad"]:
            lines.append(f"  {name}: {task['bad']} bad rows left out, first: {task['bad_rows'][0]['reason']}")
        if task["empty_references"]:
            lines.append(f"  {name}: {task['empty_references']} rows whose reference is empty do not count")
        if task.get("judge_failures"):
            reason = next(iter(task["judge_failure_reasons"]))
            lines.append(
                f"  {name}: {task['judge_failures']} answers have no rating and do not count; the same command asks for"
                f" them again. First reason: {reason}"
            )
        if task.get("cot_unfinished"):
            lines.append(f"  {name}: {task['cot_unfinished']} rows came to no 'Answer:'; all they said counts")
        if task.get("own_sound"):
            lines.append(f"  {name}: {task['own_sound']} rows kept their own sound")
    if any("parse_failures" in task for task in results["tasks"].values()):
        lines.append("  unread: answers that name no option or several; they count as wrong")
    if any("most_frequent_reference" in task["details"] for task in results["tasks"].values()):
        lines.append("  most frequent: the score of always giving the most frequent right answer, without listening")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
