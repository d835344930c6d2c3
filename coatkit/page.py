"""One self-contained page of HTML: style, tables, pictures, players, and a playhead over plots. No network.

`page` gives the skeleton; the other functions give pieces of it as `Html`. Whatever comes from data goes through
`text`, which escapes it: every function here escapes its plain `str` arguments and takes only `Html` as it is. The page
forbids every source but itself (Content-Security-Policy), and runs only the script it was made with, by its digest.

    body = [section("Scores", table(["task", "right"], [["kind", "46"]]), picture(png, "A falling line"))]
    write_atomic(path, page("A run", body, notes=["Trained on a CPU."]))
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import soundfile

_KEPT = "\n\u200c\u200d"
"""A line's end, and the two joiners that Persian, Hindi and emoji are spelt with."""


class Html(str):
    """Markup that is safe to put into a page as it is."""


STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6577; --line: #d9dee7; --back: #f6f7f9; --card: #fff;
  --mark: #2f6fde; --bad: #b3261e; --warn: #fff3d6; --on-warn: #5c3b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #323a48; --back: #14171d;
  --card: #1c2129; --mark: #6ea2ff; --bad: #ff8a80; --warn: #4a3300; --on-warn: #ffe2a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
h3 { font-size: 1.02rem; margin: 0 0 .5rem; }
p, ul { margin: .25rem 0 .75rem; }
.soft { color: var(--soft); font-size: .88rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem;
  margin: .9rem 0; }
