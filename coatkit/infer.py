"""Using what was trained: load a run, ask about a sound; and load a backbone or an expert on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from coatkit import build, checkpoint
from coatkit.data.audio import LONGEST_ASKED
from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row
from coatkit.data.steps import load_batch
from coatkit.errors import PluginError, RunError
from coatkit.model import CoatModel
from coatkit.plugins import Component, registry
from coatkit.protocols import Backbone, Expert, Inputs
from coatkit.run_folder import RunFolder
from coatkit.spec import ThinkingSpec
from coatkit.spec_file import load_spec
from coatkit.streaming import pieces
from coatkit.thought import Mind, Thought

AudioLike = str | Path | AudioRef | tuple[np.ndarray, int]
"""A file, a stretch of one, or mono samples [N] with their sample rate in Hz."""
Turn = tuple[AudioLike | None, str, str]
"""An earlier turn of a conversation: its sound if it had one, what was asked, and what was answered."""


class AudioThinker:
    """A backbone that answers questions about sounds, thinking first.

    Attributes:
        backbone: The loaded backbone.
        name: Where it came from, for display.
        checkpoint: The folder of what was learnt; None before training.
        run: The run's folder; None for a model that comes from none.
    """

    def __init__(
        self, backbone: Backbone, name: str, checkpoint: Path | None = None, run: RunFolder | None = None
    ) -> None:
        self.backbone, self.name, self.checkpoint, self.run = backbone, name, checkpoint, run
        backbone.model.eval()

    @property
    def step(self) -> int:
        """Optimizer steps it has learnt for; 0 before training."""
        return 0 if self.checkpoint is None else checkpoint.step_of(self.checkpoint)

    def answer(self, rows: Sequence[Row], *, max_new_tokens: int = 64, **options: Any) -> list[str]:
        """Answers to rows, decoded together: any number of turns and sounds, or text alone.

        A last message from the assistant is left out; earlier ones are part of the conversation.

        Args:
            rows: As a manifest gives them.
            options: Go to the model's `generate`, which is greedy without them.

        Raises:
            DataError: If a row's sound cannot be read, or is too short or too long to be heard; names the row.
        """
        if not rows:
            return []
        return self.backbone.generate(self.prepare(rows), max_new_tokens=max_new_tokens, **options)

    def prepare(self, rows: Sequence[Row]) -> Inputs:
        """What the backbone takes to answer these rows.

        Raises:
            DataError: As `answer`.
        """
        return load_batch(rows, self.backbone.preparer, (), LONGEST_ASKED, train=False).inputs

    @cached_property
    def mind(self) -> Mind:
        """Heads and experts of the run, loaded when first asked for.

        Raises:
            RunError: If the model comes from no run.
            SpecError: If a plugin it was made with is missing; names it.
        """
        if self.run is None:
            raise RunError(f"{self.name}: heads and experts are a run's; load one with coatkit.load")
        return Mind.of_run(load_spec(self.run.spec, need="components"), self.backbone, self.checkpoint)

    def think(self, rows: Sequence[Row], *, targets: bool = False) -> list[Thought]:
        """What is thought about rows before they are answered; see `coatkit.thought.Mind.think`."""
        return self.mind.think(rows, targets=targets)

    @overload
    def ask(
        self,
        audio: AudioLike | None,
        question: str,
        *,
        history: Sequence[Turn] = (),
        return_thinking: Literal[False] = False,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> str: ...

    @overload
    def ask(
        self,
        audio: AudioLike | None,
        question: str,
        *,
        history: Sequence[Turn] = (),
        return_thinking: Literal[True],
        max_new_tokens: int = 64,
        **options: Any,
    ) -> tuple[str, Thought]: ...

    def ask(
        self,
        audio: AudioLike | None,
        question: str,
        *,
        history: Sequence[Turn] = (),
        return_thinking: bool = False,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> str | tuple[str, Thought]:
        """The answer to one question; `options` go to the model's `generate`.

        Args:
            history: The turns before it, the earliest first. One with a sound has a block before its answer.
            return_thinking: Give (answer, thought): the states at the thinking positions, what the heads make of them,
                and the readouts. It costs a second pass over the prompt.

        Raises:
            DataError: If the sound cannot be read, or is too short or too long to be heard.
            RunError: If thinking is to be returned and the model comes from no run.
        """
        row = asked(audio, question, history=history)
        (answer,) = self.answer([row], max_new_tokens=max_new_tokens, **options)
        return (answer, self.think([row])[0]) if return_thinking else answer

    def ask_batch(
        self, questions: Sequence[tuple[AudioLike | None, str]], *, max_new_tokens: int = 64, **options: Any
    ) -> list[str]:
        """Answers to (sound, question) pairs, decoded together; a None sound asks about text alone."""
        rows = [asked(audio, question, f"question {i + 1}") for i, (audio, question) in enumerate(questions)]
        return self.answer(rows, max_new_tokens=max_new_tokens, **options)

    def stream(
        self,
        audio: AudioLike | None,
        question: str,
        *,
        history: Sequence[Turn] = (),
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Iterator[str]:
        """The answer to one question in pieces, as they are decoded; decoding ends when nobody takes more.

        Raises:
            DataError: As `ask`.
        """
        row = asked(audio, question, history=history)
        return pieces(self.backbone, self.prepare([row]), max_new_tokens=max_new_tokens, **options)


def asked(audio: AudioLike | None, question: str, name: str = "question 1", *, history: Sequence[Turn] = ()) -> Row:
    """A question as a row, its id `name`; a None sound asks about text alone.

    Args:
        history: The turns before it, the earliest first.

    Raises:
        DataError: If a question is empty or its tags do not match its sound, or an earlier answer is empty or has one.
    """
    messages: list[Message] = []
    refs: list[AudioRef] = []
    for number, (heard, said, answer) in enumerate(history, 1):
        turn = f"{name}, turn {number}"
        refs += _put(messages, heard, said, turn)
        if not answer.strip() or AUDIO_TAG in answer:
            wrong = f"holds {AUDIO_TAG}" if answer.strip() else "is empty"
            raise Row(turn, (), (), turn).fail(f"its answer {wrong}; give what was answered")
        messages.append(Message("assistant", answer))
    own = _put(messages, audio, question, name)
    return Row(name, tuple(messages), (*refs, *own), str(own[0]) if own else name)


def _put(messages: list[Message], audio: AudioLike | None, question: str, name: str) -> list[AudioRef]:
    """Add a question to a conversation; its sound, if there is one."""
    refs: list[AudioRef] = []
    if isinstance(audio, tuple):
        refs = [AudioRef(Path(name), samples=audio)]
    elif audio is not None:
        refs = [audio if isinstance(audio, AudioRef) else AudioRef(Path(audio))]
    place = Row(name, (), (), str(refs[0]) if refs else name)
    if not question.replace(AUDIO_TAG, "").strip():
        raise place.fail("the question is empty")
    tags = question.count(AUDIO_TAG)
    if refs and not tags:
        question, tags = AUDIO_TAG + question, 1
    if tags != len(refs):
        raise place.fail(f"the question has {tags} {AUDIO_TAG} tags for {len(refs)} sound(s)")
    messages.append(Message("user", question))
    return refs


def load(run: str | Path, *, trained: bool = True, step: int | None = None, device: str | None = None) -> AudioThinker:
    """A run, ready to answer.

    Args:
        run: The run folder.
        trained: False gives the model as it was before the first step, for comparison.
        step: Of the checkpoint to take; the newest when left out.
        device: Torch device; the best there is when left out.

    Raises:
        RunError: If it is no run folder, or has no checkpoint yet or not that one.
        SpecError: If the backbone's plugin is missing.
    """
    folder = RunFolder(Path(run))
    record = folder.read_record()
    loaded = load_spec(folder.spec, need="backbone")
    chosen = loaded.chosen["backbone"]
    backbone = build.load_backbone(
        chosen.component, chosen.options, loaded.spec.thinking, loaded.spec.seed, _device(device)
    )
    if backbone.fingerprint() != record.get("backbone", {}).get("fingerprint"):
        raise RunError(
            f"{folder.path}: the backbone's weights are not those the run was trained on; fetch those that its run.json"
            " names, or use the coatkit that wrote it"
        )
    newest = folder.learnt(step) if trained else None
    if newest is not None:
        put_learnt(backbone, newest)
    return AudioThinker(backbone, str(folder.path) if trained else f"{folder.path} (untrained)", newest, folder)


def put_learnt(backbone: Backbone, learnt: Path) -> None:
    """Give a backbone as it was before training what it has learnt by a checkpoint.

    Raises:
        RunError: If the checkpoint does not fit.
    """
    model = CoatModel(backbone, {}, {})
    names = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    checkpoint.load_model(learnt, model, names, ignore="heads.")


def load_backbone(
    name_or_use: str,
    *,
    thinking: ThinkingSpec | str | None = ThinkingSpec(),  # noqa: B008
    device: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Backbone:
    """A backbone by plugin name, `./file.py:Class` or `module:Class`, with its weights.

    Args:
        name_or_use: What a spec's `backbone.use` takes.
        thinking: The block's settings; None or "off" for no block.
        device: Torch device; the best there is when left out.
        seed: Seed of whatever starts at random.
        options: The backbone's options.

    Raises:
        PluginError: If it is unknown or an option is wrong.
        AssetError: If its weights have not been fetched.
    """
    component, checked = _resolve("backbone", name_or_use, options)
    try:
        settings = None if thinking in (None, "off") else ThinkingSpec.model_validate(thinking)
    except ValidationError as error:
        raise PluginError(f"thinking: {_problems(error)}; give 'off' or a ThinkingSpec") from None
    return build.load_backbone(component, checked, settings, seed, _device(device))


def load_expert(name_or_use: str, *, backbone: Backbone | None = None, device: str = "cpu", **options: Any) -> Expert:
    """An expert by plugin name, `./file.py:Class` or `module:Class`, with its weights.

    Args:
        name_or_use: What a spec's `use` takes.
        backbone: For experts that read the backbone's features.
        device: Torch device; the CPU when left out, where `AudioBatch.from_arrays` puts sounds.
        options: The expert's options.

    Raises:
        PluginError: If it is unknown or an option is wrong.
        AssetError: If its weights have not been fetched.
    """
    component, checked = _resolve("expert", name_or_use, options)
    return build.load_expert(component, checked, backbone, device)


def _device(name: str | None) -> str:
    """A device that is there.

    Raises:
        RunError: If it is not.
    """
    try:
        torch.empty(0, device=name or best_device())
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"device {name!r}: {reason[:120]}; leave it out for the best there is") from None
    return name or best_device()


def best_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve(kind: Any, use: str, options: dict[str, Any]) -> tuple[Component, dict[str, Any]]:
    component = registry().resolve(kind, use, Path.cwd())
    model = component.options_model()
    if model is None:
        return component, options
    try:
        checked: BaseModel = model.model_validate(options)
    except ValidationError as error:
        raise PluginError(f"{use}: {_problems(error)}; options: {', '.join(model.model_fields)}") from None
    return component, checked.model_dump(mode="json")


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
