"""`coatkit view`: what a run thinks of one sound, head by head with its expert, to see and to hear."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coatkit import page
from coatkit.analysis import agreement, hear, plots, view_plots
from coatkit.data import audio as sound
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError, RunError
from coatkit.files import write_atomic
from coatkit.infer import AudioThinker, asked
from coatkit.page import Html
from coatkit.store import sound_key
from coatkit.thought import Heard

QUESTION = "What is heard?"
"""Asked where no question is: the block stands after a question in most runs, so there has to be one."""
_PLAYED = 24_000
"""Hz at most of the original in the page."""


@dataclass(frozen=True)
class Hearing:
    """The sound as decoded from features.

    Attributes:
        expert: Whose features.
        how: What decoded them, and how well it does, in sentences.
        original: [T, bands] log-mel frames of the sound itself.
        mels: The same as decoded: from the expert's features (`target`), and from the head's prediction (`prediction`).
        sounds: Samples of these, at `hear.RATE`.
        errors: By the same names, mean absolute error of the log-mel frames, dB.
    """

    expert: str
    how: list[str]
    original: Tensor
    mels: dict[str, Tensor]
    sounds: dict[str, np.ndarray]
    errors: dict[str, float]


@dataclass(frozen=True)
class View:
    """What a run thinks of one sound.

    Attributes:
        run: Name of the run.
        step: Optimizer steps learnt for; 0 before training.
        title: Of the sound: its file's name and stretch.
        samples: [N] mono, at `rate` Hz.
        question: What the model was asked.
        answer: What it said; None where it was not asked for an answer.
        heard: The thinking.
        scores: By expert, see `agreement`.
        hearing: None where nothing could be decoded; `silent` says why.
        unheard: Experts that did not run, and why.
        random: Parts of the run that have random weights.
    """

    run: str
    step: int
    title: str
    samples: np.ndarray
    rate: int
    question: str
    answer: str | None
    heard: Heard
    scores: dict[str, dict[str, float]]
    hearing: Hearing | None
    silent: str = ""
    unheard: dict[str, str] = field(default_factory=dict)
    random: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def look(
    model: AudioThinker,
    ref: AudioRef,
    *,
    question: str = "",
    max_new_tokens: int = 64,
    decoder: str = "",
    decoder_seconds: float = hear.SECONDS,
    say: Callable[[str], None] = print,
) -> View:
    """Let a run think about a sound, and compare what its heads predict with what its experts hear.

    Args:
        model: From `coatkit.load`.
        question: An answer is made where this is not empty.
        decoder: A decoder of the user's (`hear.own_decoder`) in place of the linear one.
        decoder_seconds: Of training sound that the linear decoder is fitted on, at most; 0 decodes nothing.
        say: Is told what takes a while.

    Raises:
        DataError: If the sound cannot be read or heard.
        PluginError: If an expert or the decoder fails, or the extra `analysis` is not installed.
        RunError: If the run has no thinking block, so that there is nothing to see.
    """
    samples, rate = sound.read(ref, sound.LONGEST_ASKED)
    row = asked(ref, question or QUESTION, "view")
    own = hear.own_decoder(decoder) if decoder else None
    if not model.mind.model.heads:
        raise RunError(f"{model.name}: this run has no thinking block (thinking: off), so there is nothing to see")
    (thought,) = model.think([row], targets=True)
    (heard,) = thought.sounds
    scores: dict[str, dict[str, float]] = {}
    for name, target in heard.target.items():
        scores[name] = agreement.of_features(heard.predicted[name], target)
        if name in heard.readout and name in heard.target_readout:
            scores[name] |= agreement.of_readouts(heard.readout[name], heard.target_readout[name])
    hearing, silent = None, "decoding was not asked for"
    if own is not None or decoder_seconds > 0:
        try:
            hearing = _hear(model, heard, samples, rate, own, decoder, decoder_seconds, say)
        except DataError as error:
            silent = str(error)
    assert model.run is not None
    record = model.run.read_record()
    return View(
        str(record.get("name", model.run.path.name)),
        model.step,
        _title(ref),
        samples,
        rate,
        question or QUESTION,
        model.answer([row], max_new_tokens=max_new_tokens)[0] if question else None,
        heard,
        scores,
        hearing,
        silent,
        dict(model.mind.unheard),
        tuple(record.get("random_weights", ())),
    )


def _title(ref: AudioRef) -> str:
    if ref.start is None and ref.end is None:
        return ref.path.name
    return f"{ref.path.name}, {ref.start or 0.0:g} s to " + ("its end" if ref.end is None else f"{ref.end:g} s")


def _hear(
    model: AudioThinker,
    heard: Heard,
    samples: np.ndarray,
    rate: int,
    own: hear.Decode | None,
    use: str,
    seconds: float,
    say: Callable[[str], None],
) -> Hearing:
    name = hear.reconstructing(model)
    if name is None:
        raise DataError("no expert of this run reconstructs the backbone's own audio features")
    if own is not None:
        decode, how = own, [f"Decoded by {Path(use.rpartition(':')[0] or use).name}, the decoder it was given."]
    else:
        made = hear.decoder_of(model, name, seconds, say)
        decode, how = made, _about(made.fit, sound_key(samples, rate))
    wave = sound.resample(samples, rate, hear.RATE)
    original = hear.log_mel(wave)
    mels, sounds, errors = {}, {}, {}
    for part, features in (("target", heard.target.get(name)), ("prediction", heard.predicted[name])):
        if features is not None:
            mel, sounds[part] = hear.decoded(decode, features, heard.rate, len(wave))
            mels[part], both = mel, min(len(mel), len(original))
            errors[part] = float((mel[:both] - original[:both]).abs().mean()) * 20 / math.log(10)
    return Hearing(name, how, original, mels, sounds, errors)


def _about(fit: hear.Fit, key: str) -> list[str]:
    said = [
        f"Decoded by a linear map, then Griffin-Lim. The map was fitted on {fit.clips - fit.held_out} training clips of"
        f" this run; on {fit.held_out} others it explains {fit.r2:.0%} of the log-mel frames' variance"
        f" ({fit.seconds:.0f} s of sound in all)."
    ]
    return [*said, "This very sound is among those it was fitted on."] if key in fit.sounds else said


def results(view: View) -> dict[str, Any]:
    """All numbers of a view, as plain data; what is not defined is null."""
    found: dict[str, Any] = {
        "run": view.run,
        "step": view.step,
        "sound": view.title,
        "seconds": round(view.seconds, 3),
        "positions": len(view.heard.states),
        "question": view.question,
        "answer": view.answer,
        "experts": {name: {k: _finite(v) for k, v in scores.items()} for name, scores in view.scores.items()},
        "unheard": view.unheard,
        "random_weights": list(view.random),
    }
    if view.hearing is not None:
        found["decoded"] = {"expert": view.hearing.expert, "how": view.hearing.how, "error_db": view.hearing.errors}
    else:
        found["not_decoded"] = view.silent
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def lines(view: View) -> list[str]:
    """The numbers for a terminal."""
    out = [f"RANDOM WEIGHTS in {', '.join(view.random)}: what is shown means nothing there."] if view.random else []
    for name in view.heard.predicted:
        said = ", ".join(f"{key} {number}" for key, number in _numbers(view.scores.get(name, {})))
        out.append(f"{name}: {said or 'no target: ' + view.unheard.get(name, '')}")
    if view.hearing is None:
        out.append(f"not decoded: {view.silent}")
    else:
        errors = ", ".join(f"from the {part} {value:.1f} dB" for part, value in view.hearing.errors.items())
        out += [*view.hearing.how, f"mean error of the log-mel frames here: {errors}"]
    return out if view.answer is None else [*out, f"answer: {view.answer}"]


def _numbers(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    found = [(k, _number(v)) for k, v in scores.items() if not k.endswith("present")]
    if "present" in scores:
        found.append(("present", f"{scores['present']:.0f} against {scores['predicted present']:.0f} predicted"))
    return found


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "- (nothing present)"


def write(view: View, folder: Path) -> Path:
    """Write the pictures, sounds, numbers and the page into a folder, and give the page's path.

    Raises:
        PluginError: If matplotlib is not installed.
        RunError: If the folder cannot be written.
    """
    pictures = {f"expert-{name}": view_plots.expert(name, view.heard, view.seconds) for name in view.heard.predicted}
    if view.hearing is not None:
        mels = [("original", view.hearing.original)]
        mels += [(f"decoded from the {_FROM[part]}", mel) for part, mel in view.hearing.mels.items()]
        pictures["decoded"] = view_plots.spectrograms(mels, hear.RATE / hear.HOP, view.seconds)
    drawn = {name: plots.png(picture) for name, picture in pictures.items()}
    made = page_of(view, drawn)
    path = folder / "view.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in drawn.items():
            (folder / f"{_plain(name)}.png").write_bytes(png)
        for part, samples in ({} if view.hearing is None else view.hearing.sounds).items():
            (folder / f"decoded-{part}.wav").write_bytes(page.wav(samples, hear.RATE))
        write_atomic(folder / "results.json", json.dumps(results(view), indent=1, ensure_ascii=False) + "\n")
        write_atomic(path, made)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror or error}); name another folder with --out"
        ) from None
    return path


_FROM = {"target": "model's audio features", "prediction": "thinking"}


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def page_of(view: View, drawn: Mapping[str, bytes]) -> str:
    """The page. `drawn` holds the figures as PNG: `expert-NAME` of each expert, and `decoded`."""
    about = f"Run {view.run}, " + (f"step {view.step}." if view.step else "before training.")
    notes = [
        f"{about} {view.seconds:.2f} s of sound, {len(view.heard.states)} thinking positions"
        f" at {view.heard.rate:g} Hz.",
        "For each expert: what it hears (target), and what its head makes of the model's thinking states alone"
        " (prediction). The line in red follows the player.",
    ]
    loud = []
    if view.random:
        loud = [f"Random weights in {', '.join(view.random)}: what is shown there means nothing."]
    body = [_sounds(view, drawn), *(_expert(view, name, drawn[f"expert-{name}"]) for name in view.heard.predicted)]
    meant = [[key, what] for key, what in agreement.MEANING.items()]
    body += [page.section("What the numbers are", page.table(["number", "meaning"], meant, words=[1]))]
    body += [page.data("results", results(view))]
    return page.page(f"What the model thinks of {view.title}", body, notes=notes, warnings=loud)


def _sounds(view: View, drawn: Mapping[str, bytes]) -> Html:
    samples, rate = view.samples, view.rate
    if rate > _PLAYED:
        samples, rate = sound.resample(samples, rate, _PLAYED), _PLAYED
    parts = [page.player(samples, rate, "original")]
    said: list[Html] = []
    asked_too = "" if view.answer is not None else " (asked, because the model thinks about a question)"
    said.append(page.paragraph(f"Question{asked_too}: {view.question}"))
    if view.answer is not None:
        said += [page.paragraph("Answer:", "soft"), page.paragraph(view.answer or "(nothing)", "said")]
    if view.hearing is None:
        return page.section(
            "The sound", *said, page.players(*parts), page.paragraph(f"Not decoded: {view.silent}", "soft")
        )
    hearing = view.hearing
    parts += [
        page.player(samples, hear.RATE, f"decoded from the {_FROM[part]}") for part, samples in hearing.sounds.items()
    ]
    errors = [f"{value:.1f} dB from the {_FROM[part]}" for part, value in hearing.errors.items()]
    alternative = (
        f"Log-mel spectrograms: {', '.join(['the original', *(f'from the {_FROM[p]}' for p in hearing.mels)])}."
    )
    caption = "One scale, that of the original. A click moves the sound there."
    return page.section(
        "The sound, and the thinking as sound",
        *said,
        page.players(*parts),
        page.picture(drawn["decoded"], alternative, caption, seconds=view.seconds, span=view_plots.SPAN),
        *(page.paragraph(one) for one in hearing.how),
        page.paragraph(f"Mean error of the log-mel frames on this sound: {', '.join(errors)}."),
    )


def _expert(view: View, name: str, png: bytes) -> Html:
    scores, heard = view.scores.get(name, {}), view.heard
    parts: list[Html] = []
    if f"experts.{name}" in view.random:
        parts.append(page.paragraph("This expert has random weights: its target means nothing.", "warn"))
    if name not in heard.target:
        parts.append(page.paragraph(f"No target, the expert did not run here: {view.unheard.get(name, '')}", "warn"))
    if scores:
        numbers = _numbers(scores)
        parts.append(page.table([key for key, _ in numbers], [[number for _, number in numbers]]))
    parts.append(
        page.picture(png, _alternative(view, name), _caption(view, name), seconds=view.seconds, span=view_plots.SPAN)
    )
    return page.section(f"Expert {name}", *parts)


def _alternative(view: View, name: str) -> str:
    heard, shown = view.heard, []
    for title, readouts in (("target", heard.target_readout), ("prediction", heard.readout)):
        if name in readouts:
            one = readouts[name]
            top = one.values.amax(0).argsort(descending=True)[:3].tolist()
            shown.append(f"strongest {one.name} of the {title}: {'; '.join(one.labels[i] for i in top)}")
    numbers = ", ".join(f"{key} {number}" for key, number in _numbers(view.scores.get(name, {})))
    over = f"Heat maps over {view.seconds:.1f} s: " + (
        "target and prediction" if name in heard.target else "prediction"
    )
    return ". ".join([f"{over} of expert {name}", *shown, *([numbers] if numbers else [])]) + "."


def _caption(view: View, name: str) -> str:
    of = "the target" if name in view.heard.target else "the prediction"
    count = view.heard.predicted[name].shape[1]
    many = f"averaged into {view_plots.ROWS} rows, " if count > view_plots.ROWS else ""
    said = (
        f"Features: each as its distance from its mean in {of} over this sound, in {of}'s standard deviations;"
        f" white is that mean. They are ordered by how they change together in {of} (angle of their loadings on its"
        f" two strongest principal components), {many}and shown on the same scale in the same order above and below."
    )
    if name not in view.heard.readout:
        return said
    readout = view.heard.readout[name]
    shown = "the octaves around what is present" if readout.hertz else "the strongest in either"
    return f"{readout.name.capitalize()}: {shown} of {len(readout.labels):,}. {said}"


def folder_name(ref: AudioRef, step: int) -> str:
    """A folder for a sound at a step; the same again for the same file and stretch."""
    stretch = (
        ""
        if ref.start is None and ref.end is None
        else f"-{ref.start or 0.0:g}-{'' if ref.end is None else f'{ref.end:g}'}"
    )
    digest = hashlib.sha256(str(ref.path.absolute()).encode(errors="surrogateescape")).hexdigest()[:6]
    return f"{_plain(ref.path.stem)[:60]}{stretch}-{digest}-step-{step}"
