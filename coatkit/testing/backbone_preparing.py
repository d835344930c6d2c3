"""Checks on how a backbone turns rows and sounds into inputs."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from coatkit.backbones.preparer import HFPreparer
from coatkit.data.rows import Row
from coatkit.errors import CoatkitError
from coatkit.protocols import AudioBatch, Backbone, Inputs
from coatkit.spec import ThinkingSpec
from coatkit.testing.backbone_base import BackboneBase
from coatkit.testing.backbone_bench import BackboneBench, a_row
from coatkit.testing.bench import Failed
from coatkit.thinking import IGNORE, TOKENS

SETTINGS: dict[str, ThinkingSpec | None] = {
    "response_prefix": ThinkingSpec(),
    "before_header": ThinkingSpec(placement="before_header"),
    "off": None,
}
"""The block after the assistant header, before it, and none."""
_REMEDY = "derive the preparer from coatkit.HFPreparer and leave prepare() to it"


class PreparingChecks(BackboneBase):
    """Tokens, placeholders, the block, labels and padding."""

    def preparer(self, bench: BackboneBench) -> HFPreparer:
        """The preparer, where its tokenizer is known; the check is left out where it is not."""
        preparer = self.adapter(bench).preparer
        if not isinstance(preparer, HFPreparer):
            self.skip("its preparer is no coatkit.HFPreparer, so its tokens are not known")
        return preparer

    def setting(self, bench: BackboneBench, name: str) -> tuple[Backbone, Inputs]:
        """A backbone with one of `SETTINGS`, and the shared rows as it prepares them."""
        self.prepared(bench)
        backbone = self.working(bench.variant(SETTINGS[name]), f"it with thinking: {name}")
        inputs = bench.attempt(lambda: bench.prepare(backbone))
        if isinstance(inputs, Failed):
            self.broken(f"preparing plain rows with thinking: {name}", inputs, _REMEDY)
        return backbone, inputs

    def test_prepares(self, bench: BackboneBench) -> None:
        """Rows with one sound, with none, and of two turns become `Inputs` of the shapes the protocol gives."""
        self.loaded(bench)
        if isinstance(bench.inputs, Failed):
            self.broken("preparing plain rows", bench.inputs, "repair the preparer")
        if problem := _misshapen(bench.inputs, bench.rows):
            self.fail(problem, _REMEDY)

    def test_input_is_left_alone(self, bench: BackboneBench) -> None:
        """The sounds are shared: experts at the same sample rate get them next."""
        self.prepared(bench)
        backbone, row = self.loaded(bench), bench.rows[0]
        audio = AudioBatch.from_arrays(bench.sounds[row.id], bench.sample_rate)
        before = {"samples": audio.samples.clone(), "lengths": audio.lengths.clone()}
        first = bench.call("prepare", lambda: backbone.preparer.prepare([row], audio, train=True))
        for name, tensor in before.items():
            if not torch.equal(getattr(audio, name), tensor):
                self.fail(f"prepare changed audio.{name}", "work on a copy, and put nothing in the batch")
        again = bench.prepare(backbone, [row])
        for name, tensor in first.tokens.items():
            if not torch.equal(tensor, again.tokens[name]):
                self.fail(
                    f"preparing the same row again gives another {name}",
                    "draw no random numbers, and keep nothing from one call to the next",
                )

    def test_travels_to_data_workers(self, bench: BackboneBench) -> None:
        """Worker processes get the preparer by pickle and prepare the same inputs."""
        backbone, inputs = self.loaded(bench), self.prepared(bench)
        remedy = "hold nothing in the preparer that cannot be pickled: no open file, no lambda, no hook"
        sent = bench.attempt(lambda: pickle.loads(pickle.dumps(backbone.preparer)))
        if isinstance(sent, Failed):
            self.broken("pickling its preparer", sent, remedy)
        holder: Any = type("Holder", (), {"preparer": sent})
        there = bench.attempt(lambda: bench.prepare(holder))
        if isinstance(there, Failed) or any(not torch.equal(v, there.tokens[k]) for k, v in inputs.tokens.items()):
            said = there if isinstance(there, Failed) else "other inputs"
            self.fail(f"its preparer, sent to another process, gives {said}", remedy)

    def test_positions_are_named(self, bench: BackboneBench) -> None:
        """`audio_index` names all placeholders and `think_index` all thinking tokens, and nothing else."""
        self.prepared(bench)
        preparer = self.preparer(bench)
        for train in (True, False):
            inputs = bench.attempt(lambda: bench.prepare(self.loaded(bench), train=train))  # noqa: B023
            if isinstance(inputs, Failed):
                self.broken(f"preparing plain rows with train={train}", inputs, _REMEDY)
            ids = inputs.tokens["input_ids"]
            for what, token in (("audio", preparer.audio_token), ("think", preparer.tokens.think)):
                named = torch.zeros_like(ids, dtype=torch.bool)
                index, lengths = getattr(inputs, f"{what}_index"), getattr(inputs, f"{what}_lengths")
                for row, at, count in zip(inputs.audio_row, index, lengths, strict=True):
                    named[row, at[:count]] = True
                if not torch.equal(named, ids == token):
                    self.fail(
                        f"{what}_index names other positions than those that hold {preparer.tokenizer.decode([token])}"
                        f" (train={train})",
                        "count positions after padding, and expand every placeholder to its sound's audio tokens",
                    )

    @pytest.mark.parametrize("placement", ["response_prefix", "before_header"])
    def test_block_stands_in_its_place(self, bench: BackboneBench, placement: str) -> None:
        """[start, think x L, end] after the assistant header, or before it, and before the first answer to a sound."""
        preparer, row = self.preparer(bench), bench.rows[0]
        backbone, _ = self.setting(bench, placement)
        plain, _ = self.setting(bench, "off")
        sounds, turn = bench.sounds[row.id], [{"role": "user", "content": "Why?"}]
        told, asked = (
            preparer.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=opened)
            for opened in (False, True)
        )
        header = len(preparer.tokenizer(asked[len(told) :], add_special_tokens=False)["input_ids"])
        prompt = bench.prepare(plain, [row], sounds, train=False).tokens["input_ids"][0].tolist()
        inputs = bench.prepare(backbone, [row], sounds, train=False)
        start, think, end = preparer.tokens.ids
        block = [start] + [think] * int(inputs.think_lengths[0]) + [end]
        at = len(prompt) - (header if placement == "before_header" else 0)
        found = inputs.tokens["input_ids"][0].tolist()
        if found != prompt[:at] + block + prompt[at:]:
            shown = preparer.tokenizer.decode(found)
            self.fail(
                f"with placement {placement} the prompt is not the plain prompt with {TOKENS[0]}, {TOKENS[1]} and"
                f" {TOKENS[2]} {'before' if placement == 'before_header' else 'after'} the assistant header,"
                f" but {shown!r}",
                _REMEDY,
            )

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_prompt_begins_the_training_row(self, bench: BackboneBench, setting: str) -> None:
        """What is asked is exactly what was trained on, up to where the answer begins."""
        backbone, _ = self.setting(bench, setting)
        for row in bench.rows:
            sounds = bench.sounds[row.id]
            whole, prompt = (bench.prepare(backbone, [row], sounds, train=train) for train in (True, False))
            if prompt.labels is not None:
                self.fail("inputs to answer have labels", "label nothing where train is False")
            asked, learnt = prompt.tokens["input_ids"][0], whole.tokens["input_ids"][0]
            assert whole.labels is not None
            same = torch.equal(asked, learnt[: len(asked)]) and torch.equal(prompt.think_index, whole.think_index)
            if not same or int(whole.labels[0, len(asked) : len(asked) + 1].max()) == IGNORE:
                self.fail(
                    f"the prompt of row {row.id!r} is not the beginning of its training row (thinking: {setting})",
                    "let prompts end where the last answer begins, with the same block and the same header",
                )

    def test_thinking_off_leaves_the_block_out(self, bench: BackboneBench) -> None:
        """`thinking: off` is plain fine-tuning: the same row without the block, and no token row that learns."""
        preparer = self.preparer(bench)
        backbone, off = self.setting(bench, "off")
        ours = torch.tensor(preparer.tokens.ids)
        for row in bench.rows:
            kept, plain = (bench.prepare(b, [row]).tokens["input_ids"][0] for b in (self.loaded(bench), backbone))
            if not torch.equal(kept[~torch.isin(kept, ours)], plain):
                self.fail(f"row {row.id!r} with thinking: off is not the same row without its block", _REMEDY)
        if bool(off.think_lengths.any()):
            self.fail("with thinking: off some sounds have thinking positions", _REMEDY)
        if "tokens" in backbone.parts():
            self.fail("with thinking: off token rows learn", "let them learn only where `thinking` is not None")

    @pytest.mark.parametrize("ratio", [0.5, 2.0])
    def test_block_length_follows_the_spec(self, bench: BackboneBench, ratio: float) -> None:
        """`tokens_per_audio_token` sets how many positions a sound has, and `thinking_rate` says it."""
        usual = self.plain(bench).inputs
        thinking = ThinkingSpec(tokens_per_audio_token=ratio)
        backbone = self.working(bench.variant(thinking), f"it with tokens_per_audio_token {ratio:g}")
        inputs = bench.prepare(backbone)
        wanted = [max(1, round(count * ratio)) for count in usual.audio_lengths.tolist()]
        if inputs.think_lengths.tolist() != wanted:
            self.fail(
                f"with tokens_per_audio_token {ratio:g} sounds of {usual.audio_lengths.tolist()} audio tokens have"
                f" {inputs.think_lengths.tolist()} thinking positions; expected {wanted}",
                _REMEDY,
            )
        rate = backbone.preparer.frame_rate * ratio
        if abs(backbone.preparer.thinking_rate - rate) > 1e-6 * rate:
            self.fail(
                f"thinking_rate is {backbone.preparer.thinking_rate:g} Hz with tokens_per_audio_token {ratio:g};"
                f" expected {rate:g}, or experts' features are put on the wrong positions",
                "set thinking_rate to frame_rate x tokens_per_audio_token",
            )
        states = bench.forward(backbone, inputs).thinking
        if states is None or tuple(states.shape[:2]) != tuple(inputs.think_index.shape):
            shape = None if states is None else tuple(states.shape)
            self.fail(f"with tokens_per_audio_token {ratio:g} thinking is {shape}", "gather states at think_index")

    def test_labels_are_on_answers_only(self, bench: BackboneBench) -> None:
        """Every answer is learnt up to and with the token that ends its turn; nothing else is."""
        preparer = self.preparer(bench)
        _, inputs = self.setting(bench, "response_prefix")
        ends = _ends(self.adapter(bench))
        ids, labels = inputs.tokens["input_ids"], inputs.labels
        assert labels is not None
        remedy = "label the answers and their end-of-turn token, and nothing of prompt, block, header or padding"
        if not torch.equal(labels[labels != IGNORE], ids[labels != IGNORE]):
            self.fail("labels are not the tokens they stand at", remedy)
        for row, label in zip(bench.rows, labels, strict=True):
            found = label[label != IGNORE].tolist()
            wanted: list[list[int]] = [
                preparer.tokenizer(turn.content, add_special_tokens=False)["input_ids"]
                for turn in row.messages
                if turn.role == "assistant"
            ]
            if [token for token in found if token not in ends] != [token for answer in wanted for token in answer]:
                self.fail(f"row {row.id!r} learns {preparer.tokenizer.decode(found)!r}", remedy)
            if sum(token in ends for token in found) != len(wanted) or found[-1] not in ends:
                self.fail(
                    f"row {row.id!r} learns {preparer.tokenizer.decode(found)!r}, where every answer must end in one of"
                    f" the tokens that end generating ({preparer.tokenizer.decode(sorted(ends))})",
                    "set the tokenizer's eos_token to the chat template's end of turn, and the generation config's too",
                )

    def test_padding_sides(self, bench: BackboneBench) -> None:
        """Training pads on the right; answering on the left, so that answers grow side by side."""
        self.prepared(bench)
        backbone = self.loaded(bench)
        for train in (True, False):
            inputs = bench.prepare(backbone, train=train)
            mask = inputs.tokens["attention_mask"].long()
            steps = mask[:, 1:] - mask[:, :-1]
            wrong = steps > 0 if train else steps < 0
            if bool(wrong.any()) or not bool(mask[:, 0 if train else -1].all()):
                side = "right" if train else "left"
                self.fail(f"rows are not padded on the {side} where train is {train}", f"pad on the {side} there")
            if bool(mask.all()):
                self.fail("rows of different lengths have no padding", "set attention_mask to 0 at padding")

    def test_several_sounds(self, bench: BackboneBench) -> None:
        """A row may hold several sounds, in one turn or in several, each with positions of its own; or is refused."""
        self.prepared(bench)
        backbone, row = self.loaded(bench), a_row("several", "<audio> or <audio>?", "The first.", "And <audio>?", "No.")
        sounds = [bench.sound(seconds, seed) for seed, seconds in enumerate(self.seconds)]
        found = bench.attempt(lambda: bench.prepare(backbone, [row], sounds))
        if not self.several_sounds:
            if not isinstance(found, Failed):
                self.fail("a row with several sounds is let through", "raise row.fail(...) for it in prepare()")
            self._must_name(found, row, "a row with several sounds")
            return
        if isinstance(found, Failed):
            self.broken("a row with three sounds", found, "set several_sounds = False if it takes one sound a row")
        counts = [backbone.preparer.audio_tokens(sound.size) for sound in sounds]
        if found.audio_lengths.tolist() != counts or found.audio_row.tolist() != [0, 0, 0]:
            self.fail(f"three sounds of {counts} audio tokens got {found.audio_lengths.tolist()}", _REMEDY)
        spans = [index[:count] for index, count in zip(found.think_index, found.think_lengths, strict=True)]
        order = torch.cat([*(found.audio_index[i][: counts[i]] for i in (0, 1)), *spans[:2]])
        order = torch.cat([order, found.audio_index[2][: counts[2]], spans[2]])
        if bool((order[1:] <= order[:-1]).any()):
            self.fail(
                "in a row with two sounds in its first turn and one in its second, sounds and their thinking positions"
                " are not in order: two sounds, their block, the third, its block",
                _REMEDY,
            )

    def test_foreign_tokens_are_refused(self, bench: BackboneBench) -> None:
        """A message that holds the text of a placeholder or of a thinking token is refused, naming the row."""
        self.prepared(bench)
        preparer, backbone = self.preparer(bench), self.loaded(bench)
        for token in (*TOKENS, preparer.tokenizer.decode([preparer.audio_token])):
            row = a_row("odd", f"What is {token}?", "A token.")
            found = bench.attempt(lambda: bench.prepare(backbone, [row], []))  # noqa: B023
            if not isinstance(found, Failed):
                self.fail(f"a message that holds {token} is let through", "count placeholders after tokenising")
            self._must_name(found, row, f"a message that holds {token}")

    def test_long_rows_are_refused(self, bench: BackboneBench) -> None:
        """A row of more than `max_tokens` tokens is refused, naming the row; it would be cut, or break the model."""
        self.prepared(bench)
        backbone = self.loaded(bench)
        if (most := backbone.preparer.max_tokens) is None:
            self.skip("its preparer sets no max_tokens")
        row = a_row("endless", "no " * most, "Yes.")
        found = bench.attempt(lambda: bench.prepare(backbone, [row], []))
        if not isinstance(found, Failed):
            self.fail(f"a row of more than max_tokens ({most}) tokens is let through", _REMEDY)
        self._must_name(found, row, f"a row of more than {most} tokens")

    def _must_name(self, found: Failed, row: Row, what: str) -> None:
        remedy = "raise row.fail(...), which names the row, with a word on what to do"
        if not isinstance(found.error, CoatkitError):
            self.fail(f"{what} ends in a bare {found}", remedy)
        if row.id not in str(found.error):
            self.fail(f"{what} is refused without naming the row: {found.error}", remedy)


def _ends(backbone: Any) -> set[int]:
    """Tokens at which generating ends."""
    config = getattr(backbone.stock, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = set(ends) if isinstance(ends, list | tuple) else {ends}
    return {int(token) for token in found | {backbone.preparer.tokenizer.eos_token_id} if token is not None}


def _misshapen(inputs: Any, rows: list[Row]) -> str:
    """What is wrong with inputs to learn from; empty where nothing is."""
    if not isinstance(inputs, Inputs):
        return f"prepare gave a {type(inputs).__name__}, not coatkit Inputs"
    ids, sounds = inputs.tokens.get("input_ids"), sum(len(row.audios) for row in rows)
    if ids is None or ids.ndim != 2 or ids.shape[0] != len(rows):
        return f"tokens['input_ids'] should be [{len(rows)}, T]"
    mask = inputs.tokens.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        return f"tokens['attention_mask'] should be {tuple(ids.shape)}, like input_ids"
    if inputs.labels is None or inputs.labels.shape != ids.shape:
        return f"labels should be {tuple(ids.shape)}, like input_ids"
    owner = [i for i, row in enumerate(rows) for _ in row.audios]
    if inputs.audio_row.tolist() != owner:
        return f"audio_row is {inputs.audio_row.tolist()}; the sounds belong to rows {owner}"
    for name in ("audio", "think"):
        index, lengths = getattr(inputs, f"{name}_index"), getattr(inputs, f"{name}_lengths")
        most = int(lengths.max()) if len(lengths) else 0
        if tuple(lengths.shape) != (sounds,) or tuple(index.shape) != (sounds, most) or not bool((lengths > 0).all()):
            return f"{name}_lengths are {lengths.tolist()} and {name}_index {tuple(index.shape)} for {sounds} sounds"
    if inputs.row_ids != [row.id for row in rows]:
        return f"row_ids are {inputs.row_ids}"
    return _dtype(inputs.tokens["input_ids"])


def _dtype(ids: Tensor) -> str:
    return "" if ids.dtype == torch.long else f"input_ids are {ids.dtype}; expected int64"
