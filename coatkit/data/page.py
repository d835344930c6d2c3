"""What rows hold, as one page of HTML (`coatkit.page`): plots, tables, and players of sounds that are inside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coatkit.data import audio as sound
from coatkit.data.rows import AudioRef, Row
from coatkit.data.survey import SECONDS, TOKENS, Group, Same, Survey, bin_name, histogram, middle, plain, used
from coatkit.errors import DataError
from coatkit.page import Html, base64_wav, paragraph, player_of, table, text
from coatkit.page import page as whole_page

CLIP_SECONDS = 10.0
"""Of a sound, that are put in."""
SOUND_BYTES = 16_000_000
"""Of all sounds on a page together, at most."""
_RATE = 24_000
"""Hz; what is higher is resampled, for players only."""
_TEXT = 600
"""Characters of a turn that are shown."""
_GROUPS = 60
"""Categories that are shown with plots and rows."""

_STYLE = """
h2.part { margin: 2.5rem 0 .5rem; }
h4 { font-size: .8rem; font-weight: 600; margin: 0; color: var(--soft); }
.card table { width: 100%; }
.card td { white-space: nowrap; }
.card td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; display: block; }
svg rect { fill: var(--mark); }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
.row { border-top: 1px solid var(--line); padding: .7rem 0 .2rem; }
.row p { margin: .15rem 0; white-space: pre-wrap; }
.who { color: var(--soft); display: inline-block; min-width: 5.5rem; }
.row audio { max-width: 28rem; margin: .35rem 0; }
.bad, .bad code { color: var(--bad); }
"""


def page(title: str, parts: Sequence[tuple[str, Survey]], notes: Sequence[str] = (), limit: int = SOUND_BYTES) -> str:
    """A page of plots, tables and players.

    Args:
        parts: What some rows are for, e.g. `stage one`, and what was found in them; players are of their examples.
        notes: What is to be said before.
        limit: Bytes of all players' sounds together, as they stand in the page.
    """
    clips = _clips([group for _, found in parts for group in _shown(found)], limit)
    heard = sum(len(clip.data) for clip in clips.values())
    players = paragraph(
        f"Players hold the first {CLIP_SECONDS:g} s of a sound, mono, at {_RATE // 1000} kHz at most:"
        f" {heard / 1e6:.1f} MB of at most {limit / 1e6:g} MB in this page.",
        "soft",
    )
    body = [players, *(_part(name, found, clips) for name, found in parts)]
    return whole_page(title, body, notes=notes, style=_STYLE, playhead=False)


@dataclass(frozen=True)
class _Clip:
    """A sound for a player: base64 text, or why there is none."""

    data: str = ""
    reason: str = ""


def _clips(groups: Sequence[Group], limit: int) -> dict[AudioRef, _Clip]:
    """Sounds of the groups' examples: the first of every group before the second of any, for there is a limit."""
    clips: dict[AudioRef, _Clip] = {}
    left = limit
    for turn in range(max((len(group.examples) for group in groups), default=0)):
        for row in (group.examples[turn] for group in groups if turn < len(group.examples)):
            for ref in row.audios:
                if ref in clips:
                    continue
                clip = _clip(ref) if left else _Clip()
                if len(clip.data) > left or not left:
                    clip = _Clip(reason="left out: the page holds as many sounds as it may")
                left -= len(clip.data)
                clips[ref] = clip
    return clips


def _clip(ref: AudioRef) -> _Clip:
    try:
        seconds = min(sound.duration(ref), CLIP_SECONDS)
        samples, rate = sound.read(replace(ref, end=(ref.start or 0.0) + seconds), CLIP_SECONDS + 1)
    except DataError as error:
        return _Clip(reason=str(error))
    if rate > _RATE:
        samples, rate = sound.resample(samples, rate, _RATE), _RATE
    return _Clip(base64_wav(samples, rate))


def _shown(found: Survey) -> list[Group]:
    return list(found.groups.values())[:_GROUPS]


def _part(name: str, found: Survey, clips: dict[AudioRef, _Clip]) -> Html:
    whole, groups = found.whole, _shown(found)
    facts = [f"{whole.rows:,} of {found.count:,} rows usable", f"{whole.hours:,.2f} h of sound"]
    facts += [f"{found.repeats:,} drawn again"] if found.repeats else []
    facts += [f"{found.left_out:,} that the filter does not take"] if found.left_out else []
    facts += [f"{whole.unknown:,} of unknown length"] if whole.unknown else []
    facts += [f"lengths: {found.stated:,} stated by rows, {found.opened:,} from headers"]
    facts += [f"{found.unopened:,} rows' sounds were not opened"] if found.unopened else []
    facts += [f"in training too, same sounds and text: {found.shared:,}"] if found.shared is not None else []
    facts += [] if found.kinds else ["no bad rows found"]
    more = len(found.groups) - len(groups)
    parts = [
        Html(f'<h2 class="part">{text(name)}: {text(str(Path(*found.path.parts[-2:])))}</h2>\n'),
        paragraph("; ".join(facts)),
        _card(_plots(whole)),
        _card(_table([*groups, whole] if len(groups) > 1 else groups)),
        *([paragraph(f"{more:,} more categories are not shown.", "soft")] if more > 0 else []),
        _bad(found),
        _same("id", found.same_id),
        _same("sounds and text", found.same_content),
        *(_group(group, clips, len(groups) > 1) for group in groups),
    ]
    return Html("".join(parts))


