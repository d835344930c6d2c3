"""Using what was trained: load a run, ask about a sound; and load a backbone or an expert on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from coatkit import build, checkpoint
from coatkit.data import audio as sound
from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row
from coatkit.data.steps import load_batch
from coatkit.errors import PluginError, RunError
from coatkit.model import CoatModel
from coatkit.plugins import Component, registry
from coatkit.protocols import AudioBatch, Backbone, Expert, Inputs
from coatkit.run_folder import RunFolder
from coatkit.spec import ThinkingSpec
from coatkit.spec_file import load_spec

AudioLike = str | Path | AudioRef | tuple[np.ndarray, int]
"""A file, a stretch of one, or mono samples [N] with their sample rate in Hz."""
_MAX_SECONDS = 600.0


class AudioThinker:
    """A backbone that answers questions about sounds, thinking first.

    Attributes:
        backbone: The loaded backbone.
        name: Where it came from, for display.
        checkpoint: The folder of what was learnt; None before training.
    """

    def __init__(self, backbone: Backbone, name: str, checkpoint: Path | None = None) -> None:
        self.backbone, self.name, self.checkpoint = backbone, name, checkpoint
        backbone.model.eval()

    @property
    def step(self) -> int:
        """Optimizer steps it has learnt for; 0 before training."""
        return 0 if self.checkpoint is None else int(self.checkpoint.name.rpartition("-")[2])

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
        return load_batch(rows, self.backbone.preparer, (), _MAX_SECONDS, train=False).inputs

    def ask(self, audio: AudioLike | None, question: str, *, max_new_tokens: int = 64, **options: Any) -> str:
        """The answer to one question; `options` go to the model's `generate`.

        Raises:
            DataError: If the sound cannot be read, or is too short or too long to be heard.
        """
        return self.ask_batch([(audio, question)], max_new_tokens=max_new_tokens, **options)[0]

    def ask_batch(
        self, questions: Sequence[tuple[AudioLike | None, str]], *, max_new_tokens: int = 64, **options: Any
    ) -> list[str]:
        """Answers to (sound, question) pairs, decoded together; a None sound asks about text alone."""
        rows = [_asked(i, audio, question) for i, (audio, question) in enumerate(questions)]
        if not any(isinstance(audio, tuple) for audio, _ in questions):
            return self.answer(rows, max_new_tokens=max_new_tokens, **options)
        preparer = self.backbone.preparer
        arrays = [self._samples(a, row) for (a, _), row in zip(questions, rows, strict=True) if a is not None]
        inputs = preparer.prepare(rows, AudioBatch.from_arrays(arrays, preparer.sample_rate), train=False)
        return self.backbone.generate(inputs, max_new_tokens=max_new_tokens, **options)

    def _samples(self, audio: AudioLike, row: Row) -> sound.Samples:
        preparer = self.backbone.preparer
        if isinstance(audio, tuple):
            if np.issubdtype(np.asarray(audio[0]).dtype, np.integer):
                raise row.fail("samples must be floats in about [-1, 1]; divide 16-bit integers by 32768")
            samples, rate = np.asarray(audio[0], dtype=np.float32), int(audio[1])
            if rate < 1:
                raise row.fail(f"the sample rate must be in Hz, got {audio[1]}")
            if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
                raise row.fail(f"samples must be a non-empty finite mono signal [N], got shape {samples.shape}")
        else:
            samples, rate = sound.read(row.audios[0], _MAX_SECONDS)
        if reason := preparer.cannot_hear(samples.size / rate):
            raise row.fail(reason)
        return sound.resample(samples, rate, preparer.sample_rate)


def _asked(number: int, audio: AudioLike | None, question: str) -> Row:
    """A question as a row; samples in memory have a place in it that is no file."""
    name = f"question {number + 1}"
    where = str(audio) if isinstance(audio, str | Path | AudioRef) else name
    refs: tuple[AudioRef, ...] = ()
    if audio is not None:
        refs = (audio if isinstance(audio, AudioRef) else AudioRef(Path(where)),)
    row = Row(name, (Message("user", question),), refs, where)
    if not question.replace(AUDIO_TAG, "").strip():
        raise row.fail("the question is empty")
    tags = question.count(AUDIO_TAG)
    if refs and not tags:
        return replace(row, messages=(Message("user", AUDIO_TAG + question),))
    if tags != len(refs):
        raise row.fail(f"the question has {tags} {AUDIO_TAG} tags for {len(refs)} sound(s)")
    return row


def load(run: str | Path, *, trained: bool = True, device: str | None = None) -> AudioThinker:
    """A run, ready to answer.

    Args:
        run: The run folder.
        trained: False gives the model as it was before the first step, for comparison.
        device: Torch device; the best there is when left out.

    Raises:
        RunError: If it is no run folder, has no checkpoint yet, or a plugin it was made with is missing.
    """
    folder = RunFolder(Path(run))
    record = folder.read_record()
    loaded = load_spec(folder.spec, need="backbone")
    chosen = loaded.chosen["backbone"]
    backbone = build.load_backbone(
        chosen.component, chosen.options, loaded.spec.thinking, loaded.spec.seed, _device(device)
    )
    if backbone.fingerprint() != record.get("backbone", {}).get("fingerprint"):
        raise RunError(f"{folder.path}: the backbone's weights are not those the run was trained on")
    newest = folder.latest() if trained else None
    if trained:
        if newest is None:
            raise RunError(f"{folder.path}: has no checkpoint yet; train it with: coatkit train SPEC --resume")
        model = CoatModel(backbone, {}, {})
        names = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        checkpoint.load_model(newest, model, names, ignore="heads.")
    return AudioThinker(backbone, str(folder.path) if trained else f"{folder.path} (untrained)", newest)


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
