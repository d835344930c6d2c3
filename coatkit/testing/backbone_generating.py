"""Checks on how a backbone answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from coatkit.backbones.hf import HFBackbone
from coatkit.data.audio import Samples
from coatkit.data.rows import Row
from coatkit.protocols import Inputs
from coatkit.testing.backbone_base import BackboneBase
from coatkit.testing.backbone_bench import BackboneBench, a_row, calls, copy, loss, outputs
from coatkit.testing.backbone_forward import project, unlike
from coatkit.testing.bench import Failed
from coatkit.thinking import IGNORE

_COUNT = 8
"""New tokens of an answer."""


class GeneratingChecks(BackboneBase):
    """Answers, beside one pass over prompt and answer with nothing cached."""

    def prompt(self, bench: BackboneBench, rows: list[Row], sounds: list[Samples] | None = None) -> Inputs:
        """Inputs to answer."""
        backbone, _, _ = self.plain(bench)
        found = bench.attempt(lambda: bench.prepare(backbone, rows, sounds, train=False))
        if isinstance(found, Failed):
            self.skip("prompts cannot be prepared; test_positions_are_named says why")
        return found

    def answer(
        self, bench: BackboneBench, backbone: HFBackbone, inputs: Inputs, count: int, **options: Any
    ) -> tuple[list[str], list[Tensor]]:
        """Answers, and the ids that the embedding sees in each step: the prompt, then every token but the last."""
        embedding = backbone.stock.get_input_embeddings()
        with calls(embedding, lambda args, kwargs: (args[0] if args else kwargs["input"]).clone()) as seen:
            found = bench.attempt(lambda: bench.generate(backbone, inputs, count, **options))
        if isinstance(found, Failed):
            self.broken("generate", found, "pass prompt and options on to the stock model's generate")
        if wrong(found, len(inputs.row_ids)):
            self.skip("generate gives no list of texts; test_generates_text says what it gives")
        return found, seen

    def test_generates_text(self, bench: BackboneBench) -> None:
        """One string for each row, from sounds and from text alone."""
        backbone, _, _ = self.plain(bench)
        for rows in (bench.rows, bench.rows[1:2]):
            inputs = self.prompt(bench, rows)
            found = bench.attempt(lambda: bench.generate(backbone, inputs, 3))  # noqa: B023
            if isinstance(found, Failed):
                self.broken(f"answering {len(rows)} row(s)", found, "repair generate()")
            if problem := wrong(found, len(rows)):
                self.fail(problem, "give a list with one string a row")

    @pytest.mark.parametrize("which", ["one", "text", "two"])
    def test_answer_is_greedy_decoding(self, bench: BackboneBench, which: str) -> None:
        """Every token is the most likely one, given sounds, prompt, block and the answer so far, computed anew."""
        self.plain(bench)
        row = next(row for row in bench.rows if row.id == which)
        self._greedy(bench, [row], "")

    def test_left_padded_answers_are_greedy_too(self, bench: BackboneBench) -> None:
        """Prompts of different lengths, with and without sounds, are answered together as each would be alone."""
        self.plain(bench)
        self._greedy(bench, [*bench.rows, a_row("short", "Why?", "Because.")], " in a left-padded batch")

    def _greedy(self, bench: BackboneBench, rows: list[Row], where: str) -> None:
        backbone = self.adapter(bench)
        sounds = {**bench.sounds, "short": []}
        inputs = self.prompt(bench, rows, [sound for row in rows for sound in sounds[row.id]])
        texts, seen = self.answer(bench, backbone, inputs, _COUNT, min_new_tokens=_COUNT)
        if len(seen) != _COUNT:
            self.fail(
                f"{_COUNT} new tokens, asked for with max_new_tokens and min_new_tokens, take {len(seen)} steps",
                "pass prompt and options on to the stock model's generate",
            )
        answers = torch.cat([ids[:, -1:] for ids in seen[1:]], 1)
        for row, text, ids in zip(rows, texts, answers, strict=True):
            if problem := self._unlikely(bench, backbone, row, sounds[row.id], ids):
                self.fail(
                    f"row {row.id!r} is not answered with the most likely tokens{where}: {problem}",
                    "let generate see the whole prompt with its block, sounds and attention mask, and decode greedily:"
                    " a generation config of the weights' own (sampling, repetition_penalty) must not count",
                )
            begins = backbone.preparer.tokenizer.decode(ids, skip_special_tokens=True).strip().rstrip("\ufffd")
            if not text.startswith(begins):
                self.fail(
                    f"the answer to row {row.id!r}{where} is {text!r}; its tokens say {begins!r}",
                    "decode the new tokens only, in the order of the rows",
                )

    def _unlikely(
        self, bench: BackboneBench, backbone: HFBackbone, row: Row, sounds: list[Samples], ids: Tensor
    ) -> str:
        """The first token that is not the most likely one in one pass over prompt and answer; empty for none."""
        prompt = self.prompt(bench, [row], sounds)
        tokens = {**prompt.tokens, "input_ids": torch.cat([prompt.tokens["input_ids"], ids[None]], 1)}
        tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
        labels = torch.full_like(tokens["input_ids"], IGNORE)
        with outputs(backbone.language_model) as seen:
            bench.forward(backbone, copy(prompt, tokens=tokens, labels=labels))
        logits = project(backbone, seen[0][0, -len(ids) - 1 : -1]).float()
        # A backbone may rule out special tokens, and rows beyond the tokenizer's have no text.
        plain = torch.ones(logits.shape[-1], dtype=torch.bool)
        plain[len(backbone.preparer.tokenizer) :] = False
        plain[list(backbone.preparer.tokenizer.added_tokens_decoder)] = False
        best = logits.masked_fill(~plain, -torch.inf).max(-1)
        gap = best.values - logits.gather(-1, ids[:, None])[:, 0]
        off = (gap > 1e-3 * float(logits.std())).nonzero().flatten().tolist()
        if not off:
            return ""
        decode = backbone.preparer.tokenizer.decode
        return f"token {off[0] + 1} is {decode([ids[off[0]]])!r}, and {decode([best.indices[off[0]]])!r} is more likely"

    def test_prompt_and_block_are_one_prefill(self, bench: BackboneBench) -> None:
        """Prompt and block go through the decoder at once, then one token at a time; the tower runs once."""
        backbone, inputs = self.adapter(bench), self.prompt(bench, bench.rows)
        with (
            calls(backbone.language_model, lambda _, kwargs: kwargs["inputs_embeds"].shape[1]) as steps,
            calls(backbone.tower, lambda *_: 1) as towers,
        ):
            self.answer(bench, backbone, inputs, 4, min_new_tokens=4)
        wanted = [inputs.tokens["input_ids"].shape[1], 1, 1, 1]
        remedy = "give the whole prompt to the stock model's generate, with its cache"
        if steps != wanted:
            self.fail(f"an answer of 4 tokens runs the decoder over {steps} positions; expected {wanted}", remedy)
        if len(towers) != 1:
            self.fail(f"one answer runs the audio tower {len(towers)} times", remedy)

    def test_block_and_placeholder_are_never_answered(self, bench: BackboneBench) -> None:
        """Were they the most likely tokens, the block's three and the placeholder would still not be answered."""
        backbone, inputs = self.adapter(bench), self.prompt(bench, bench.rows)
        never = torch.tensor([*backbone.preparer.tokens.ids, backbone.preparer.audio_token])
        with _likely(backbone, never):
            _, seen = self.answer(bench, backbone, inputs, 5, min_new_tokens=5)
        answered = torch.cat([ids[:, -1:] for ids in seen[1:]], 1)
        found = answered[torch.isin(answered, never)]
        if len(seen) < 2 or len(found):
            shown = backbone.preparer.tokenizer.decode(found[:1])
            self.fail(
                f"{shown or 'nothing'} is answered where it is most likely",
                "pass suppress_tokens with the block's tokens and the placeholder to the stock model's generate",
            )

    def test_answer_ends_with_its_turn(self, bench: BackboneBench) -> None:
        """Where the end of the turn is most likely, the answer is empty and nothing more is computed."""
        backbone, inputs = self.adapter(bench), self.prompt(bench, bench.rows[:1])
        end = int(backbone.preparer.tokenizer.eos_token_id)
        with _likely(backbone, torch.tensor([end])):
            texts, seen = self.answer(bench, backbone, inputs, 5)
        if texts != [""] or len(seen) != 1:
            shown = backbone.preparer.tokenizer.decode([end])
            self.fail(
                f"after {shown}, which ends a turn, {len(seen) - 1} more steps are made; the answer is {texts[0]!r}",
                "set the generation config's eos_token_id to the tokenizer's, and leave special tokens out of the text",
            )

    def test_answering_leaves_training_alone(self, bench: BackboneBench) -> None:
        """An answer between a pass and its gradient, or between two passes, changes nothing."""
        backbone, inputs, before = self.plain(bench)
        asked = self.prompt(bench, bench.rows)
        remedy = "keep nothing on self from one call to the next, and put every switch back in a finally"
        backbone.model.eval()
        modes = {name: module.training for name, module in backbone.model.named_modules()}
        learn = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
        if learn:
            first = bench.gradients(backbone, inputs)
            output = bench.forward(backbone, inputs, grad=True)
            bench.generate(backbone, asked, 2)
            loss(output, inputs).backward()  # type: ignore[no-untyped-call]
            for name, p in backbone.model.named_parameters():
                expected = first[name]
                if p.grad is not None and expected is not None and not torch.equal(p.grad, expected):
                    self.fail(f"an answer between pass and backward changes the gradient of {name}", remedy)
            backbone.model.zero_grad(set_to_none=True)
        bench.generate(backbone, asked, 2)
        again = bench.attempt(lambda: bench.forward(backbone, inputs))
        if isinstance(again, Failed):
            self.broken("after an answer, the same pass", again, remedy)
        if problem := unlike(again, before):
            self.fail(f"after an answer, the same pass gives another {problem}", remedy)
        for name, module in backbone.model.named_modules():
            if module.training != modes[name]:
                self.fail(f"after an answer {name or 'the network'} is in another mode", remedy)
        if learn != {name for name, p in backbone.model.named_parameters() if p.requires_grad}:
            self.fail("after an answer other parameters ask for gradient", remedy)


def wrong(answers: Any, count: int) -> str:
    """What keeps answers from being texts, one for each row; empty where nothing does."""
    right = isinstance(answers, list) and [type(text) for text in answers] == [str] * count
    return "" if right else f"generate gave {answers!r:.80} for {count} row(s)"


@contextmanager
def _likely(backbone: HFBackbone, tokens: Tensor) -> Iterator[None]:
    """Make tokens by far the most likely ones."""

    def push(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.index_add(-1, tokens, output.new_full((*output.shape[:-1], len(tokens)), 1e4))

    handle = backbone.stock.get_output_embeddings().register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()