def _card(*parts: Html) -> Html:
    return Html(f'<div class="card">{"".join(parts)}</div>\n')


def _table(groups: Sequence[Group]) -> Html:
    heads = ["category", "rows", "hours", "text only", "sounds", "turns"]
    heads += ["seconds: least, median, most", "tokens: median, most", "languages"]
    lines = []
    for group in groups:
        seconds, tokens = middle(group.seconds), middle(group.tokens)
        languages = [name for name, _ in group.languages.most_common(6)]
        cells = (
            group.name,
            f"{group.rows:,}",
            f"{group.hours:,.2f}",
            f"{group.text_only:,}",
            _span(group.sounds),
            _span(group.turns),
            " · ".join(f"{value:.3g}" for value in seconds) if group.seconds else "-",
            f"{tokens[1]:,.0f} · {tokens[2]:,.0f}" if group.tokens else "-",
            ", ".join(languages) + (" ..." if len(group.languages) > 6 else ""),
        )
        lines.append(cells)
    return table(heads, lines)


def _span(counts: dict[int, int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _plots(group: Group) -> Html:
    plots = [
        _plot("seconds of a row", group.seconds, SECONDS),
        _plot("tokens of a row, estimated", group.tokens, TOKENS),
    ]
    return Html(f'<div class="plots">{"".join(plots)}</div>')


def _plot(title: str, values: Sequence[float], edges: Sequence[float]) -> Html:
    """Bars of how many values lie in each bin; a bin's edges stand under its ends, its count above it."""
    if not values:
        return Html()
    counts = histogram(values, edges)
    bins = used(counts)
    width, height = 420 / len(bins), 110
    bars = []
    for place, i in enumerate(bins):
        tall = max(1.0 if counts[i] else 0.0, height * counts[i] / max(counts))
        x, y = place * width + 10, 16 + height - tall
        bars.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{tall:.1f}" rx="2">'
            f"<title>{bin_name(edges, i)}: {counts[i]:,}</title></rect>"
            f'<text x="{x + width / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{_short(counts[i])}</text>'
            f'<text x="{x:.1f}" y="{height + 30}" text-anchor="middle">{_short(edges[i])}</text>'
        )
    if bins[-1] + 1 < len(edges):
        end = _short(edges[bins[-1] + 1])
        bars.append(f'<text x="{10 + 420}" y="{height + 30}" text-anchor="middle">{end}</text>')
    drawn = f'<svg viewBox="0 0 440 {height + 34}" role="img">{"".join(bars)}</svg>'
    return Html(f"<div><h4>{text(title)}</h4>{drawn}</div>")


def _short(number: float) -> str:
    if number < 10_000:
        return f"{number:g}"
    return f"{number / 1000:.0f}k" if number < 1e6 else f"{number / 1e6:.1f}M"


def _items(lines: Iterable[str]) -> Html:
    return Html(f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>")


def _folded(summary: str, lines: Iterable[str]) -> Html:
    return Html(f"<details><summary>{text(summary)}</summary>{_items(lines)}</details>")


def _bad(found: Survey) -> Html:
    if not (total := found.kinds.total()):
        return Html()
    return _card(
        Html(f'<h3 class="bad">{total:,} bad rows</h3>'),
        _items(f"{count:,} x {kind}" for kind, count in found.kinds.most_common(30)),
        _folded(
            f"the first {len(found.bad)} of them" if total > len(found.bad) else "all of them",
            (plain(reason) for reason in found.bad),
        ),
    )


def _same(what: str, same: Same) -> Html:
    if not same.count:
        return Html()
    return _card(
        Html(f"<h3>{same.count:,} rows with the {text(what)} of an earlier row</h3>"),
        _folded(
            f"the first {len(same.named)}", (f"{plain(place)} is as {plain(earlier)}" for place, earlier in same.named)
        ),
    )


def _group(group: Group, clips: dict[AudioRef, _Clip], plots: bool) -> Html:
    rows = [_row(row, clips) for row in group.examples]
    if not rows:
        return Html()
    return _card(Html(f"<h3>{text(group.name)}</h3>"), _plots(group) if plots else Html(), *rows)


def _row(row: Row, clips: dict[AudioRef, _Clip]) -> Html:
    players = [_player(ref, clips.get(ref, _Clip())) for ref in row.audios]
    parts = [paragraph(plain(row.id, 200), "soft"), *players, *_turns(row)]
    return Html(f'<div class="row">{"".join(parts)}</div>')


def _turns(row: Row) -> Iterator[Html]:
    for message in row.messages:
        content = message.content if len(message.content) <= _TEXT else message.content[: _TEXT - 1] + "…"
        unlearnt = " (not learnt)" if not message.learn else ""
        yield Html(f'<p><span class="who">{text(message.role)}{unlearnt}</span>{text(content)}</p>')


def _player(ref: AudioRef, clip: _Clip) -> Html:
    name = plain(ref.path.name + (f"#{ref.part}" if ref.part else ""), 200)
    name += "" if ref.start is None and ref.end is None else f", from {ref.start or 0.0:g} s"
    name += "" if ref.end is None else f" to {ref.end:g} s"
    if clip.reason:
        return paragraph(f"{name}: {clip.reason}", "bad")
    return player_of(clip.data, name, preload="metadata")
