"""The page of `coatkit demo`, made with gradio. Whatever comes from data or people is the value of a text field.

A text field's value is never read as markup, so there is nothing to be escaped and nothing that can be forgotten.
"""

from __future__ import annotations

import io
import re
import sys
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from coatkit.analysis import plots, view_plots
from coatkit.demo.asking import BEFORE, WITH, WITHOUT, Asker, Limits, Reply, Said, words
from coatkit.errors import CoatkitError, PluginError

NOTHING = "nothing"
KEPT = (300, 1800)
"""Seconds: how often uploads and pictures are looked through, and how long they are kept."""
_BESIDE = {
    NOTHING: "Nothing",
    WITHOUT: "The same model without its block",
    BEFORE: "The model before training, without the block",
}
_ABOUT = (
    "Record or upload a sound, ask about it, and see what the heads read from the model's thinking at each moment,"
    " before it answers."
)
_HEADS = (
    "The plots show what the heads read from the model's own thinking states; no expert listens here."
    " `coatkit view` sets the experts beside them."
)
_STYLE = """
.warn textarea { background: #fff3d6 !important; color: #5c3b00 !important; font-weight: 600; }
.dark .warn textarea { background: #4a3300 !important; color: #ffe2a8 !important; }
/* The label stands on the picture; where there is little room, the picture scrolls and not the page. */
#picture { background: #fff; padding-top: 2rem; overflow-x: auto !important; }
#picture img { min-width: 40rem; }
@media (max-width: 48rem) { #picture * { justify-content: flex-start; } }
"""
_FONTS = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]


