"""`coatkit latency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_LINE_EVERY = 15.0
"""Seconds between lines of progress."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Rows to ask about; else the run's data.heldout.")
@click.option("--ranges", default="0-5,5-10,10-30", show_default=True, help="Ranges of durations, in seconds.")
@click.option("--arms", default="vanilla,cot,coat", show_default=True, help="Ways to answer that are measured.")
@click.option("--rows", default=8, show_default=True, type=click.IntRange(1), help="Rows of each range in a repeat.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Seeds of rows and order.")
@click.option("--warmup", default=1, show_default=True, type=click.IntRange(0), help="Rounds that do not count.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1, 4096), help="Longest answer.")
@click.option(
    "--max-thought-tokens", default=256, show_default=True, type=click.IntRange(1, 4096), help="Longest thought of cot."
)
@click.option("--exactly", is_flag=True, help="Decode as many tokens as that, whatever is said.")
@click.option("--fill", is_flag=True, help="Make sounds of the rows' sounds for ranges that lack rows.")
@click.option("--keep-adapters", is_flag=True, help="Leave adapters beside the weights, in all arms.")
@click.option("--server", "servers", multiple=True, metavar="[ARM=]URL", help="Of a vLLM to measure; for coat, or ARM.")
@click.option("--bench", default="vllm bench serve", show_default=True, help="With --server: vLLM's benchmark.")
@click.option("--records", type=click.Path(path_type=Path), help="Measure nothing: report on this records.jsonl.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; else RUN/latency.")
@click.option("--restart", is_flag=True, help="Throw away the records that are there.")
@click.option("--device", help="Torch device; the best there is when left out.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json.")
def command(
    run: Path,
    data: Path | None,
    ranges: str,
    arms: str,
    rows: int,
    repeats: int,
    warmup: int,
    max_new_tokens: int,
    max_thought_tokens: int,
    exactly: bool,
    fill: bool,
    keep_adapters: bool,
    servers: tuple[str, ...],
    bench: str,
    records: Path | None,
    out: Path | None,
    restart: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure how long RUN takes to its first token and to a whole answer, by duration of the sound.

    The arms take turns on each row: vanilla, the model as before training and without the thinking block; cot, the same
    asked to reason in words; coat, the trained model with its block. Writes records.jsonl, one line per request,
    results.json, a table (latency.md) and a plot (latency.png).

    \b
    Examples:
      coatkit latency RUN
      coatkit latency RUN --data test.jsonl --ranges 0-5,5-10,10-30 --rows 20 --repeats 5
      coatkit latency RUN --exactly --max-new-tokens 32 --arms vanilla,coat
      coatkit latency RUN --server http://localhost:8000 --server vanilla=http://localhost:8001
      coatkit latency RUN --records records.jsonl --out report
    """
    import json

    from coatkit.analysis.latency import ARMS, read_requests, read_spans, record, report, table
    from coatkit.errors import RunError, SpecError
    from coatkit.spec_reader import near

    spans, chosen = read_spans(ranges), [word.strip() for word in arms.split(",")]
    for arm in chosen:
        if arm not in ARMS:
            raise SpecError([f"--arms {arm!r}: there is no such arm{near(arm, list(ARMS))}"])
        if chosen.count(arm) > 1:
            raise SpecError([f"--arms: {arm} is named twice"])
    folder = out or run / "latency"
    if (folder / "records.jsonl").exists() and not restart and records is None:
        raise RunError(
            f"{folder}: holds records already; write elsewhere with --out FOLDER, or throw them away with --restart"
        )
    about: dict[str, Any]
    if records is not None:
        requests = read_requests(records)
        about = {"run": str(run), "source": str(records), "notes": []}
    else:
        from coatkit.evaluation.text import library

        library("matplotlib.figure")  # told before anything is measured
        opened = _opened(run, data)
        from coatkit.analysis import latency_local as local

        limits = local.Limits(max_new_tokens, max_thought_tokens, exactly)
    if records is None and servers:
        import shlex

        from coatkit.analysis import latency_server as remote

        at = {arm: remote.Server.at(url) for arm, url in _addresses(servers).items()}
        pool = local.gather(opened, spans, remote.anything(), per=rows, repeats=repeats, fill=fill)
        counts: Any = {"per": rows, "repeats": repeats, "warmup": warmup}
        asked = remote.measure(at, pool, limits, command=shlex.split(bench), say=_Progress(), **counts)
        requests = record(folder / "records.jsonl", asked)
        about = {"run": str(run), "source": f"{bench}, one request at a time", "notes": pool.notes}
        about |= {"servers": {arm: server.url for arm, server in at.items()}}
    elif records is None:
        models = local.load_arms(run, chosen, device=device, merged=not keep_adapters)
        preparer = models[chosen[0]].backbone.preparer
        pool = local.gather(opened, spans, preparer, per=rows, repeats=repeats, fill=fill)
        made = local.measure(models, pool, limits, per=rows, repeats=repeats, warmup=warmup, say=_Progress())
        requests = record(folder / "records.jsonl", made)
        about = local.about(run, models, limits, pool, repeats=repeats, warmup=warmup, merged=not keep_adapters)
    results = report(folder, requests, about)
    if as_json:
        click.echo(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join([*table(results["cells"]), *results["notes"]]))
    files = "results.json, latency.md, latency.png" + (", records.jsonl" if records is None else "")
    click.echo(f"{folder}: {files}", err=as_json)


def _addresses(servers: tuple[str, ...]) -> dict[str, str]:
    """Addresses by arm.

    Raises:
        SpecError: If two are of one arm.
    """
    from coatkit.errors import SpecError

    found: dict[str, str] = {}
    for word in servers:
        arm, equals, url = word.partition("=")
        arm, url = (arm, url) if equals and "/" not in arm else ("coat", word)
        if arm in found:
            raise SpecError([f"--server: {arm} is named twice; write ARM=URL for each"])
        found[arm] = url
    return found


def _opened(run: Path, data: Path | None) -> Any:
    """The rows to ask about.

    Raises:
        RunError: If none are named and the run has none of its own.
    """
    from coatkit.data.sources import open_data
    from coatkit.errors import RunError
    from coatkit.run_folder import RunFolder
    from coatkit.spec_data import SourceSpec
    from coatkit.spec_file import load_spec

    folder = RunFolder(run)
    folder.read_record()
    if data is not None:
        return open_data(SourceSpec(path=str(data)))
    loaded = load_spec(folder.spec, need="backbone")
    if loaded.spec.data.heldout is None:
        raise RunError(f"{run}: its spec names no data.heldout; name rows with --data")
    return open_data(loaded.located(loaded.spec.data.heldout))


class _Progress:
    """A line at the start and every 15 seconds."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.said = 0.0

    def __call__(self, done: int, total: int) -> None:
        import time

        now = time.monotonic()
        if self.begun is None:
            self.begun = self.said = now
            click.echo(f"warmed up; {total} requests", err=True)
        elif now - self.said >= _LINE_EVERY and done < total:
            click.echo(f"{done}/{total}, {(now - self.begun) / done * (total - done) / 60:.1f} min left", err=True)
            self.said = now
