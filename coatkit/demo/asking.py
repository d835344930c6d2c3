"""What the page of `coatkit demo` asks a run: sound and question in; answers and what the heads read out. No web here.

One backbone serves all answers. Leaving the block out is a switch of the preparer; being as before training is a matter
of the parameters that learn, whose first values are kept on the CPU and put in when they are wanted. So no second model
is held.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coatkit.analysis import view_plots
from coatkit.data import audio as sound
from coatkit.data.rows import AUDIO_TAG, AudioRef, Row
from coatkit.errors import CoatkitError, DataError
from coatkit.infer import AudioThinker, asked, load, put_learnt
from coatkit.readout import Readout
from coatkit.run_folder import RunFolder
from coatkit.thought import Heard

WITH = "with"
WITHOUT = "without"
BEFORE = "before"
LABELS = {
    WITH: "Trained, with its thinking block",
    WITHOUT: "Trained, but asked without its thinking block",
    BEFORE: "Before training, without the block",
}
"""The ways to ask a run, in the words of the page."""
BLOCKLESS = "Trained (this run has no thinking block)"
_SURE = 3
"""Classes of a readout that are put into words."""


@dataclass(frozen=True)
class Limits:
    """What is taken from whoever opens the page.

    Attributes:
        seconds: Of a sound.
        bytes: Of an uploaded file.
        characters: Of a question.
        new_tokens: Of an answer.
        answer_seconds: After which an answer is cut off where it stands.
    """

    seconds: float = 30.0
    bytes: int = 20_000_000
    characters: int = 2_000
    new_tokens: int = 64
    answer_seconds: float = 60.0


@dataclass(frozen=True)
class Said:
    """One answer.

    Attributes:
        way: One of `LABELS`.
        seconds: It took.
        cut: Whether the time was over before the answer was.
    """

    way: str
    text: str
    seconds: float
    cut: bool = False


@dataclass(frozen=True)
class Reply:
    """What was said about a sound.

    Attributes:
        samples: [N] mono, at `rate` Hz.
        heard: What was thought of it; None for a run without a block.
        said: The answers, in the order they were asked for.
        notes: What the reader should know, a sentence each.
    """

    samples: sound.Samples
    rate: int
    heard: Heard | None
    said: tuple[Said, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


class Asker:
    """A run that can be asked with its block, without it, and as it was before training; one question at a time.

    Args:
        model: The trained run.
        before: What its learning parameters were before training, by name.
        limits: What is taken.
    """

    def __init__(self, model: AudioThinker, before: Mapping[str, Tensor], limits: Limits = Limits()) -> None:
        self.model, self.limits = model, limits
        self._before = before
        self._lock = threading.Lock()
        assert model.run is not None
        record = model.run.read_record()
        self.name = str(record.get("name", model.run.path.name))
        self.random = tuple(str(part) for part in record.get("random_weights", ()))
        """Parts of the run that have random weights."""
        preparer = model.backbone.preparer
        self.has_block = bool(model.mind.model.heads) or getattr(preparer, "thinking", None) is not None
        # A preparer of someone's own may have the block built in.
        self._removable = hasattr(preparer, "thinking")

    @classmethod
    def of_run(
        cls,
        run: Path,
        *,
        step: int | None = None,
        device: str | None = None,
        limits: Limits = Limits(),
    ) -> Asker:
        """Load a run once, for all ways to ask it.

        Raises:
            RunError: If it is no run folder, or has no checkpoint yet or not that one.
            SpecError: If a plugin it was made with is missing.
        """
        folder = RunFolder(run)
        newest = folder.learnt(step)
        model = load(run, trained=False, device=device)
        learning = dict(_learning(model))
        before = {name: parameter.detach().cpu().clone() for name, parameter in learning.items()}
        put_learnt(model.backbone, newest)
        return cls(AudioThinker(model.backbone, str(folder.path), newest, folder), before, limits)

    @property
    def unheard(self) -> dict[str, str]:
        """Experts that cannot be run here, and why."""
        return self.model.mind.unheard

    @property
    def ways(self) -> tuple[str, ...]:
        """What may stand beside the trained run's answer."""
        if not self.has_block:
            return (BEFORE,)
        return (WITHOUT, BEFORE) if self._removable else ()

    def label(self, way: str) -> str:
        """A way to ask, in words."""
        return LABELS[way] if self.has_block or way != WITH else BLOCKLESS

    def ask(self, path: Path, question: str, beside: Sequence[str] = ()) -> Reply:
        """Ask about a sound file.

        Args:
            path: Of the file; messages name it without its folder.
            question: Not empty.
            beside: Further ways to ask, of `ways`.

        Raises:
            DataError: If the file is no sound, or the sound or the question is outside the limits.
        """
        if unknown := sorted(set(beside) - set(self.ways)):
            raise DataError(f"This run cannot be asked so: {', '.join(unknown)}.")
        if not question.strip():
            raise DataError("There is no question yet: type one.")
        if question.count(AUDIO_TAG) > 1 or any("\ud800" <= letter <= "\udfff" for letter in question):
            raise DataError(f"The question holds {AUDIO_TAG} more than once, or half a character; leave it out.")
        if len(question) > self.limits.characters:
            raise DataError(f"The question has {len(question):,} characters; {self.limits.characters:,} are taken.")
        samples, rate = self._read(path)
        seconds = len(samples) / rate
        if reason := self.model.backbone.preparer.cannot_hear(seconds):
            raise DataError(f"{path.name} cannot be heard: {reason}.")
        row = asked(AudioRef(Path(path.name), samples=(samples, rate)), question.strip(), "the question")
        with self._lock:
            thought = self.model.think([row])[0] if self.has_block else None
            said = tuple(self._answer(row, way) for way in (WITH, *beside))
        heard = thought.sounds[0] if thought is not None and thought.sounds else None
        return Reply(samples, rate, heard, said, tuple(self._notes(said)))

    def _read(self, path: Path) -> tuple[sound.Samples, int]:
        """The sound, within the limits; what is wrong is told without the folder, which is no one's business."""
        try:
            size = path.stat().st_size
            if size > self.limits.bytes:
                raise DataError(
                    f"{path.name} has {size / 1e6:.1f} MB; {self.limits.bytes / 1e6:g} MB are taken (--max-megabytes)"
                )
            ref = AudioRef(path)
            seconds = sound.duration(ref)
            if seconds > self.limits.seconds:
                raise DataError(
                    f"{path.name} is {seconds:.1f} s long; {self.limits.seconds:g} s are taken (--max-seconds)."
                    " Cut it with the scissors under the sound, or choose a shorter one"
                )
            return sound.read(ref, self.limits.seconds)
        except OSError as error:
            raise DataError(f"{path.name} is not here any more ({error.strerror}); upload it again.") from None
        except CoatkitError as error:
            raise DataError(f"{str(error).replace(str(path), path.name).rstrip('.')}.") from None

    def _answer(self, row: Row, way: str) -> Said:
        options: dict[str, Any] = {
            "max_new_tokens": self.limits.new_tokens,
            "max_time": self.limits.answer_seconds,  # transformers' generate stops after the token that passes it
        }
        began = time.perf_counter()
        with self._as(way):
            asked_at = time.perf_counter()
            text = self.model.answer([row], **options)[0]
            ended = time.perf_counter()
        return Said(way, text, ended - began, ended - asked_at >= self.limits.answer_seconds)

    @contextmanager
    def _as(self, way: str) -> Iterator[None]:
        """The model as a way to ask wants it; as it was again afterwards, whatever happens."""
        if way == WITH:
            yield
            return
        preparer: Any = self.model.backbone.preparer
        thinking = getattr(preparer, "thinking", None)
        after = {}
        try:
            if self.has_block:
                preparer.thinking = None
            if way == BEFORE:
                after = {name: p.detach().cpu().clone() for name, p in _learning(self.model)}
                _put(self.model, self._before)
            yield
        finally:
            if self.has_block:
                preparer.thinking = thinking
            _put(self.model, after)

    def _notes(self, said: Sequence[Said]) -> list[str]:
        found = [
            f"“{self.label(one.way)}” was cut off after {self.limits.answer_seconds:g} s (--max-answer-seconds)."
            for one in said
            if one.cut
        ]
        # Why is told in the terminal: it may name places on this machine.
        found += [f"Expert {name} cannot run here, so what its head reads has no names." for name in self.unheard]
        return found


def _learning(model: AudioThinker) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.backbone.model.named_parameters() if p.requires_grad)


@torch.no_grad()
def _put(model: AudioThinker, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.backbone.model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


def words(heard: Heard) -> list[str]:
    """The readouts in words, one line for each: for those who do not see the plots, and to copy."""
    found = []
    for name, readout in heard.readout.items():
        if not len(readout.values):
            continue
        peaks, when = readout.values.max(0)
        top = peaks.argsort(descending=True)[: 1 if readout.hertz else _SURE].tolist()
        said = [f"{_named(readout, i)} {peaks[i]:.2f} at {(float(when[i]) + 0.5) / heard.rate:.1f} s" for i in top]
        present = "" if peaks[top[0]] >= readout.threshold else f"nothing reaches {readout.threshold:g}; "
        found.append(f"{name}, {readout.name}: {present}strongest {'; '.join(said)}")
    return found


def _named(readout: Readout, channel: int) -> str:
    if not readout.hertz:
        return readout.labels[channel]
    hertz = readout.hertz[channel]
    return f"{view_plots.note_name(round(69 + 12 * math.log2(hertz / 440)))} ({hertz:.0f} Hz)"
