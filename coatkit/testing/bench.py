"""A component on the bench, loaded once, and everything it does watched; for an expert, its encodes shared as well."""

from __future__ import annotations

import importlib.metadata
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from coatkit import hookspecs, infer
from coatkit.align import align
from coatkit.data.audio import Samples, resample
from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row
from coatkit.manifest import Kind
from coatkit.plugins import Component, registry
from coatkit.protocols import AudioBatch, Backbone, BackboneAudio, Expert, Features
from coatkit.testing.guard import Watch, guarded
from coatkit.testing.sounds import tone

T = TypeVar("T")


@dataclass
class Lesson:
    """What a loss is given: features at thinking positions, and a prediction some way off."""

    target: Tensor
    mask: Tensor
    predicted: Tensor
    noise: Tensor
    """[A, L, dim], of the target's own spread."""


@dataclass
class Failed:
    """Foreign code raised; the checks that need its result say so."""

    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class Workbench:
    """Runs foreign code for the checks, and notes what it reaches for and what it changes.

    Args:
        kind: What the component is.
        name: What a spec's `use` takes.
        options: The component's options.
        folder: An empty folder of its own.
    """

    def __init__(self, kind: Kind, name: str, options: Mapping[str, Any], folder: Path) -> None:
        self.kind, self.name, self.folder = kind, name, folder
        # The home changes under guard, so a path given from the home is worked out now.
        self.options = {
            key: os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
            for key, value in options.items()
        }
        self.watch = Watch(kind)
        self.touched: dict[str, str] = {}
        """What of the process's state a call changed, to the call."""
        (folder / "home").mkdir()

    @cached_property
    def component(self) -> Component:
        return registry().resolve(self.kind, self.name, Path.cwd())

    @cached_property
    def light_modules(self) -> list[str]:
        """The plugin's entry module and its options module; none for an author's own class."""
        component = self.attempt(lambda: self.component)
        if isinstance(component, Failed) or component.manifest is None:
            return []
        entries = importlib.metadata.distribution(component.distribution).entry_points
        found = [entry.module for entry in entries if entry.group == hookspecs.GROUP]
        options = component.manifest.options
        return found if options is None else [*found, options.partition(":")[0]]

    def use(self) -> None:
        """Load it and call all it has, for the sake of what it does meanwhile."""
        raise NotImplementedError

    def call(self, what: str, function: Callable[[], T]) -> T:
        """Run foreign code under watch, and note what it does to the process's state."""
        before = _state()
        try:
            with guarded(self.watch, self.folder / "home"):
                return function()
        finally:
            after = _state()
            for name in before:
                if not _same(before[name], after[name]):
                    self.touched.setdefault(name, what)
            _restore(before)

    def attempt(self, function: Callable[[], T]) -> T | Failed:
        try:
            return function()
        except Exception as error:
            return Failed(error)


