"""Using what was trained: load a run, ask about a sound; and load a backbone or an expert on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from coatkit import build, checkpoint
from coatkit.data import audio as sound
from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row
from coatkit.errors import PluginError, RunError
from coatkit.model import CoatModel
from coatkit.plugins import Component, registry
from coatkit.protocols import AudioBatch, Backbone, Expert
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
    """

    def __init__(self, backbone: Backbone, name: str) -> None:
        self.backbone, self.name = backbone, name
        backbone.model.eval()

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
        if not questions:
            return []
        preparer = self.backbone.preparer
        rows: list[Row] = []
        arrays: list[sound.Samples] = []
        for i, (audio, question) in enumerate(questions):
            where = str(audio) if isinstance(audio, str | Path) else f"question {i + 1}"
            tag = "" if audio is None or AUDIO_TAG in question else AUDIO_TAG
            refs = () if audio is None else (AudioRef(Path(where)),)
            row = Row(f"question {i + 1}", (Message("user", tag + question),), refs, where)
            if (tags := row.messages[0].content.count(AUDIO_TAG)) != len(refs):
                raise row.fail(f"the question has {tags} {AUDIO_TAG} tags for {len(refs)} sound(s)")
            rows.append(row)
            if audio is not None:
                arrays.append(self._samples(audio, row))
        batch = AudioBatch.from_arrays(arrays, preparer.sample_rate) if arrays else None
        inputs = preparer.prepare(rows, batch, train=False)
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
            ref = audio if isinstance(audio, AudioRef) else AudioRef(Path(audio))
            samples, rate = sound.read(ref, _MAX_SECONDS)
        if reason := preparer.cannot_hear(samples.size / rate):
            raise row.fail(reason)
        return sound.resample(samples, rate, preparer.sample_rate)


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
        chosen.component, chosen.options, loaded.spec.thinking, loaded.spec.seed, device or best_device()
    )
    if backbone.fingerprint() != record.get("backbone", {}).get("fingerprint"):
        raise RunError(f"{folder.path}: the backbone's weights are not those the run was trained on")
    if trained:
        newest = folder.latest()
        if newest is None:
            raise RunError(f"{folder.path}: has no checkpoint yet; train it with: coatkit train SPEC --resume")
        model = CoatModel(backbone, {}, {})
        names = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        checkpoint.load_model(newest, model, names, ignore="heads.")
    return AudioThinker(backbone, str(folder.path) if trained else f"{folder.path} (untrained)")


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
    return build.load_backbone(component, checked, settings, seed, device or best_device())


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
