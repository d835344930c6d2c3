"""Rows to model inputs for any transformers audio language model with a chat template and audio placeholders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coatkit.data.rows import AUDIO_TAG, Row
from coatkit.errors import DataError, PluginError
from coatkit.protocols import AudioBatch, Inputs, Preparer
from coatkit.spec import ThinkingSpec
from coatkit.thinking import IGNORE, TOKENS, Block, Laid, Text, ThinkingTokens, index_of, lay_out


class HFPreparer(Preparer):
    """Chat template, tokenizer and audio front end of a transformers model.

    Args:
        tokenizer: With a chat template that takes text contents, and the three thinking tokens added.
        thinking: The block's settings, or None for no block.
        audio_token: The audio placeholder, e.g. `<sound>`.
        audio_markup: What stands for one sound in the prompt; holds `audio_token` once.

    Raises:
        PluginError: If the tokenizer lacks a needed token.
    """

    sample_rate = 16_000
    frame_rate = 25.0

    def __init__(
        self, tokenizer: Any, thinking: ThinkingSpec | None, audio_token: str, audio_markup: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.thinking_rate = self.frame_rate * (thinking.tokens_per_audio_token if thinking is not None else 1.0)
        self.audio_markup = audio_markup or audio_token
        known = tokenizer.get_vocab()
        for token in (audio_token, *TOKENS):
            if token not in known:
                raise PluginError(f"the tokenizer has no {token!r} token; add it before building the preparer")
        self.audio_token = int(known[audio_token])
        self.tokens = ThinkingTokens(*(int(known[t]) for t in TOKENS))
        if self.tokens.ids != tuple(range(self.tokens.start, self.tokens.start + 3)):
            raise PluginError(f"the thinking tokens' ids {self.tokens.ids} are not contiguous and in order")

    @abstractmethod
    def audio_features(self, audio: AudioBatch) -> tuple[dict[str, Tensor], list[int]]:
        """Front-end features by the model's argument names, and the number of audio tokens of each sound."""

    def content(self, text: str) -> Any:
        """A message as the chat template takes it, the model's markup in place of each `<audio>` tag.

        A preparer whose template writes the markup itself, e.g. numbered, gives the template's list of parts instead.
        """
        return text.replace(AUDIO_TAG, self.audio_markup)

    def prepare(self, rows: Sequence[Row], audio: AudioBatch | None, *, train: bool) -> Inputs:
        features, counts = self.audio_features(audio) if audio is not None else ({}, [])
        if sum(len(row.audios) for row in rows) != len(counts):
            raise DataError(f"{len(counts)} sounds for rows that name {sum(len(r.audios) for r in rows)}")
        laid: list[Laid] = []
        owner: list[int] = []
        for i, row in enumerate(rows):
            mine = counts[len(owner) : len(owner) + len(row.audios)]
            for sound in range(len(owner), len(owner) + len(row.audios)):
                assert audio is not None
                if reason := self.cannot_hear(float(audio.seconds[sound])):
                    raise row.fail(reason)
                if counts[sound] < 1:
                    raise row.fail("the front end gave a sound no audio token, though cannot_hear() had no objection")
            owner += [i] * len(row.audios)
            try:
                laid.append(self._lay_out(row, mine, train))
            except ValueError as error:
                raise row.fail(str(error)) from None
            if train and all(label == IGNORE for label in laid[-1].labels):
                raise row.fail("there is no answer to learn: an assistant message with text is needed")
            if self.max_tokens is not None and len(laid[-1].ids) > self.max_tokens:
                raise row.fail(
                    f"{len(laid[-1].ids)} tokens are more than the {self.max_tokens} this backbone reads;"
                    " use shorter or fewer sounds, or a smaller thinking.tokens_per_audio_token"
                )
        width = max(len(one.ids) for one in laid)
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id))
        labels = torch.full_like(ids, IGNORE)
        attention = torch.zeros_like(ids)
        shift = []
        for i, one in enumerate(laid):
            # Answers grow to the right of a prompt, so prompts of a batch must end together.
            at = 0 if train else width - len(one.ids)
            shift.append(at)
            ids[i, at : at + len(one.ids)] = torch.tensor(one.ids)
            labels[i, at : at + len(one.ids)] = torch.tensor(one.labels)
            attention[i, at : at + len(one.ids)] = 1
        audio_spans = [(a + shift[i], n) for i, one in enumerate(laid) for a, n in one.audio]
        think_spans = [(a + shift[i] if n else 0, n) for i, one in enumerate(laid) for a, n in one.think]
        audio_index, audio_lengths = index_of(audio_spans)
        think_index, think_lengths = index_of(think_spans)
        return Inputs(
            tokens={"input_ids": ids, "attention_mask": attention, **features},
            labels=labels if train else None,
            audio_row=torch.tensor(owner, dtype=torch.long),
            audio_index=audio_index,
            audio_lengths=audio_lengths,
            think_index=think_index,
            think_lengths=think_lengths,
            row_ids=[row.id for row in rows],
        )

    def _lay_out(self, row: Row, counts: Sequence[int], train: bool) -> Laid:
        tokens = self.tokens if self.thinking is not None else None
        ratio = self.thinking.tokens_per_audio_token if self.thinking is not None else 1.0
        return lay_out(self._pieces(row, train), self.audio_token, counts, tokens, ratio)

    def _pieces(self, row: Row, train: bool) -> list[Text | Block]:
        """Prompt, block and answer of every assistant turn; a block stands before the first answer after its sounds."""
        messages = [{"role": m.role, "content": self.content(m.content)} for m in row.messages]
        if not train and messages[-1]["role"] == "assistant":
            messages.pop()
        after_header = self.thinking is None or self.thinking.placement == "response_prefix"
        pieces: list[Text | Block] = []
        done, heard, spoken = "", 0, 0  # text so far; sounds placed so far; sounds a block has covered
        for i in range(len(messages) + 1):
            answering = i < len(messages) and messages[i]["role"] == "assistant"
            opening = i == len(messages) and messages[-1]["role"] != "assistant" and not train
            if i < len(messages) and not answering:
                heard += row.messages[i].content.count(AUDIO_TAG)
            if not (answering or opening):
                continue
            before = self._render(messages[:i])
            header = self._render(messages[:i], add_generation_prompt=True)
            block = [Block(range(spoken, heard))] if heard > spoken else []
            spoken = heard
            pieces.append(Text(self._ids(self._rest(before, done, row))))
            pieces += [] if after_header else block
            pieces.append(Text(self._ids(self._rest(header, before, row))))
            pieces += block if after_header else []
            if answering:
                done = self._render(messages[: i + 1])
                pieces += self._answer(self._rest(done, header, row), row, row.messages[i].learn)
        return pieces

    def _answer(self, text: str, row: Row, learn: bool) -> list[Text | Block]:
        """An answer is learnt, if at all, up to and with its end-of-turn token; the markup after that is not."""
        ids = self._ids(text)
        ends = [i for i, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
        if len(ends) > 1:
            raise row.fail(f"an answer holds {self.tokenizer.eos_token}, which ends it; remove it from the message")
        if ends == [0]:
            raise row.fail("an answer is empty; an assistant message with text is needed")
        cut = ends[0] + 1 if ends else len(ids)
        return [Text(ids[:cut], answer=learn), Text(ids[cut:])]

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options) if messages else ""
        return text

    def _rest(self, text: str, prefix: str, row: Row) -> str:
        if not text.startswith(prefix):
            raise row.fail("the chat template rewrites earlier turns, so answers cannot be told from prompts")
        return text[len(prefix) :]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
