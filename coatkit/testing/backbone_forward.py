"""Checks on one pass of a backbone: what it hears, what it gives back, and what it refuses."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coatkit.errors import CoatkitError
from coatkit.protocols import BackboneAudio, Inputs, Output
from coatkit.testing.backbone_base import BackboneBase, odd
from coatkit.testing.backbone_bench import BackboneBench, a_row, calls, copy, outputs
from coatkit.testing.bench import Failed
from coatkit.thinking import IGNORE, gather

LENGTHS = (0.02, 0.05, 1.0, 3.337, 29.99, 30.0)
"""Seconds of the sounds that `test_hears` plays, `longest_seconds` apart: at the edges of frames and windows."""


class ForwardChecks(BackboneBase):
    """The audio features, the states, the loss, and independence of what else is in a batch."""

    def test_output_is_as_declared(self, bench: BackboneBench) -> None:
        """Shapes, counts and rates are those of inputs, `hidden_size` and `audio_dims`; targets carry no gradient."""
        backbone, inputs = self.loaded(bench), self.prepared(bench)
        remedy = "set hidden_size and audio_dims to what forward gives; see coatkit Output and BackboneAudio"
        for chosen, what in ((slice(0, 3), "plain rows"), (slice(1, 2), "text alone")):
            rows = bench.rows[chosen]
            given = inputs if what == "plain rows" else bench.prepare(backbone, rows)
            found = bench.attempt(lambda: bench.forward(backbone, given, grad=True))  # noqa: B023
            if isinstance(found, Failed):
                self.broken(f"a pass over {what}", found, "repair forward()")
            if problem := odd(found, given, backbone):
                self.fail(f"on {what}: {problem}", remedy)
            for name in ("ce_sum", "thinking"):
                value = getattr(found, name)
                if value is not None and not value.requires_grad:
                    self.fail(f"on {what}: {name} carries no gradient", "compute it from the pass, without detach")

    @pytest.mark.parametrize("seconds", [*LENGTHS, "longest"])
    def test_hears(self, bench: BackboneBench, seconds: float | str) -> None:
        """A sound gets as many placeholders and features as `audio_tokens` says, or a reason why it is not heard."""
        self.plain(bench)
        backbone = self.loaded(bench)
        length = self.longest_seconds if isinstance(seconds, str) else seconds
        preparer, row, sound = backbone.preparer, a_row("heard", "<audio>What?", "A tone."), bench.sound(length)
        count = preparer.audio_tokens(sound.size)
        reason = preparer.cannot_hear(length)
        if reason:
            self._may_refuse(bench, length, reason)
            return
        if abs(count - length * preparer.frame_rate) > 2:
            self.fail(
                f"audio_tokens gives {count} for {length:g} s, {count / length:.2f} per second;"
                f" the preparer's frame_rate is {preparer.frame_rate:g}",
                "count what the tower gives; where it cuts long sounds, set max_seconds, so that they are refused",
            )
        inputs = bench.attempt(lambda: bench.prepare(backbone, [row], [sound]))
        if isinstance(inputs, Failed):
            self.broken(f"preparing {length:g} s", inputs, "let cannot_hear say what cannot be heard, before that")
        if inputs.audio_lengths.tolist() != [count]:
            self.fail(
                f"{length:g} s has {inputs.audio_lengths.tolist()} placeholders, and audio_tokens says {count}",
                "use one function for both",
            )
        found = bench.attempt(lambda: bench.forward(backbone, inputs))
        if isinstance(found, Failed):
            self.broken(f"a pass over {length:g} s, {count} placeholders,", found, "make audio_tokens exact")
        if problem := odd(found, inputs, backbone):
            self.fail(f"on {length:g} s: {problem}", "make audio_tokens exact")

    def _may_refuse(self, bench: BackboneBench, length: float, reason: Any) -> None:
        """What is not heard must be too short or too long, and say so."""
        backbone = self.loaded(bench)
        if not isinstance(reason, str) or not reason.strip():
            self.fail(f"cannot_hear({length:g}) is {reason!r}", "give the reason in words, or an empty string")
        most = backbone.preparer.max_seconds
        if most is not None and length > most:
            return
        if length >= 1:
            self.fail(
                f"it does not hear {length:g} s ({reason}), and max_seconds is {most}",
                "hear every length from one token up to max_seconds",
            )
        row = a_row("short", "<audio>What?", "A tone.")
        found = bench.attempt(lambda: bench.prepare(backbone, [row], [bench.sound(length)]))
        if not isinstance(found, Failed) or not isinstance(found.error, CoatkitError) or "short" not in str(found):
            said = found if isinstance(found, Failed) else "let through"
            self.fail(
                f"{length:g} s cannot be heard ({reason}), and a row with it is not refused by name: {said}",
                "raise row.fail(...) in prepare where a sound gives no audio token",
            )

    def test_audio_tokens_are_exact(self, bench: BackboneBench) -> None:
        """Lengths half a mel frame apart, where an off-by-one shows: placeholders and features agree for each."""
        self.plain(bench)
        backbone = self.loaded(bench)
        rate = backbone.preparer.sample_rate
        sounds = [bench.sound(0.1 + i * 0.005, i)[: rate // 10 + i * rate // 200] for i in range(17)]
        rows = [a_row(f"sweep {i}", "<audio>What?", "A tone.") for i in range(len(sounds))]
        counts = [backbone.preparer.audio_tokens(sound.size) for sound in sounds]
        inputs = bench.prepare(backbone, rows, sounds)
        found = bench.attempt(lambda: bench.forward(backbone, inputs))
        if inputs.audio_lengths.tolist() != counts or isinstance(found, Failed) or odd(found, inputs, backbone):
            said = found if isinstance(found, Failed) else odd(found, inputs, backbone)
            wrong = [s.size for s, n, m in zip(sounds, counts, inputs.audio_lengths.tolist(), strict=True) if n != m]
            self.fail(
                f"for sounds of 0.1 s and more, half a mel frame apart, audio_tokens is not what placeholders and tower"
                f" say, at {wrong or 'some'} samples: {said or 'the placeholders differ'}",
                "count from samples as the front end and the tower's strides do, with the same rounding",
            )
        assert found.audio is not None
        for i, sound in enumerate(sounds):
            alone = bench.forward(backbone, bench.prepare(backbone, rows[i : i + 1], [sound]))
            assert alone.audio is not None
            self._same_audio(f"a sound of {sound.size} samples", found.audio, i, alone.audio, 0)

    def _same_audio(self, what: str, one: BackboneAudio, i: int, other: BackboneAudio, j: int) -> None:
        for name in ("consumed", "tower"):
            a, b = getattr(one, name), getattr(other, name)
            count = int(other.lengths[j])
            if b is not None and (problem := self.apart(a[i, :count], b[j, :count])):
                self.fail(
                    f"{what} has another audio.{name} beside other sounds than alone: {problem}",
                    "let no sound see another's padding, and put features back sound by sound, without padding",
                )

    def test_forward_is_repeatable(self, bench: BackboneBench) -> None:
        """The same inputs give the same bits, and so they do after a batch that was refused."""
        backbone, inputs, before = self.plain(bench)
        remedy = "keep nothing from one pass to the next; see that dropout is off in evaluation mode"
        if problem := unlike(bench.forward(backbone, inputs), before):
            self.fail(f"a second pass over the same inputs gives another {problem}", remedy)
        bench.attempt(lambda: bench.forward(backbone, _fewer(inputs)))
        again = bench.attempt(lambda: bench.forward(backbone, inputs))
        if isinstance(again, Failed) or (problem := unlike(again, before)):
            said = f"raises {again}" if isinstance(again, Failed) else f"gives another {problem}"
            self.fail(f"after a batch that does not fit, a pass over one that does {said}", remedy)

    def test_padding_changes_nothing(self, bench: BackboneBench) -> None:
        """A row in a padded batch has the loss, states and audio features it has alone, text-only rows too."""
        backbone, inputs, together = self.plain(bench)
        assert inputs.labels is not None
        assert together.thinking is not None
        assert together.audio is not None
        at = 0
        for i, row in enumerate(bench.rows):
            mine = bench.prepare(backbone, [row], bench.sounds[row.id])
            alone = bench.forward(backbone, mine)
            only = torch.where(torch.arange(len(bench.rows))[:, None] == i, inputs.labels, IGNORE)
            shared = bench.forward(backbone, copy(inputs, labels=only)).ce_sum
            what = "a row of text alone" if not row.audios else f"row {row.id!r}"
            if problem := self.apart(shared[None], alone.ce_sum[None]):
                self.fail(
                    f"{what} has the loss {float(alone.ce_sum):.6g} alone and {float(shared):.6g} in a padded batch"
                    f" with rows that have sounds: {problem}",
                    "mask padding in attention, and let nothing of a row reach another",
                )
            for j in range(len(row.audios)):
                assert alone.thinking is not None
                assert alone.audio is not None
                count = int(mine.think_lengths[j])
                if problem := self.apart(together.thinking[at + j, :count], alone.thinking[j, :count]):
                    self.fail(
                        f"{what} has other thinking states in a padded batch than alone: {problem}",
                        "mask padding in attention, and gather states at think_index of the row",
                    )
                self._same_audio(f"sound {j} of {what}", together.audio, at + j, alone.audio, j)
            at += len(row.audios)

    def test_sound_is_heard(self, bench: BackboneBench) -> None:
        """Another sound of the same length gives other features and another loss: nothing is lost on the way."""
        backbone, _, _ = self.plain(bench)
        row, remedy = bench.rows[0], "see that the features reach the placeholders"
        one, other = (
            bench.forward(backbone, bench.prepare(backbone, [row], [bench.sound(0.9, seed)])) for seed in (0, 7)
        )
        assert one.audio is not None
        assert other.audio is not None
        for name in ("consumed", "tower"):
            a, b = getattr(one.audio, name), getattr(other.audio, name)
            if a is not None and not self.apart(a, b):
                self.fail(f"audio.{name} is the same for another sound of the same length", remedy)
        if torch.equal(one.ce_sum, other.ce_sum):
            self.fail("the loss is the same for another sound of the same length", remedy)

    def test_consumed_is_what_the_decoder_sees(self, bench: BackboneBench) -> None:
        """`audio.consumed` is what stands at the placeholders when the language model starts, bit for bit."""
        backbone, _ = self.adapter(bench), self.plain(bench)
        inputs = self.prepared(bench)
        with calls(backbone.language_model, lambda _, kwargs: kwargs.get("inputs_embeds")) as seen:
            heard = bench.forward(backbone, inputs).audio
        assert heard is not None
        seen = [embeds for embeds in seen if embeds is not None]
        if not seen:
            self.fail("its language model gets no inputs_embeds", "set language_model_path to the decoder")
        wanted = gather(seen[0], inputs.audio_row, inputs.audio_index).float()
        for i, count in enumerate(inputs.audio_lengths.tolist()):
            if not torch.equal(heard.consumed[i, :count], wanted[i, :count]):
                self.fail(
                    f"audio.consumed of sound {i} is not what its placeholders hold when the language model starts",
                    "gather the decoder's inputs_embeds at audio_index",
                )

    def test_states_and_loss_are_the_decoders(self, bench: BackboneBench) -> None:
        """`thinking` holds the final states at `think_index`, and `ce_sum` is plain cross-entropy of the next token."""
        self.plain(bench)
        backbone, inputs = self.adapter(bench), self.prepared(bench)
        assert inputs.labels is not None
        with outputs(backbone.language_model) as seen:
            found = bench.forward(backbone, inputs)
        assert found.thinking is not None
        states = gather(seen[0], inputs.audio_row, inputs.think_index)[inputs.think_mask]
        if problem := self.apart(found.thinking[inputs.think_mask], states):
            self.fail(
                f"thinking is not what the language model's last layer gives at think_index: {problem}",
                "gather last_hidden_state, after the final norm, at think_index",
            )
        wanted = inputs.labels[:, 1:] != IGNORE
        logits = project(backbone, seen[0][:, :-1][wanted])
        expected = F.cross_entropy(logits.float(), inputs.labels[:, 1:][wanted], reduction="sum")
        if problem := self.apart(found.ce_sum[None], expected[None]):
            self.fail(
                f"ce_sum is {float(found.ce_sum):.6g}, where the cross-entropy of each answer token given all before it"
                f" is {float(expected):.6g}: {problem}",
                "predict label t from the state at t - 1, sum over labels that are not -100",
            )

    def test_tower_runs_once(self, bench: BackboneBench) -> None:
        """One pass of the tower serves the language model and the reconstruction target."""
        self.plain(bench)
        backbone, inputs = self.adapter(bench), self.prepared(bench)
        with calls(backbone.tower, lambda *_: 1) as seen:
            bench.forward(backbone, inputs)
        if len(seen) != 1:
            self.fail(
                f"one pass runs the audio tower {len(seen)} times",
                "set tower_path to the tower, and keep its output of the one pass (HFBackbone's hook does)",
            )

    @pytest.mark.parametrize("how", ["fewer", "more"])
    def test_mismatch_is_refused(self, bench: BackboneBench, how: str) -> None:
        """One placeholder too few, or too many, is an error: some models shift the features without a word."""
        self.plain(bench)
        backbone, preparer = self.adapter(bench), self.adapter(bench).preparer
        for act in ("forward", "generate"):
            inputs = bench.prepare(backbone, train=act == "forward")
            spoilt = _fewer(inputs) if how == "fewer" else _more(inputs, preparer.audio_token)
            found = bench.attempt(
                lambda: bench.forward(backbone, spoilt) if act == "forward" else bench.generate(backbone, spoilt, 2)  # noqa: B023
            )
            remedy = (
                "compare the count of placeholders in input_ids with the tower's frames, and raise coatkit.DataError or"
                " ValueError that gives both"
            )
            if not isinstance(found, Failed):
                self.fail(f"{act} takes a batch with one placeholder {how} than features without a word", remedy)
            if not isinstance(found.error, CoatkitError | ValueError) or not str(found.error).strip():
                self.fail(f"{act} meets one placeholder {how} than features with a bare {found}", remedy)

    def test_units_run_once(self, bench: BackboneBench) -> None:
        """Modules in `units` are called once in every pass, with sounds or without: sharding waits for each."""
        self.plain(bench)
        backbone = self.loaded(bench)
        for rows in (bench.rows, bench.rows[1:2]):
            inputs = bench.prepare(backbone, rows)
            for i, unit in enumerate(backbone.units()):
                with calls(unit, lambda *_: 1) as seen:
                    bench.forward(backbone, inputs)
                if len(seen) != 1:
                    what = "with sounds" if len(rows) > 1 else "of text alone"
                    self.fail(
                        f"units()[{i}], a {type(unit).__name__}, runs {len(seen)} times in a pass over rows {what}",
                        "give only modules that every pass calls once; the language model's layers, most often",
                    )


def project(backbone: Any, hidden: Tensor) -> Tensor:
    """Logits of states, without the adapter's hook on the output layer."""
    head = backbone.stock.get_output_embeddings()
    return F.linear(hidden.to(head.weight.dtype), head.weight, getattr(head, "bias", None))


def _fewer(inputs: Inputs) -> Inputs:
    """The first sound's last placeholder replaced by the token before its first."""
    found, row = copy(inputs), int(inputs.audio_row[0])
    last = int(inputs.audio_index[0, int(inputs.audio_lengths[0]) - 1])
    found.tokens["input_ids"][row, last] = found.tokens["input_ids"][row, int(inputs.audio_index[0, 0]) - 1]
    return found


def _more(inputs: Inputs, placeholder: int) -> Inputs:
    """One placeholder more, before the first sound."""
    found, row = copy(inputs), int(inputs.audio_row[0])
    found.tokens["input_ids"][row, int(inputs.audio_index[0, 0]) - 1] = placeholder
    return found


def unlike(one: Output, other: Output) -> str:
    """Name of the first tensor that differs in any bit; empty where there is none."""
    for name in ("ce_sum", "thinking", "audio.consumed", "audio.tower"):
        a, b = (attrgetter(name)(output) for output in (one, other))
        if (a is None) != (b is None) or (isinstance(a, Tensor) and not torch.equal(a, b)):
            return name
    return ""
