"""What an author says of a backbone, and what its checks have in common."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor

from coatkit.backbones.hf import HFBackbone
from coatkit.manifest import Kind
from coatkit.protocols import Backbone, Inputs, Output
from coatkit.testing.backbone_bench import BackboneBench
from coatkit.testing.bench import Failed
from coatkit.testing.suite import Conformance


class Plain(NamedTuple):
    """The shared backbone with the shared rows and one pass over them."""

    backbone: Backbone
    inputs: Inputs
    output: Output


class BackboneBase(Conformance):
    """Settings, and the class-wide bench.

    Attributes:
        several_sounds: Whether a row may hold more than one sound. Where it may not, such a row must be refused.
        seconds: Lengths of the three shared sounds, all of which it hears.
        longest_seconds: A length beyond the 30 s of Whisper's window. It is heard in full, or the preparer's
            `cannot_hear` says why not.
        tolerance: Largest difference between a row in a batch and alone, as a share of the values' RMS.
    """

    kind: ClassVar[Kind] = "backbone"
    several_sounds: ClassVar[bool] = True
    seconds: ClassVar[tuple[float, float, float]] = (0.4, 0.15, 0.9)
    longest_seconds: ClassVar[float] = 35.0
    tolerance: ClassVar[float] = 1e-4

    def model_folder(self, folder: Path) -> Path | None:
        """Override it to write a model folder as the option `weights` takes it, below `folder`, and give its path.

        Without it, a `coatkit.HFBackbone` is tried with what transformers saves of its stock model and tokenizer.
        """
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls, tmp_path_factory: pytest.TempPathFactory) -> BackboneBench:
        """The backbone, loaded once for all checks."""
        if not cls.name:
            cls.fail("the test class has no name", f"set name in {cls.__name__} to a plugin's name or ./file.py:Class")
        folder = tmp_path_factory.mktemp("conformance")
        return BackboneBench(cls.name, cls.options, folder, cls.seconds, cls.several_sounds)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.partition(".")[0] == "coatkit":
            for name, check in list(vars(cls).items()):
                if name.startswith("test_"):
                    setattr(cls, name, _explained(check))

    def loaded(self, bench: BackboneBench) -> Backbone:
        """The backbone; the check is left out where there is none."""
        if isinstance(bench.backbone, Failed):
            self.skip("it could not be loaded; test_loads says why")
        return bench.backbone

    def adapter(self, bench: BackboneBench) -> HFBackbone:
        """The backbone, where it is made with the adapter for transformers; the check is left out where it is not."""
        backbone = self.loaded(bench)
        if not isinstance(backbone, HFBackbone):
            self.skip("it is no coatkit.HFBackbone, so its inside is not known")
        return backbone

    def twice(self, bench: BackboneBench) -> Backbone:
        """The backbone, where every instance is the same; the check is left out where they differ."""
        self.loaded(bench)
        if isinstance(bench.raw, Failed) or isinstance(bench.second, Failed) or bench.loads_differ:
            self.skip("two instances are not the same; test_second_load_is_equal says how")
        return self.loaded(bench)

    def prepared(self, bench: BackboneBench) -> Inputs:
        """The shared rows, to learn from; the check is left out where they cannot be prepared."""
        self.loaded(bench)
        if isinstance(bench.inputs, Failed):
            self.skip("the plain rows cannot be prepared; test_prepares says why")
        return bench.inputs

    def plain(self, bench: BackboneBench) -> Plain:
        """Backbone, shared rows and one pass; the check is left out where they cannot be used."""
        backbone, inputs = self.loaded(bench), self.prepared(bench)
        if isinstance(bench.output, Failed) or odd(bench.output, inputs, backbone):
            self.skip("a pass over the plain rows is of no use; test_output_is_as_declared says why")
        return Plain(backbone, inputs, bench.output)

    def working(self, backbone: Backbone | Failed, what: str) -> Backbone:
        """A variant of the backbone; the check fails where it cannot be loaded."""
        if isinstance(backbone, Failed):
            self.fail(f"{what} cannot be loaded: {backbone}", "repair load() for these settings")
        return backbone

    def broken(self, what: str, found: Failed, remedy: str) -> NoReturn:
        self.fail(f"{what} raised {found}", remedy)

    def apart(self, one: Tensor, other: Tensor) -> str:
        """How two tensors differ beyond `tolerance`; empty where they do not."""
        return difference(one, other, self.tolerance)


def _explained(check: Callable[..., None]) -> Callable[..., None]:
    """A check in which an error of the backbone's code is a failure that says where it arose."""

    @functools.wraps(check)
    def explained(self: BackboneBase, *args: Any, **kwargs: Any) -> None:
        try:
            check(self, *args, **kwargs)
        except Exception as error:
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            promise = (check.__doc__ or "").strip().partition("\n")[0]
            self.fail(
                f"{type(error).__name__}: {error}\n  at {frames[-1]}, called from {', '.join(frames[1:-1][-3:])}"
                f"\n  while checking: {promise}",
                "repair what raised it; the checks before this one may say more",
            )

    return explained


