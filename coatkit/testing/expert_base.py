"""What an author says of an expert, and what its checks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from coatkit.manifest import Kind
from coatkit.protocols import Backbone, Expert, Features
from coatkit.testing.bench import Bench, Failed, Lesson, misshapen
from coatkit.testing.suite import Conformance


class ExpertBase(Conformance):
    """Settings, hooks and the class-wide bench.

    Attributes:
        other_options: Options that stand for other weights; their fingerprint must differ. None has the suite change
            tensors of a loaded expert in place.
        tolerance: Largest difference between a sound in a batch and alone, as a share of the features' RMS. A
            correct 12-layer transformer is off by 4e-6; the faults we have seen begin at 1e-2.
        seconds: Lengths of the sounds in the shared batch: two alike, so that they go through together, and two apart.
        longest_seconds: The long sound's length.
        thinking_rate: Thinking positions per second the loss is tried at, Hz.
        weights_option: The option that takes a path of a checkpoint.
        checkpoint_tensor: A tensor the expert needs, as the checkpoint calls it; the first one when empty.
        checkpoint_says: What an error message calls that tensor, where the expert renames it; the same when empty.
    """

    kind: ClassVar[Kind] = "expert"
    other_options: ClassVar[Mapping[str, Any] | None] = None
    tolerance: ClassVar[float] = 1e-4
    seconds: ClassVar[tuple[float, ...]] = (0.5, 0.52, 1.0, 2.1)
    longest_seconds: ClassVar[float] = 30.0
    thinking_rate: ClassVar[float] = 25.0
    weights_option: ClassVar[str] = "weights"
    checkpoint_tensor: ClassVar[str] = ""
    checkpoint_says: ClassVar[str] = ""

    def backbone(self) -> Backbone | None:
        """Override it for an expert with `uses_backbone`: a small backbone, loaded."""
        return None

    def checkpoint(self, folder: Path) -> Path | None:
        """Override it to have checkpoint reading checked: write a checkpoint in its upstream layout, give its path."""
        return None

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls, tmp_path_factory: pytest.TempPathFactory) -> Bench:
        """The expert, loaded once for all checks."""
        if not cls.name:
            cls.fail("the test class has no name", f"set name in {cls.__name__} to a plugin's name or ./file.py:Class")
        return Bench(
            cls.name,
            cls.options,
            tmp_path_factory.mktemp("conformance"),
            cls.seconds,
            cls.longest_seconds,
            cls.thinking_rate,
            cls().backbone,
        )

    def loaded(self, bench: Bench) -> Expert:
        """The expert; the check is left out where there is none."""
        if bench.lacks_backbone:
            self.skip("it reads a backbone's features; override backbone() in this class to give one")
        if isinstance(bench.expert, Failed):
            self.skip("it could not be loaded; test_loads says why")
        return bench.expert

    def plain(self, bench: Bench) -> Features:
        """Features of the shared batch; the check is left out where they cannot be used."""
        self.loaded(bench)
        features = bench.mixed
        if isinstance(features, Failed) or misshapen(features, len(self.seconds)):
            self.skip("encode does not work on plain sounds; test_features_are_as_declared says why")
        return features

    def repeatable(self, bench: Bench) -> Features:
        """Features of the shared batch; left out where encoding again gives others, for nothing can be compared."""
        features = self.plain(bench)
        if bench.unrepeatable:
            self.skip("encode cannot be repeated; test_encoding_is_repeatable says how")
        return features

    def alone(self, bench: Bench) -> list[Features]:
        """Features of each shared sound alone; the check is left out where they cannot be used."""
        self.repeatable(bench)
        if isinstance(bench.single, Failed) or any(misshapen(features, 1) for features in bench.single):
            self.skip("encode does not work on one sound alone; test_padding_changes_nothing says how")
        return bench.single

    def second(self, bench: Bench) -> Expert:
        """Another instance with the same options; the check is left out where there is none."""
        self.loaded(bench)
        if isinstance(bench.second, Failed):
            self.skip("it cannot be loaded twice; test_second_load_is_equal says why")
        return bench.second

    def lesson(self, bench: Bench) -> Lesson:
        """Arguments for the loss; the check is left out where there are none."""
        self.plain(bench)
        if isinstance(bench.lesson, Failed):
            self.skip("its features cannot be put on thinking positions; test_features_are_as_declared says why")
        return bench.lesson

    def difference(self, one: Features, i: int, other: Features, j: int) -> str:
        """How sound `i` of one encode and sound `j` of another differ beyond `tolerance`; empty where they do not."""
        frames, others = int(one.lengths[i]), int(other.lengths[j])
        if frames != others:
            return f"{frames} frames against {others}"
        if frames == 0:
            return ""
        a, b = one.values[i, :frames].double(), other.values[j, :frames].double()
        if a.shape != b.shape:
            return f"values {tuple(a.shape)} against {tuple(b.shape)}"
        apart = (a - b).abs()
        worst = float(apart.nan_to_num(float("inf")).max())
        allowed = self.tolerance * (float(b.square().mean().sqrt()) or 1.0)
        if worst <= allowed:
            return ""
        off = (apart.nan_to_num(float("inf")).amax(-1) > allowed).nonzero().flatten()
        return (
            f"values differ by up to {worst:.2g}, where {allowed:.2g} is allowed, in {len(off)} of {frames} frames,"
            f" the first at {int(off[0]) / one.frame_rate + one.offset:.2f} s"
        )
