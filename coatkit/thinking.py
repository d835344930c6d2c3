"""The thinking block: [start, think x L, end], one thinking position per audio token (paper section 3.1).

A conversation becomes a list of pieces (text, blocks, answers); `lay_out` turns pieces into one row of token ids and
remembers where audio placeholders and thinking positions lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100
TOKENS = ("<|audio_think_start|>", "<|audio_think|>", "<|audio_think_end|>")


def answer_tokens(labels: Tensor | None) -> int:
    """Tokens of labels [B, T] that the cross-entropy is taken on: each is predicted from the one before it."""
    return 0 if labels is None else int((labels[:, 1:] != IGNORE).sum())


@dataclass(frozen=True)
class ThinkingTokens:
    """Ids of the three added tokens; contiguous, in this order."""

    start: int
    think: int
    end: int

    @property
    def ids(self) -> tuple[int, int, int]:
        return self.start, self.think, self.end


@dataclass(frozen=True)
class Text:
    """Token ids; `answer` marks those the cross-entropy is taken on."""

    ids: Sequence[int]
    answer: bool = False


@dataclass(frozen=True)
class Block:
    """A thinking block for these sounds of the row, in order."""

    audios: Sequence[int]


@dataclass
class Laid:
    """One row of tokens.

    Attributes:
        ids: Token ids.
        labels: Ids on the answers, -100 elsewhere.
        audio: (first position, count) of each sound's placeholders, in order.
        think: (first position, count) of each sound's thinking positions; (0, 0) where it has none.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    audio: list[tuple[int, int]] = field(default_factory=list)
    think: list[tuple[int, int]] = field(default_factory=list)


def thinking_length(audio_tokens: int, per_audio_token: float) -> int:
    """Thinking positions of a sound: its audio tokens times the ratio, rounded, at least 1."""
    return max(1, round(audio_tokens * per_audio_token))


def lay_out(
    pieces: Sequence[Text | Block],
    audio_token: int,
    audio_counts: Sequence[int],
    tokens: ThinkingTokens | None,
    per_audio_token: float,
) -> Laid:
    """Expand placeholders and blocks of one row.

    Args:
        pieces: The conversation; each sound is one `audio_token` in a text.
        audio_token: Id of the audio placeholder.
        audio_counts: Audio tokens of each sound, in order.
        tokens: The three ids; None when there is no block.
        per_audio_token: Thinking positions per audio token.

    Raises:
        ValueError: If the placeholders do not match the sounds, or a text holds a thinking token.
    """
    out = Laid(think=[(0, 0)] * len(audio_counts))
    for piece in pieces:
        if isinstance(piece, Text):
            for token in piece.ids:
                if tokens is not None and token in tokens.ids:
                    raise ValueError("the text holds one of the thinking tokens; remove it from the messages")
                count = 1
                if token == audio_token:
                    if len(out.audio) == len(audio_counts):
                        raise ValueError(f"more audio placeholders than the row's {len(audio_counts)} sounds")
                    count = audio_counts[len(out.audio)]
                    out.audio.append((len(out.ids), count))
                out.ids += [token] * count
                out.labels += [token if piece.answer else IGNORE] * count
        elif tokens is not None:
            out.ids.append(tokens.start)
            for audio in piece.audios:
                length = thinking_length(audio_counts[audio], per_audio_token)
                out.think[audio] = (len(out.ids), length)
                out.ids += [tokens.think] * length
            out.ids.append(tokens.end)
            out.labels += [IGNORE] * (len(out.ids) - len(out.labels))
    if len(out.audio) != len(audio_counts):
        raise ValueError(f"{len(out.audio)} audio placeholders for {len(audio_counts)} sounds")
    return out


def index_of(spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(first, count) spans to positions [A, max count], padded with 0, and counts [A]."""
    counts = torch.tensor([count for _, count in spans], dtype=torch.long)
    width = int(counts.max()) if len(spans) else 0
    first = torch.tensor([start for start, _ in spans], dtype=torch.long)
    index = first[:, None] + torch.arange(width)
    return torch.where(torch.arange(width) < counts[:, None], index, 0), counts


def gather(states: Tensor, row: Tensor, index: Tensor) -> Tensor:
    """States [B, T, d] at positions `index` [A, M] of rows `row` [A]: [A, M, d]."""
    return states[row[:, None], index]