.warn { background: var(--warn); color: var(--on-warn); border-radius: 10px; padding: .7rem 1.1rem; font-weight: 600; }
.said { border-left: 3px solid var(--mark); padding-left: .8rem; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .7rem; border-top: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
th { border-top: 0; color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .words { text-align: left; }
figure { margin: .75rem 0 0; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; }
/* Plots are drawn on white; they scroll sideways where they would get too small to read. */
.plot { position: relative; background: #fff; border-radius: 6px; min-width: 40rem; overflow: hidden; }
.plot img { display: block; width: 100%; height: auto; }
.timeline { cursor: pointer; }
.playhead { display: none; position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #d0021b;
  pointer-events: none; }
.live .playhead { display: block; }
.players { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .5rem 1.25rem; }
.players p { margin: .25rem 0 .1rem; }
audio { width: 100%; height: 38px; display: block; }
"""

# Every timeline shows the time of the player that was last used; a click on one moves that player.
PLAYHEAD = """
"use strict";
const players = [...document.querySelectorAll("audio")];
const lines = [...document.querySelectorAll(".timeline")];
let now = players[0];
function place() {
  for (const line of lines) {
    const left = Number(line.dataset.left), right = Number(line.dataset.right);
    const share = Math.min(1, Math.max(0, now.currentTime / Number(line.dataset.seconds)));
    line.lastElementChild.style.left = 100 * (left + (right - left) * share) + "%";
    line.classList.add("live");
  }
}
function follow() {
  place();
  if (!now.paused) requestAnimationFrame(follow);
}
for (const player of players) {
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    now = player;
    follow();
  });
  for (const name of ["seeking", "timeupdate"]) player.addEventListener(name, () => { now = player; place(); });
}
for (const line of lines) {
  line.addEventListener("click", (event) => {
    const box = line.getBoundingClientRect();
    const left = Number(line.dataset.left), right = Number(line.dataset.right);
    const share = ((event.clientX - box.left) / box.width - left) / (right - left);
    now.currentTime = Math.min(1, Math.max(0, share)) * Number(line.dataset.seconds);
    place();
  });
}
if (now) place();
"""


def page(
    title: str,
    body: Sequence[Html],
    *,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    style: str = "",
    playhead: bool = True,
) -> str:
    """A whole page.

    Args:
        body: What stands on it, in order.
        notes: Said in small under the title.
        warnings: Said loudly, first of all.
        style: CSS of what only this page has; never anything from data.
        playhead: Whether players move one; without it the page has no script at all.
    """
    loud = "".join(f'<p class="warn" role="note">{text(one)}</p>\n' for one in warnings)
    small = "".join(f'<p class="soft">{text(one)}</p>\n' for one in notes)
    # Should something ever escape the escaping, it is not run and loads nothing.
    policy, script = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:", ""
    if playhead:
        digest = base64.b64encode(hashlib.sha256(PLAYHEAD.encode()).digest()).decode()
        policy, script = f"{policy}; script-src 'sha256-{digest}'", f"<script>{PLAYHEAD}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        f"{loud}{small}{''.join(body)}{script}</body>\n</html>\n"
    )


def text(value: str) -> Html:
    """Text as it stands, made safe; `Html` is left alone. Control characters, which no reader sees, are shown."""
    if isinstance(value, Html):
        return value
    shown = "".join(c if c.isprintable() or c in _KEPT else f"\\u{ord(c):04x}" for c in value)
    return Html(html.escape(shown, quote=True))


def section(title: str, *parts: Html) -> Html:
    """A card with a heading."""
    return Html(f'<section class="card">\n<h2>{text(title)}</h2>\n{"".join(parts)}</section>\n')


def paragraph(words: str, kind: str = "") -> Html:
    """A paragraph; `kind` is a class of the style: soft, warn or said."""
    return Html(f'<p class="{text(kind)}">{text(words)}</p>\n')


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> Html:
    """A table, the first column and those in `words` to the left, the others to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="words"' if i in words else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{k}>{text(c)}</{tag}>" for c, k in zip(cells, kinds, strict=True)) + "</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    return Html(f'<div class="wide"><table>\n{line(heads, "th")}{body}</table></div>\n')


def picture(
    png: bytes, alternative: str, caption: str = "", *, seconds: float = 0.0, span: tuple[float, float] = (0, 1)
) -> Html:
    """A picture inside the page.

    Args:
        alternative: What it shows, for those who do not see it.
        seconds: Length of its time axis; a playhead moves along it where this is more than 0.
        span: Where the time axis begins and ends, as shares of the picture's width.
    """
    data = base64.b64encode(png).decode()
    inner = f'<img alt="{text(alternative)}" src="data:image/png;base64,{data}">'
    if seconds > 0:
        place = f'data-seconds="{seconds:.6f}" data-left="{span[0]:.6f}" data-right="{span[1]:.6f}"'
        inner = f'<div class="plot timeline" {place}>{inner}<span class="playhead"></span></div>'
    else:
        inner = f'<div class="plot">{inner}</div>'
    said = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><div class="wide">{inner}</div>{said}</figure>\n')


def wav(samples: Any, rate: int) -> bytes:
    """A mono sound [N] at `rate` Hz as a WAV file of 16 bits; what is louder than 1 is clipped."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(np.asarray(samples), -1.0, 1.0), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def base64_wav(samples: Any, rate: int) -> str:
    """A mono sound [N] at `rate` Hz as `player_of` takes it."""
    # Not FLAC, half as large: Chromium (156) loses some FLAC files when it seeks in them ("demuxer seek failed").
    return base64.b64encode(wav(samples, rate)).decode()


def player(samples: Any, rate: int, label: str) -> Html:
    """A player of a mono sound [N] at `rate` Hz, which the page holds."""
    return player_of(base64_wav(samples, rate), label)


def player_of(data: str, label: str, preload: Literal["auto", "metadata"] = "auto") -> Html:
    """A player of a WAV file in base64, which the page holds."""
    source = f"data:audio/wav;base64,{text(data)}"
    inner = f'<audio controls preload="{preload}" aria-label="{text(label)}" src="{source}"></audio>'
    return Html(f'<div><p class="soft">{text(label)}</p>{inner}</div>\n')


def players(*those: Html) -> Html:
    """Players side by side, or below each other where there is no room."""
    return Html(f'<div class="players">{"".join(those)}</div>\n')


def data(name: str, value: Any) -> Html:
    """Data for whoever reads the page by program, as JSON in a script element that is not run."""
    inside = json.dumps(value)
    for letter in "<>&":  # none of them can then end the script
        inside = inside.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{text(name)}">{inside}</script>\n')
