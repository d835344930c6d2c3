"""What a judge is told, and how its rating is read. The text is in rubric.txt: the paper's scale in our own words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

HIGHEST = 5
"""Ratings are whole numbers from 0 to this."""

_PLACE = re.compile(r"\{(question|reference|answer)\}")
_SAID = re.compile(r"\brating[*_`]*\s*:", re.IGNORECASE)
_WHOLE = re.compile(r"[\s*_`]*\(?([0-5])\)?[*_`.]*[ \t\r]*(?:\n|$)")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@cache
def rubric() -> str:
    """The text with its places for `{question}`, `{reference}` and `{answer}`."""
    return files("coatkit.evaluation").joinpath("rubric.txt").read_text(encoding="utf-8")


def rubric_digest() -> str:
    """SHA-256 of the text, hex."""
    return hashlib.sha256(rubric().encode()).hexdigest()


def prompt(question: str, references: Sequence[str], answer: str) -> str:
    """What a judge is asked about one answer. All three are put in as they are, braces and all."""
    right = references[0] if len(references) == 1 else "\n".join(f"{i}. {one}" for i, one in enumerate(references, 1))
    said = {"question": question.strip(), "reference": right.strip(), "answer": answer.strip()}
    return _PLACE.sub(lambda place: said[place[1]], rubric())


def read_rating(reply: str) -> int | str:
    """The rating in a judge's reply, or why there is none.

    The reply must say `Rating:` exactly once, and nothing but a whole number from 0 to 5 may follow on that line (or,
    after an empty rest, on the next), but for emphasis, brackets or a full stop. So `Rating: 4.5`, `Rating: 4/5`,
    `Rating: 10` and `Rating: 7` are no ratings. A thought in `<think>` before the reply is not looked at.
    """
    text = _THOUGHT.sub("", reply)
    if not text.strip():
        return "an empty reply"
    found = list(_SAID.finditer(text))
    if len(found) != 1:
        return "no rating in the reply" if not found else f"{len(found)} ratings in one reply"
    number = _WHOLE.match(text, found[0].end())
    if number is None:
        given = text[found[0].end() :].strip().partition("\n")[0].strip(" \t\r*_`")
        return f"the rating {given!r:.40} is no whole number from 0 to {HIGHEST}"
    return int(number[1])