def difference(one: Tensor, other: Tensor, tolerance: float) -> str:
    """How two tensors differ by more than `tolerance` times the RMS of `other`; empty where they do not."""
    if one.shape != other.shape:
        return f"shape {tuple(one.shape)} against {tuple(other.shape)}"
    if not one.numel():
        return ""
    a, b = one.detach().double(), other.detach().double()
    worst = float((a - b).abs().nan_to_num(float("inf")).max())
    allowed = tolerance * float(b.square().mean().sqrt())
    return "" if worst <= allowed else f"values differ by up to {worst:.2g}, where {allowed:.2g} is allowed"


def odd(output: Any, inputs: Inputs, backbone: Backbone) -> str:
    """What keeps an output from being what the protocol says; empty where nothing does."""
    if not isinstance(output, Output):
        return f"forward gave a {type(output).__name__}, not a coatkit Output"
    if not isinstance(output.ce_sum, Tensor) or output.ce_sum.ndim:
        return "ce_sum is no scalar tensor"
    wanted = 0 if inputs.labels is None else int((inputs.labels[:, 1:] != -100).sum())
    if output.ce_count != wanted:
        return f"ce_count is {output.ce_count} for {wanted} answer tokens"
    if not output.ce_sum.isfinite():
        return f"ce_sum is {float(output.ce_sum)}"
    sounds, width = inputs.audio_lengths.numel(), backbone.hidden_size
    if not sounds:
        extra = [name for name in ("thinking", "audio") if getattr(output, name) is not None]
        return f"{' and '.join(extra)} of rows without a sound should be None" if extra else ""
    if bool(inputs.think_lengths.any()):
        expected = (*inputs.think_index.shape, width)
        if output.thinking is None or tuple(output.thinking.shape) != expected:
            shape = None if output.thinking is None else tuple(output.thinking.shape)
            return f"thinking is {shape}; expected {expected}: sounds, positions, hidden_size"
        if not output.thinking.isfinite().all():
            return "thinking holds NaN or infinite values"
    elif output.thinking is not None:
        return "thinking should be None where no row has a block"
    return _odd_audio(output, inputs, backbone)


def _odd_audio(output: Output, inputs: Inputs, backbone: Backbone) -> str:
    heard, most = output.audio, int(inputs.audio_lengths.max())
    if heard is None:
        return "audio is None for rows with sounds"
    if not torch.equal(heard.lengths.cpu(), inputs.audio_lengths):
        return f"audio.lengths are {heard.lengths.tolist()}, the inputs say {inputs.audio_lengths.tolist()}"
    if abs(heard.frame_rate - backbone.preparer.frame_rate) > 1e-6 * backbone.preparer.frame_rate:
        return f"audio.frame_rate is {heard.frame_rate}, the preparer says {backbone.preparer.frame_rate}"
    for name in ("consumed", "tower"):
        values = getattr(heard, name)
        if values is None and name == "tower" and name not in backbone.audio_dims:
            continue
        shape = None if values is None else tuple(values.shape)
        expected = (len(heard.lengths), most, backbone.audio_dims.get(name))
        if shape != expected:
            return f"audio.{name} is {shape}; expected {expected}: sounds, audio tokens, audio_dims[{name!r}]"
        if not values.isfinite().all():
            return f"audio.{name} holds NaN or infinite values"
        if values.requires_grad:
            return f"audio.{name} carries gradient, and it is a target"
    return ""
