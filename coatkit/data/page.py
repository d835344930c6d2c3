"""What rows hold, as one page of HTML that needs nothing else: no network, no script; its sounds are inside it.

Everything that comes from the data goes through `_text`, which escapes it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from coatkit.data import audio as sound
from coatkit.data.rows import AudioRef, Row
from coatkit.data.survey import SECONDS, TOKENS, Group, Same, Survey, bin_name, histogram, middle, plain, used
from coatkit.errors import DataError

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
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6577; --line: #d9dee7; --back: #f6f7f9; --card: #fff;
  --mark: #2f6fde; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #323a48; --back: #14171d;
  --card: #1c2129; --mark: #6ea2ff; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.02rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h4 { font-size: .8rem; font-weight: 600; margin: 0; color: var(--soft); }
p, ul { margin: .25rem 0 .75rem; }
.soft { color: var(--soft); font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin: .9rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-top: 1px solid var(--line); white-space: nowrap; }
th { border-top: 0; color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; display: block; }
svg rect { fill: var(--mark); }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
.row { border-top: 1px solid var(--line); padding: .7rem 0 .2rem; }
.row p { margin: .15rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.who { color: var(--soft); display: inline-block; min-width: 5.5rem; }
audio { width: 100%; max-width: 28rem; height: 36px; display: block; margin: .35rem 0; }
.bad, .bad code { color: var(--bad); }
li { overflow-wrap: anywhere; }
"""


def page(title: str, parts: Sequence[tuple[str, Survey]], notes: Sequence[str] = (), limit: int = SOUND_BYTES) -> str:
    """A page of plots, tables and players.

    Args:
        parts: What some rows are for, e.g. `stage one`, and what was found in them; players are of their examples.
        notes: What is to be said before.
        limit: Bytes of all players' sounds together, as they stand in the page.
    """
    clips = _clips([group for _, found in parts for group in _shown(found)], limit)
    body = "".join(_part(name, found, clips) for name, found in parts)
    said = "".join(f"<p class=soft>{_text(note)}</p>" for note in notes)
    heard = sum(len(clip.data) for clip in clips.values())
    players = (
        f"<p class=soft>Players hold the first {CLIP_SECONDS:g} s of a sound, mono, at {_RATE // 1000} kHz at most:"
        f" {heard / 1e6:.1f} MB of at most {limit / 1e6:g} MB in this page.</p>"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Should something ever escape the escaping, it is not run and loads nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; media-src data:\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{said}{players}{body}</body>\n</html>\n"
    )


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
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return _Clip(base64.b64encode(file.getvalue()).decode())


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _shown(found: Survey) -> list[Group]:
    return list(found.groups.values())[:_GROUPS]


def _part(name: str, found: Survey, clips: dict[AudioRef, _Clip]) -> str:
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
    return "".join(
        (
            f"<h2>{_text(name)}: {_text(str(Path(*found.path.parts[-2:])))}</h2>",
            f"<p>{_text('; '.join(facts))}</p>",
            f"<div class=card>{_plots(whole)}</div>",
            f'<div class="card wide">{_table([*groups, whole] if len(groups) > 1 else groups)}</div>',
            f"<p class=soft>{more:,} more categories are not shown.</p>" if more > 0 else "",
            _bad(found),
            _same("id", found.same_id),
            _same("sounds and text", found.same_content),
            *(_group(group, clips, len(groups) > 1) for group in groups),
        )
    )


def _table(groups: Sequence[Group]) -> str:
    head = ["category", "rows", "hours", "text only", "sounds", "turns"]
    head += ["seconds: least, median, most", "tokens: median, most", "languages"]
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
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
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _span(counts: dict[int, int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _plots(group: Group) -> str:
    plots = [
        _plot("seconds of a row", group.seconds, SECONDS),
        _plot("tokens of a row, estimated", group.tokens, TOKENS),
    ]
    return f"<div class=plots>{''.join(plots)}</div>"


def _plot(title: str, values: Sequence[float], edges: Sequence[float]) -> str:
    """Bars of how many values lie in each bin; a bin's edges stand under its ends, its count above it."""
    if not values:
        return ""
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
    inner = "".join(bars)
    return f'<div><h4>{title}</h4><svg viewBox="0 0 440 {height + 34}" role="img">{inner}</svg></div>'


def _short(number: float) -> str:
    if number < 10_000:
        return f"{number:g}"
    return f"{number / 1000:.0f}k" if number < 1e6 else f"{number / 1e6:.1f}M"


def _bad(found: Survey) -> str:
    if not (total := found.kinds.total()):
        return ""
    kinds = "".join(f"<li>{count:,} x {_text(kind)}</li>" for kind, count in found.kinds.most_common(30))
    rows = "".join(f"<li>{_text(plain(reason))}</li>" for reason in found.bad)
    shown = f"the first {len(found.bad)} of them" if total > len(found.bad) else "all of them"
    return (
        f"<div class=card><h3 class=bad>{total:,} bad rows</h3><ul>{kinds}</ul>"
        f"<details><summary>{shown}</summary><ul>{rows}</ul></details></div>"
    )


def _same(what: str, same: Same) -> str:
    if not same.count:
        return ""
    rows = "".join(f"<li>{_text(plain(place))} is as {_text(plain(earlier))}</li>" for place, earlier in same.named)
    return (
        f"<div class=card><h3>{same.count:,} rows with the {what} of an earlier row</h3>"
        f"<details><summary>the first {len(same.named)}</summary><ul>{rows}</ul></details></div>"
    )


def _group(group: Group, clips: dict[AudioRef, _Clip], plots: bool) -> str:
    rows = "".join(_row(row, clips) for row in group.examples)
    if not rows:
        return ""
    return f"<div class=card><h3>{_text(group.name)}</h3>{_plots(group) if plots else ''}{rows}</div>"


def _row(row: Row, clips: dict[AudioRef, _Clip]) -> str:
    players = "".join(_player(ref, clips.get(ref, _Clip())) for ref in row.audios)
    return f"<div class=row><p class=soft>{_text(plain(row.id, 200))}</p>{players}{''.join(_turns(row))}</div>"


def _turns(row: Row) -> Iterator[str]:
    for message in row.messages:
        content = message.content if len(message.content) <= _TEXT else message.content[: _TEXT - 1] + "…"
        unlearnt = " (not learnt)" if not message.learn else ""
        yield f"<p><span class=who>{message.role}{unlearnt}</span>{_text(content)}</p>"


def _player(ref: AudioRef, clip: _Clip) -> str:
    name = _text(plain(ref.path.name + (f"#{ref.part}" if ref.part else ""), 200))
    span = "" if ref.start is None and ref.end is None else f", from {ref.start or 0.0:g} s"
    span += "" if ref.end is None else f" to {ref.end:g} s"
    if clip.reason:
        return f"<p class=bad>{name}{span}: {_text(clip.reason)}</p>"
    source = f"data:audio/flac;base64,{clip.data}"
    return f'<p class=soft>{name}{span}</p><audio controls preload="metadata" src="{source}"></audio>'
