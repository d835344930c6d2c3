"""Checks on what an expert makes of sound."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from coatkit.errors import CoatkitError
from coatkit.model import check_features
from coatkit.protocols import Features
from coatkit.testing import sounds
from coatkit.testing.bench import Bench, Failed, misshapen
from coatkit.testing.expert_base import ExpertBase


class EncodingChecks(ExpertBase):
    """What comes out of `encode`, for plain and odd sounds, alone and in a batch."""

    def test_features_are_as_declared(self, bench: Bench) -> None:
        """Values [A, L, dim], lengths and rate are what the class declares, and the frames cover each sound."""
        expert, features = self.loaded(bench), bench.mixed
        if isinstance(features, Failed):
            self.fail(f"encode raised {features}", "make encode work for a batch of plain sounds")
        remedy = (
            "set sample_rate, frame_rate and dim to what encode gives, and lengths to the valid frames of each sound"
        )
        if problem := misshapen(features, len(self.seconds)):
            self.fail(problem, remedy)
        try:
            check_features(features, bench.batch(*bench.arrays, rate=expert.sample_rate), expert)
        except ValueError as error:
            self.fail(str(error), remedy)
        if not features.values.isfinite().all():
            self.fail(
                "encode gave NaN or infinite values for plain sounds, or in the padding beyond them",
                "find where they arise with torch.isfinite; fill padding with zeros",
            )
        if expert.upsampling not in ("linear", "repeat"):
            self.fail(f"upsampling is {expert.upsampling!r}", "set it to 'linear' or 'repeat'")
        if isinstance(bench.lesson, Failed):
            self.fail(
                f"coatkit.align cannot put the features on thinking positions: {bench.lesson}",
                "give every sound of half a second or more at least one frame",
            )

    def test_frame_rate_holds_over_a_long_sound(self, bench: Bench) -> None:
        """A wrong rate shifts targets more the longer a sound is, so frames are counted over a long one."""
        self.plain(bench)
        expert, long = self.loaded(bench), bench.long
        if not expert.hears_all:
            self.skip("hears_all is False, so its frames need not cover a sound")
        if isinstance(long, Failed) or misshapen(long, 1):
            self.skip("it does not hear the long sound; test_hears[longest] says how")
        index = self.seconds.index(max(self.seconds))
        extra = int(long.lengths[0]) - int(self.plain(bench).lengths[index])
        more = self.longest_seconds - self.seconds[index]
        # Rounding at either end makes a frame each; a true rate is never further off.
        if abs(extra - more * expert.frame_rate) > 2:
            self.fail(
                f"{more:g} s more sound give {extra} more frames, {extra / more:.3f} per second;"
                f" the expert declares frame_rate {expert.frame_rate:g}",
                "set frame_rate to sample_rate divided by the encoder's hop, exactly",
            )

    def test_encoding_is_repeatable(self, bench: Bench) -> None:
        """The same batch gives the same bits: a target that moves teaches noise."""
        self.plain(bench)
        if bench.unrepeatable:
            self.fail(
                f"encoding the same batch again {bench.unrepeatable}",
                "call .eval() on its modules; draw no random numbers, and keep nothing from one call to the next",
            )

    def test_padding_changes_nothing(self, bench: Bench) -> None:
        """A sound in a zero-padded batch has the features it has alone, within `tolerance`."""
        together = self.repeatable(bench)
        if isinstance(bench.single, Failed):
            self.fail(
                f"encode works on a batch of sounds and raised {bench.single} for one sound alone",
                "let no operation drop the batch dimension, as squeeze() without an index does",
            )
        for i, alone in enumerate(bench.single):
            if (problem := misshapen(alone, 1)) or (problem := self.difference(together, i, alone, 0)):
                self.fail(
                    f"a sound of {self.seconds[i]:g} s in a batch padded to {max(self.seconds):g} s has other features"
                    f" than alone: {problem}",
                    "count frames from audio.lengths; normalise each sound over its own samples (coatkit.standardise);"
                    " zero padded frames before every layer that looks sideways, or encode sounds of like length"
                    " together (coatkit.encode_by_length)",
                )

    def test_order_changes_nothing(self, bench: Bench) -> None:
        """Sounds in another order have the same features."""
        together, expert = self.repeatable(bench), self.loaded(bench)
        remedy = "put results back in the order of the batch, and take nothing from a sound's neighbours"
        turned = bench.attempt(lambda: bench.encode(expert, *bench.arrays[::-1]))
        if isinstance(turned, Failed):
            self.fail(f"encode raised {turned} for sounds it encodes in another order", remedy)
        count = len(self.seconds)
        for i in range(count):
            if problem := misshapen(turned, count) or self.difference(turned, count - 1 - i, together, i):
                self.fail(f"a sound's features depend on its place in the batch: {problem}", remedy)

    def test_input_is_left_alone(self, bench: Bench) -> None:
        """The batch is shared: other experts at the same sample rate get it next."""
        expert = self.loaded(bench)
        self.repeatable(bench)
        audio = bench.batch(*bench.arrays[:2], rate=expert.sample_rate)
        heard = {} if audio.backbone is None else {"audio.backbone.consumed": audio.backbone.consumed}
        held = {"audio.samples": audio.samples, "audio.lengths": audio.lengths, **heard}
        before = {name: tensor.clone() for name, tensor in held.items()}
        bench.encode_batch(expert, audio)
        now = {"audio.samples": audio.samples, "audio.lengths": audio.lengths}
        for name, tensor in held.items():
            if not torch.equal(tensor, before[name]):
                self.fail(f"encode changed {name} in place", "work on a copy: no in-place operation on the batch")
            if now.get(name, tensor) is not tensor:
                self.fail(f"encode put another tensor in {name}", "keep it in a variable of its own")

    @pytest.mark.parametrize("kind", ["silence", "one_sample", "tenth_of_a_second", "longest"])
    def test_hears(self, bench: Bench, kind: str) -> None:
        """Odd sounds give finite features, or an error that says what cannot be heard."""
        expert = self.loaded(bench)
        self.plain(bench)
        what = f"a sound of {self.longest_seconds:g} s" if kind == "longest" else kind.replace("_", " ")
        if kind == "longest":
            self._must_hear(bench.long, what, frames=1)
            return
        sound = sounds.edge(kind, expert.sample_rate)
        features = bench.attempt(lambda: bench.encode(expert, sound))
        self._must_hear(features, what, frames=0 if kind == "one_sample" else 1)

    @pytest.mark.parametrize("kind", sounds.FILES)
    def test_hears_file(self, bench: Bench, kind: str) -> None:
        """Files as people have them, read and resampled as training does."""
        expert = self.loaded(bench)
        self.plain(bench)
        sound = sounds.from_file(kind, bench.folder, expert.sample_rate)
        features = bench.attempt(lambda: bench.encode(expert, sound))
        self._must_hear(features, f"0.4 s from a file ({kind.replace('_', ' ')})", frames=1)

    def _must_hear(self, features: Features | Failed, what: str, frames: int) -> None:
        remedy = "give finite features, or raise coatkit.CoatkitError with a message on what it cannot hear"
        if isinstance(features, Failed):
            if not isinstance(features.error, CoatkitError):
                self.fail(f"encode failed on {what} with a bare {features}", remedy)
            if not str(features.error).strip():
                self.fail(f"encode refused {what} with an empty {type(features.error).__name__}", remedy)
            return
        if problem := misshapen(features, 1):
            self.fail(f"on {what}, {problem}", remedy)
        if not features.values.isfinite().all():
            self.fail(f"encode gave NaN or infinite values for {what}", remedy)
        # One sample has no thinking position, so no frame is needed for it.
        if int(features.lengths[0]) < frames:
            self.fail(f"encode gave no frame for {what}", "pad short sounds with zeros up to one frame")

    def test_works_in_every_grad_mode(self, bench: Bench) -> None:
        """A first call under `inference_mode` must leave nothing behind that later calls cannot use."""
        held, lesson = self.loaded(bench), self.lesson(bench)
        self.alone(bench)
        self.second(bench)
        expert = bench.load()  # one that has never encoded
        remedy = "cache no tensor made inside encode, or make it in load: one made in inference mode stays behind"
        first: Features | None = None
        for mode in ("inference_mode", "no_grad", "enable_grad"):
            audio = bench.batch(bench.arrays[0], rate=expert.sample_rate)
            after = " after a first call under torch.inference_mode()" if first else ""
            try:
                with getattr(torch, mode)():
                    features = bench.call("encode", partial(expert.encode, audio))
            except Exception as error:
                self.fail(f"encode under torch.{mode}(){after} raised {Failed(error)}", remedy)
            first = first or features
            if problem := self.difference(features, 0, first, 0):
                self.fail(f"encode under torch.{mode}() differs{after}: {problem}", remedy)
        later = bench.attempt(lambda: bench.backward(expert, lesson))
        # A loss that never works has a check of its own.
        if isinstance(later, Failed) and not isinstance(bench.attempt(lambda: bench.backward(held, lesson)), Failed):
            self.fail(f"the loss raised {later} after a first encode under torch.inference_mode()", remedy)