class Bench(Workbench):
    """Loads and calls an expert for the checks; nothing is loaded or encoded before it is asked for.

    Args:
        name: What a spec's `use` takes.
        options: The expert's options.
        folder: An empty folder of its own.
        seconds: Lengths of the sounds in the shared batch.
        longest_seconds: Length of the long sound.
        thinking_rate: Thinking positions per second, Hz.
        make_backbone: Gives the backbone for experts with `uses_backbone`, or None where the author gave none.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        folder: Path,
        seconds: tuple[float, ...],
        longest_seconds: float,
        thinking_rate: float,
        make_backbone: Callable[[], Backbone | None],
    ) -> None:
        super().__init__("expert", name, options, folder)
        self.thinking_rate, self.seconds, self.longest_seconds = thinking_rate, seconds, longest_seconds
        self._make_backbone = make_backbone
        self.weights: dict[str, Tensor] = {}
        """Tensors of numbers that `second` held before it encoded anything: what it caches later is no weight."""

    # Loading

    @cached_property
    def uses_backbone(self) -> bool:
        with guarded(self.watch, self.folder / "home"):
            return bool(self.component.load_class().uses_backbone)

    @cached_property
    def backbone(self) -> Backbone | None:
        backbone = self._make_backbone() if self.uses_backbone else None
        if backbone is not None:
            backbone.model.eval()
        return backbone

    @cached_property
    def lacks_backbone(self) -> bool:
        """Whether it reads a backbone's features and the author gave no backbone."""
        found = self.attempt(lambda: self.uses_backbone and self.backbone is None)
        return found is True

    def load(self, **changes: Any) -> Expert:
        """A new instance with the author's options, `changes` apart."""
        backbone = self.backbone
        options = {**self.options, **changes}
        return self.call("loading", lambda: infer.load_expert(self.name, backbone=backbone, **options))

    @cached_property
    def expert(self) -> Expert | Failed:
        return self.attempt(self.load)

    @cached_property
    def second(self) -> Expert | Failed:
        """Another instance."""
        found = self.attempt(self.load)
        if not isinstance(found, Failed):
            self.weights = {name: t for name, t in weights(found).items() if t.is_floating_point()}
        return found

    # Calling

    def batch(self, *arrays: Samples, rate: int) -> AudioBatch:
        """Sounds at `rate` Hz as an expert gets them, the backbone's features with them where it reads those."""
        audio = AudioBatch.from_arrays(arrays, rate)
        if self.backbone is not None:
            audio.backbone = _heard(self.backbone, arrays, rate)
        return audio

    def encode(self, expert: Expert, *arrays: Samples) -> Features:
        """Features of sounds, under `no_grad` as in training."""
        audio = self.batch(*arrays, rate=expert.sample_rate)
        return self.encode_batch(expert, audio)

    def encode_batch(self, expert: Expert, audio: AudioBatch) -> Features:
        def run() -> Features:
            with torch.no_grad():
                return expert.encode(audio)

        return self.call("encode", run)

    def loss(self, expert: Expert, predicted: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        target, mask = lesson.target.clone(), lesson.mask.clone()  # a loss that changes them spoils no other check
        return self.call("loss", lambda: expert.loss(predicted, target, mask))

    def backward(self, expert: Expert, lesson: Lesson) -> None:
        """One loss and its gradient, as in a training step."""
        predicted = lesson.predicted.clone().requires_grad_()
        terms = list(self.loss(expert, predicted, lesson).values())
        torch.autograd.grad(torch.stack(terms).sum(), predicted)

    # What checks share

    @cached_property
    def arrays(self) -> list[Samples]:
        """The shared sounds, each of its own length."""
        assert isinstance(self.expert, Expert)
        return [tone(seconds, self.expert.sample_rate, seed) for seed, seconds in enumerate(self.seconds)]

    @cached_property
    def mixed(self) -> Features | Failed:
        """The shared sounds in one padded batch."""
        expert = self.expert
        assert isinstance(expert, Expert)
        return self.attempt(lambda: self.encode(expert, *self.arrays))

    @cached_property
    def single(self) -> list[Features] | Failed:
        """Each shared sound alone."""
        expert = self.expert
        assert isinstance(expert, Expert)
        return self.attempt(lambda: [self.encode(expert, array) for array in self.arrays])

    @cached_property
    def long(self) -> Features | Failed:
        """The long sound."""
        expert = self.expert
        assert isinstance(expert, Expert)
        return self.attempt(lambda: self.encode(expert, tone(self.longest_seconds, expert.sample_rate)))

    @cached_property
    def unrepeatable(self) -> str:
        """What another encode of the shared batch does instead of giving the same bits; empty where it does."""
        first, expert = self.mixed, self.expert
        assert isinstance(first, Features)
        assert isinstance(expert, Expert)
        values, lengths = first.values.clone(), first.lengths.clone()
        again = self.attempt(lambda: self.encode(expert, *self.arrays))
        if isinstance(again, Failed):
            return f"raises {again}"
        same = torch.equal(again.values, values) and torch.equal(again.lengths, lengths)
        return "" if same else "gives other features"

    @cached_property
    def lesson(self) -> Lesson | Failed:
        """The shared batch at thinking positions."""
        features, expert = self.mixed, self.expert
        assert isinstance(features, Features)
        assert isinstance(expert, Expert)

        def make() -> Lesson:
            lengths = torch.tensor([max(1, int(seconds * self.thinking_rate)) for seconds in self.seconds])
            target = align(features, lengths, self.thinking_rate, expert.upsampling)
            mask = torch.arange(target.shape[1]) < lengths[:, None]
            spread = float(target[mask].square().mean().sqrt()) or 1.0
            noise = spread * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
            return Lesson(target, mask, target + 0.5 * noise, noise)

        return self.attempt(make)

    def use(self) -> None:
        """Load the expert, encode with it and compute a loss, for the sake of what it does meanwhile."""
        expert = self.expert
        if isinstance(expert, Failed) or misshapen(self.mixed, len(self.seconds)):
            return
        lesson = self.lesson
        if not isinstance(lesson, Failed):
            self.attempt(lambda: self.loss(expert, lesson.predicted, lesson))


def misshapen(features: Any, sounds: int) -> str:
    """What keeps an output from being read at all; empty where it can be."""
    if not isinstance(features, Features):
        return f"encode gave a {type(features).__name__}, not coatkit.Features"
    values, lengths = features.values, features.lengths
    if values.ndim != 3 or values.shape[0] != sounds:
        return f"encode gave values {tuple(values.shape)} for {sounds} sound(s); expected [{sounds}, frames, dim]"
    if not values.is_floating_point():
        return f"encode gave values of type {values.dtype}; expected floats"
    if tuple(lengths.shape) != (sounds,) or lengths.is_floating_point():
        return f"encode gave lengths {tuple(lengths.shape)} {lengths.dtype}; expected [{sounds}] int64"
    if bool((lengths < 0).any()) or bool((lengths > values.shape[1]).any()):
        return f"encode gave lengths {lengths.tolist()} where values hold {values.shape[1]} frames"
    return ""


def _heard(backbone: Backbone, arrays: tuple[Samples, ...], rate: int) -> BackboneAudio:
    """A backbone's own features of sounds, got as in training: from a forward pass over rows that hold them."""
    messages = (Message("user", f"{AUDIO_TAG}What is heard?"), Message("assistant", "A sound."))
    rows = [Row(f"sound {i}", messages, (AudioRef(Path(f"{i}.wav")),)) for i in range(len(arrays))]
    wanted = backbone.preparer.sample_rate
    audio = AudioBatch.from_arrays([resample(array, rate, wanted) for array in arrays], wanted)
    with torch.no_grad():
        found = backbone.forward(backbone.preparer.prepare(rows, audio, train=True)).audio
    assert found is not None, "a forward pass over rows with sounds gave no audio features"
    return found


def parts(expert: object) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Modules and tensors an expert holds, by where: as attributes, in containers, or in its own helper objects."""
    seen: set[int] = set()

    def walk(where: str, value: Any, depth: int) -> Iterator[tuple[str, nn.Module | Tensor]]:
        if id(value) in seen or depth > 4 or isinstance(value, Backbone):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module | Tensor):
            yield where, value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{where}[{key!r}]", inner, depth + 1)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                yield from walk(f"{where}[{i}]", inner, depth + 1)
        elif hasattr(value, "__dict__") and not isinstance(value, type | FunctionType | MethodType | ModuleType):
            for key, inner in vars(value).items():
                yield from walk(f"{where}.{key}".lstrip("."), inner, depth + 1)

    for key, value in list(vars(expert).items()):
        yield from walk(key, value, 0)


def weights(expert: object) -> dict[str, Tensor]:
    """Every tensor of an expert that is state: parameters, buffers that are saved, and bare tensors."""
    found: dict[str, Tensor] = {}
    for where, part in parts(expert):
        if isinstance(part, Tensor):
            found[where] = part
        else:
            found |= {f"{where}.{name}": tensor for name, tensor in part.state_dict().items()}
    return found


def parameters(expert: object) -> dict[str, Tensor]:
    """Parameters of every module, and bare tensors, by name."""
    found: dict[str, Tensor] = {}
    for where, part in parts(expert):
        if isinstance(part, Tensor):
            found[where] = part
        else:
            found |= {f"{where}.{name}": parameter for name, parameter in part.named_parameters()}
    return found


def _state() -> dict[str, Any]:
    """The process's state that foreign code must leave alone, by what a message calls it."""
    return {
        "torch's global random state": torch.get_rng_state(),
        "numpy's global random state": np.random.get_state(),
        "Python's global random state": random.getstate(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
    }


def _restore(state: Mapping[str, Any]) -> None:
    """Switches go back, so that one fault is not found twice. Random states do not: put back, dropout would repeat."""
    torch.set_grad_enabled(state["torch's grad mode"])
    torch.set_default_dtype(state["torch's default dtype"])
    if torch.get_num_threads() != state["torch's number of threads"]:
        torch.set_num_threads(state["torch's number of threads"])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
