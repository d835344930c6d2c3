"""Text chain-of-thought: the baseline that thinks in words, asked for in the prompt alone.

The question is followed by an instruction to reason first; the answer is what stands after the last `Answer:`. Decoding
is greedy. The thinking block is the model's own business: it stays where it is unless it was taken out
(`without_block`). The stock model, as before training and without its block, is the baseline of the paper's tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from coatkit.data.rows import Row
from coatkit.errors import PluginError
from coatkit.infer import AudioThinker

INSTRUCTION = (
    "First describe what you hear and reason step by step. Then end with a last line that starts with 'Answer:' and"
    " holds only the answer."
)
THOUGHT_TOKENS = 256
"""Tokens for the thought unless said otherwise; the answer has its own."""
# Models like to set the word in bold.
_ANSWER = re.compile(r"(?:\*\*|__)?\banswer(?:\*\*|__)?\s*:(?:\*\*|__)?", re.IGNORECASE)


@dataclass(frozen=True)
class Reasoned:
    """What was said, taken apart.

    Attributes:
        answer: What stands after the last `Answer:`; all of the text where nothing does.
        thought: What stands before it.
        finished: Whether there was an answer.
    """

    answer: str
    thought: str = ""
    finished: bool = True


def read_answer(text: str) -> Reasoned:
    """Take thought and answer apart; a text without `Answer:`, or with nothing after it, counts as a whole."""
    *_, last = [None, *_ANSWER.finditer(text)]
    if last is None or not (answer := text[last.end() :].strip()):
        return Reasoned(text.strip(), finished=False)
    return Reasoned(answer, text[: last.start()].strip())


def asked_to_think(row: Row) -> Row:
    """The row with the instruction after the last thing the user says; a right answer behind it is left out."""
    messages = list(row.messages)
    if messages[-1].role == "assistant":
        messages.pop()
    at = max(i for i, message in enumerate(messages) if message.role == "user")
    messages[at] = replace(messages[at], content=f"{messages[at].content.rstrip()}\n{INSTRUCTION}")
    return replace(row, messages=tuple(messages))


def reason(
    model: AudioThinker,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 64,
    max_thought_tokens: int = THOUGHT_TOKENS,
    **options: Any,
) -> list[Reasoned]:
    """Answers to rows, each with the thought before it, decoded together and greedily.

    Args:
        max_new_tokens: Longest answer, as without a thought.
        max_thought_tokens: Tokens that the thought may take beyond that.
        options: Go to the model's `generate`.

    Raises:
        DataError: As `AudioThinker.answer`.
    """
    most = max_new_tokens + max_thought_tokens
    said = model.answer([asked_to_think(row) for row in rows], max_new_tokens=most, **options)
    return [read_answer(text) for text in said]


def without_block(model: AudioThinker) -> AudioThinker:
    """The same model, asked without its thinking block from now on; one that has none stays as it is.

    Raises:
        PluginError: If its preparer has no `thinking` to be taken out.
    """
    preparer: Any = model.backbone.preparer
    if not hasattr(preparer, "thinking"):
        raise PluginError(
            f"{type(preparer).__name__} has no `thinking`, so the block cannot be left out of its prompts"
        )
    preparer.thinking = None
    return model