def gradio() -> Any:
    """gradio.

    Raises:
        PluginError: If it is not installed; says how to install it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydub misses an ffmpeg that nothing here uses
            return import_module("gradio")
    except ImportError as error:
        raise PluginError(f"the demo needs gradio ({error}): pip install 'coatkit[demo]'") from None


def build(asker: Asker, folder: Path) -> Any:
    """The page, as gradio's `Blocks`.

    Args:
        folder: gradio's own, where uploads are.

    Raises:
        PluginError: If gradio is not installed.
    """
    gr = gradio()
    limits = asker.limits
    choices = [(_BESIDE[way], way) for way in (NOTHING, *asker.ways)]
    with gr.Blocks(analytics_enabled=False, title="coatkit demo", delete_cache=KEPT) as blocks:
        gr.Markdown(f"# {plain(asker.name)}\n{_ABOUT}")
        if asker.random:
            gr.Textbox(
                f"Random weights in {', '.join(asker.random)}: what is said and shown there means nothing.",
                label="Note",
                interactive=False,
                elem_classes="warn",
            )
        with gr.Row():
            with gr.Column(min_width=320):
                sound = gr.Audio(
                    type="filepath",
                    sources=["upload", "microphone"],
                    label=f"Sound: up to {limits.seconds:g} s and {limits.bytes / 1e6:g} MB",
                    buttons=[],
                    elem_id="sound",
                )
            with gr.Column(min_width=320):
                question = gr.Textbox(label="Question", lines=2, max_length=limits.characters, elem_id="question")
                beside = gr.Radio(choices, value=NOTHING, label="Show beside the answer", visible=bool(asker.ways))
                button = gr.Button("Ask", variant="primary", elem_id="ask")
        message = gr.Textbox(
            label="This did not work", interactive=False, visible=False, elem_id="message", elem_classes="warn"
        )
        with gr.Row():
            answer = gr.Textbox(label=asker.label(WITH), interactive=False, lines=2, min_width=320, elem_id="answer")
            other = gr.Textbox(visible=False, interactive=False, lines=2, min_width=320, elem_id="other")
        notes = gr.Textbox(label="Notes", visible=False, interactive=False, elem_id="notes")
        picture = gr.Image(
            label="What the heads read, moment by moment",
            visible=False,
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="picture",
        )
        said = gr.Textbox(label="The same in words", visible=False, interactive=False, elem_id="words")
        if asker.has_block:
            gr.Markdown(_HEADS)

        # One thread for all questions, which come one at a time anyway: gradio takes any of its forty, and fonts,
        # buffers and allocators are kept for each thread that ever drew or computed.
        worker = ThreadPoolExecutor(1, thread_name_prefix="coatkit-demo")

        def reply(path: str | None, asked: str, way: str) -> list[Any]:
            return worker.submit(replied, path, asked, way).result()

        def replied(path: str | None, asked: str, way: str) -> list[Any]:
            try:
                if path is None:
                    return _failed(gr, "There is no sound yet: record or upload one.")
                given = _among(folder, path)
                found = asker.ask(given, asked or "", () if way == NOTHING else (way,))
                return _shown(gr, asker, found)
            except CoatkitError as error:
                return _failed(gr, str(error))
            except Exception:  # whatever else it is, the page goes on, and who runs the server sees it
                traceback.print_exc(file=sys.stderr)
                return _failed(gr, "Something went wrong; the terminal that the demo was started in says what.")

        gr.on(
            [button.click, question.submit],
            reply,
            [sound, question, beside],
            [message, answer, other, notes, picture, said],
            concurrency_limit=1,
            show_progress_on=[answer],
            api_visibility="private",
        )
    blocks.queue(max_size=16, default_concurrency_limit=1)
    return blocks


def theme() -> Any:
    """A theme that asks for no font from elsewhere."""
    return gradio().themes.Default(font=_FONTS, font_mono=_MONO)


def style(limits: Limits) -> str:
    """Style sheet of the page."""
    # gradio says "Error" where a file is too large to be uploaded, and not why.
    why = f": not uploaded; files of up to {limits.bytes / 1e6:g} MB are taken"
    return f'{_STYLE}#sound .error::after {{ content: "{why}"; }}\n'


def plain(text: str) -> str:
    """Text that Markdown shows as it stands."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _among(folder: Path, path: str) -> Path:
    """An uploaded file's path, which came through the network.

    Raises:
        CoatkitError: If it is anything else.
    """
    found = Path(path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise CoatkitError("Only files that were uploaded can be asked about.")
    return found


def _failed(gr: Any, why: str) -> list[Any]:
    """What was there before goes away: an old answer beside a new question would be taken for its answer."""
    hidden = gr.update(value=None, visible=False)
    return [gr.update(value=why, visible=True), gr.update(value=""), hidden, hidden, hidden, hidden]


def _shown(gr: Any, asker: Asker, found: Reply) -> list[Any]:
    figure = view_plots.overview(found.heard, found.samples, found.rate)
    # Not as a file of ours: gradio deletes what it wrote itself.
    drawn = import_module("PIL.Image").open(io.BytesIO(plots.png(figure)))
    lines = words(found.heard) if found.heard is not None else []
    first, *others = [gr.update(value=one.text or "(nothing)", label=_label(asker, one)) for one in found.said]
    hidden = gr.update(value=None, visible=False)
    return [
        hidden,
        first,
        gr.update(**{**others[0], "visible": True}) if others else hidden,
        gr.update(value="\n".join(found.notes), visible=True) if found.notes else hidden,
        gr.update(value=drawn, visible=True, alt_text=_alternative(found, lines)),
        gr.update(value="\n".join(lines), visible=True) if lines else hidden,
    ]


def _label(asker: Asker, one: Said) -> str:
    return f"{asker.label(one.way)} ({one.seconds:.1f} s{', cut off' if one.cut else ''})"


def _alternative(found: Reply, lines: list[str]) -> str:
    heads = list(found.heard.predicted) if found.heard is not None else []
    of = f" above what the heads read: {', '.join(heads)}" if heads else ""
    return ". ".join([f"The waveform of {found.seconds:.1f} s of sound{of}", *lines])
