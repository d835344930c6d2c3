"""The thinking block in a prompt of token ids. No vLLM here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT = 1
"""Of coatkit.json, as `coatkit export` writes it."""


@dataclass(frozen=True)
class Block:
    """What coatkit.json says of the thinking block.

    Attributes:
        start, think, end: Ids of its tokens.
        per_audio_token: Thinking positions per audio token.
        never: Ids that are never generated: the block's, and the placeholder of a sound.
    """

    start: int
    think: int
    end: int
    per_audio_token: float
    never: tuple[int, ...]

    @classmethod
    def read(cls, facts: Mapping[str, Any], ids: Mapping[str, int]) -> Block | None:
        """The block of a model folder; None where its run had none.

        Args:
            facts: coatkit.json.
            ids: Of the tokenizer's tokens.

        Raises:
            ValueError: If another format wrote it, or the tokenizer lacks a token.
        """
        if facts.get("format") != FORMAT:
            raise ValueError(f"coatkit.json: format {facts.get('format')}, but this plugin reads format {FORMAT}")
        thinking = facts["thinking"]
        if thinking is None:
            return None
        names = [thinking[part] for part in ("start", "think", "end")]
        if absent := [name for name in names if name not in ids]:
            raise ValueError(f"the tokenizer has no {', '.join(absent)}; export the run again")
        start, think, end = (ids[name] for name in names)
        never = (start, think, end, ids[facts["audio"]["token"]])
        return cls(start, think, end, float(thinking["tokens_per_audio_token"]), never)

    def length(self, audio_tokens: int) -> int:
        """Thinking positions of a sound, as in training."""
        return max(1, round(audio_tokens * self.per_audio_token))


@dataclass(frozen=True)
class Sound:
    """A sound's place in a prompt: `tokens` audio tokens in the `length` ids from `start` on."""

    start: int
    length: int
    tokens: int


def expand(ids: Sequence[int], sounds: Sequence[Sound], block: Block) -> tuple[list[int], list[int]]:
    """Write each block with a thinking position for every audio token of the sounds since the block before it.

    A block comes in with one thinking token (as the exported chat template writes it), or with all of them already
    (where the client gave `audio_think_len`), and goes out the same either way.

    Args:
        ids: A prompt whose sounds have been expanded.
        sounds: In any order.

    Returns:
        The prompt, and where each of `sounds` now starts.

    Raises:
        ValueError: If a sound has no block, a block no sound, or a length is wrong; the server answers it with a 4xx.
    """
    order = sorted(range(len(sounds)), key=lambda i: sounds[i].start)
    out: list[int] = []
    starts = [0] * len(sounds)
    waiting, at, i = 0, 0, 0
    while i < len(ids):
        while at < len(order) and sounds[order[at]].start == i:
            sound = sounds[order[at]]
            starts[order[at]] = len(out)
            out += ids[i : i + sound.length]
            i += sound.length
            waiting += block.length(sound.tokens)
            at += 1
        if i >= len(ids):
            break
        if ids[i] != block.start:
            out.append(ids[i])
            i += 1
            continue
        end = i + 1
        while end < len(ids) and ids[end] == block.think:
            end += 1
        given = end - i - 1
        if end >= len(ids) or ids[end] != block.end or not given:
            raise ValueError("the prompt has a thinking block without its end; use the model's own chat template")
        if not waiting:
            raise ValueError("the prompt has a thinking block that no sound stands before")
        if given not in (1, waiting):
            raise ValueError(f"audio_think_len is {given}, and the sounds before the block have {waiting} positions")
        out += [block.start, *[block.think] * waiting, block.end]
        waiting, i = 0, end + 1
    if waiting:
        raise ValueError(
            "the prompt has a sound and no thinking block after it; this model was trained with one, so use its own"
            " chat template (with add_generation_prompt), or write the block's three tokens where the template does"
        )
    return out, starts
