"""`coatkit data`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

_SHOWN = 30
"""Categories, languages and kinds of bad rows that are printed."""
_BAR = 40


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a page with plots and players.")
@click.option(
    "--rows", default=3, show_default=True, type=click.IntRange(0, 100), help="Rows of each category on the page."
)
@click.option("--by", default="", metavar="KEY", help="Label that is a row's category; else `category`, else `source`.")
@click.option(
    "--headers/--no-headers",
    default=None,
    help="Open every sound, as training does, or none. Else those of rows that do not state their length.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. data.max_seconds=30.")
def command(
    spec: Path, html: Path | None, rows: int, by: str, headers: bool | None, overrides: tuple[str, ...]
) -> None:
    """Look at the rows of SPEC: counts, hours, lengths, categories, bad rows, duplicates. Needs no weights.

    Rows state their length as `duration`, or by `end`. Tokens are an estimate: audio tokens by the backbone's rate,
    text by its bytes. A mixture that is not there yet is drawn.

    \b
    Examples:
      coatkit data examples/quickstart/spec.yaml
      coatkit data spec.yaml --html data.html --rows 5 --by task
      coatkit data spec.yaml --headers
    """
    from coatkit.data.sources import open_data
    from coatkit.data.survey import survey
    from coatkit.errors import SpecError
    from coatkit.files import write_atomic
    from coatkit.plan_rows import Lengths
    from coatkit.spec_data import MixtureSpec
    from coatkit.spec_file import load_spec

    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise SpecError([f"--html {html}: name a file that ends in .html; what is there would be written over"])
    if html is not None and not html.absolute().parent.is_dir():
        raise SpecError([f"--html {html}: there is no folder {html.absolute().parent}"])
    loaded = load_spec(spec, overrides)
    policy = loaded.spec.data
    lengths, notes = _lengths(loaded, Lengths)
    parts: dict[str, tuple[Any, list[str]]] = {}
    for stage in loaded.spec.stages:
        data = loaded.rows_of(stage)
        parts.setdefault(data.model_dump_json(), (data, []))[1].append(stage.name)
    named = [(f"stage {', '.join(stages)}", data) for data, stages in parts.values()]
    named += [("heldout", loaded.located(policy.heldout))] if policy.heldout is not None else []
    found: list[tuple[str, Any]] = []
    for note in (*loaded.notes, *notes):
        click.echo(f"note: {note}")
    for name, data in named:
        # To look is not to train: bad rows are shown here whatever the spec says of them.
        opened = open_data(data, on_bad_row="quarantine", max_bad_rows=sys.maxsize)
        mixed = isinstance(data, MixtureSpec)
        one = survey(
            opened,
            lengths,
            max_seconds=policy.max_seconds,
            learn=policy.learn,
            keep=None if mixed else data.filter,
            headers=headers,
            by=by,
            examples=rows if html is not None else 0,
        )
        if mixed:
            _add_set_aside(one)
        if name == "heldout":
            one.shared = sum(any(key in other.contents for _, other in found) for key in one.contents)
        _print_part(name, one, policy)
        found.append((name, one))
    if html is None:
        return
    from coatkit.data.page import page

    try:
        write_atomic(html, page(f"{loaded.spec.name}: data", found, [*loaded.notes, *notes]))
    except OSError as error:
        raise SpecError([f"--html {html}: cannot be written: {error.strerror or error}"]) from None
    click.echo(f"written: {html} ({html.stat().st_size / 1e6:.1f} MB)")


def _lengths(loaded: Any, make: Any) -> tuple[Any, list[str]]:
    """Audio tokens per second and thinking positions, without importing the backbone's code."""
    manifest = loaded.chosen["backbone"].component.manifest
    thinking = loaded.spec.thinking
    rate = getattr(manifest, "frame_rate", None)
    said = f"{manifest.name}'s {rate:g} audio tokens per second" if rate else "25 audio tokens per second, a guess"
    block = "no thinking block"
    if thinking is not None:
        ratio = thinking.tokens_per_audio_token
        block = f"{ratio:g} thinking position{'' if ratio == 1 else 's'} for each"
    note = f"tokens are estimated: {said}, {block}, and a token for 4 bytes of text"
    return make(rate or 25.0, 0.0 if thinking is None else thinking.tokens_per_audio_token), [note]


def _add_set_aside(found: Any) -> None:
    """Bad rows that were found when the mixture was drawn, which are not in it."""
    from coatkit.data.survey import kind_of
    from coatkit.files import from_json, read_text

    for bad in from_json(read_text(found.path.with_suffix(".json")))["bad_rows"]:
        found.add_bad(bad["reason"], f"not drawn: {kind_of(bad['reason'], bad['file'])}")
        found.count += 1


def _print_part(name: str, found: Any, policy: Any) -> None:
    from coatkit.data.survey import SECONDS, TOKENS, plain

    whole = found.whole
    click.echo(f"{name}: {plain(str(Path(*found.path.parts[-2:])))}")
    repeated = f", {found.repeats:,} of them drawn again" if found.repeats else ""
    left = f"; {found.left_out:,} the filter does not take" if found.left_out else ""
    click.echo(f"  {whole.rows:,} of {found.count:,} rows usable{repeated}{left}; {_hours(whole)} of sound")
    unknown = f", {whole.unknown:,} not known" if whole.unknown else ""
    click.echo(f"  lengths: {found.stated:,} stated by rows, {found.opened:,} from headers{unknown}")
    _print_groups([*list(found.groups.values())[:_SHOWN], *([whole] if len(found.groups) > 1 else [])])
    if len(found.groups) > _SHOWN:
        click.echo(f"    and {len(found.groups) - _SHOWN:,} categories with fewer rows")
    _print_bars("seconds of a row", whole.seconds, SECONDS)
    _print_bars("tokens of a row, estimated", whole.tokens, TOKENS)
    if whole.languages:
        click.echo(f"  languages: {_counted(whole.languages)}")
    for what, same in (("id", found.same_id), ("sounds and text", found.same_content)):
        if same.count:
            click.echo(f"  rows with the {what} of an earlier row: {same.count:,}")
            for place, earlier in same.named[:3]:
                click.echo(f"    {plain(place)} is as {plain(earlier)}")
    if found.shared is not None:
        click.echo(f"  in training too, same sounds and text: {found.shared:,}")
    _print_bad(found, policy)


def _print_groups(groups: list[Any]) -> None:
    from coatkit.data.survey import SECONDS, histogram, middle, plain, used

    bins = used([sum(counts) for counts in zip(*(histogram(g.seconds, SECONDS) for g in groups), strict=True)])
    lines = [("category", "rows", "hours", "text only", "sounds", "turns", "seconds", "tokens", "lengths")]
    for group in groups:
        low, half, high = middle(group.seconds)
        most = middle(group.tokens)
        lines.append(
            (
                plain(group.name, 40),
                f"{group.rows:,}",
                f"{group.hours:,.2f}",
                f"{group.text_only:,}",
                _span(group.sounds),
                _span(group.turns),
                f"{low:.3g} .. {half:.3g} .. {high:.3g}" if group.seconds else "-",
                f"{most[1]:,.0f} .. {most[2]:,.0f}" if group.tokens else "-",
                _spark([histogram(group.seconds, SECONDS)[i] for i in bins]),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [c.rjust(w) if 0 < i < 8 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        click.echo("    " + "  ".join(cells).rstrip())


def _print_bars(title: str, values: Any, edges: tuple[float, ...]) -> None:
    from coatkit.data.survey import bin_name, histogram, used

    counts = histogram(values, edges)
    if not values:
        return
    click.echo(f"  {title}")
    names = {i: bin_name(edges, i) for i in used(counts)}
    width = max(map(len, names.values()))
    for i, name in names.items():
        bar = "#" * max(counts[i] > 0, round(_BAR * counts[i] / max(counts)))
        click.echo(f"    {name:>{width}} {counts[i]:>9,} {bar}".rstrip())


def _print_bad(found: Any, policy: Any) -> None:
    from coatkit.data.survey import plain

    total = found.kinds.total()
    unopened = f"; the sounds of {found.unopened:,} rows were not opened (--headers)" if found.unopened else ""
    if not total:
        click.echo(f"  bad rows: none found{unopened}")
        return
    then = "they would be set aside in training"
    if policy.on_bad_row == "refuse":
        then = "training would stop: data.on_bad_row is refuse"
    elif total > policy.max_bad_rows:
        then = f"training would stop: data.max_bad_rows is {policy.max_bad_rows:,}"
    click.echo(f"  bad rows: {total:,}; {then}{unopened}")
    for kind, count in found.kinds.most_common(_SHOWN):
        click.echo(f"    {count:,} x {kind}")
    click.echo(f"  the first {len(found.bad)} of them:" if total > len(found.bad) else "  they are:")
    for reason in found.bad:
        click.echo(f"    {plain(reason)}")


def _hours(group: Any) -> str:
    return f"{group.hours:,.1f} h" if group.hours >= 1 else f"{60 * group.hours:.1f} min"


def _counted(counts: Any) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(_SHOWN))
    more = len(counts) - _SHOWN
    return shown + (f" and {more:,} more" if more > 0 else "")


def _span(counts: Any) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _spark(counts: list[int]) -> str:
    """One character for each bin, taller for more rows."""
    signs = "▁▂▃▄▅▆▇█"
    try:
        signs.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        signs = ".:-=+*#@"
    most = max(counts, default=0)
    return "".join(" " if not c else signs[min(len(signs) - 1, c * len(signs) // (most + 1))] for c in counts)
