"""Which option an answer names: the same rules for every answer, no guess where they find none or several."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKED = re.compile(r"\(([A-Z])\)|\[([A-Z])\]|(?<![\w(])([A-Z])(?:\)|[.:](?=\s|$))|\b[Oo]ption ([A-Z])\b")
_LEADING = re.compile(r"\s*[\[(]?([A-Za-z])(?:[\])][.:]?|[.:])(?:\s|$)")
_ANOTHER = re.compile(r"\s*,?\s*(?:(?i:or|and)\b|[/,])\s*[(\[]?([A-Z])\b(?!['’])")
_AND = re.compile(r"\s*(?:,?\s*(?:or|and)\b|/)")
_STATED = re.compile(r"\b(?:answer|choice)(?:\s+is|\s*:)\s*(?:option\s+|the\s+|an?\s+)?", re.IGNORECASE)
_BARE = re.compile(r"\b([A-Z])\b(?!['’])")
_NOT = re.compile(r"(?:\bnot|n['’]t)(?:\s+(?:a|an|the))?\s+$", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """What an answer was read as.

    Attributes:
        index: The option; None when the answer names none or several.
        why: `none` or `several` when there is no index.
    """

    index: int | None
    why: str = ""


def choose(answer: str, options: Sequence[str], *, letters: bool = True) -> Choice:
    """The one option an answer names. Deterministic: an answer that names none or several is a failure, never a guess.

    The rules are tried in order, and the first that finds an option decides; if it finds several, that is a failure.

    1. The whole answer is an option's letter or text, or both: `B`, `(b)`, `B.`, `dog`, `(B) dog`.
    2. It starts with a letter that is set off: `B. Because ...`, `(B) I hear ...`.
    3. It says which: `the answer is B`, `answer: dog`.
    4. Letters set off anywhere: `(B)`, `B)`, `option B`.
    5. Options' texts as whole words; one inside another's text does not count (`piano` in `electric piano`).
    6. Capital letters alone, but for the words `A` and `I`.

    Where a letter and the text that goes with it name different options, it names several. In rules 4 to 6, what
    follows `not` does not count. Letters are left out when an option's text is itself a letter. Case, punctuation and
    white space do not matter, but letters in rules 3, 4 and 6 are capitals.

    Args:
        options: Texts, in the order of their letters A, B, C, ...
        letters: Whether options may be named by letter.
    """
    texts = tuple(_plain(option) for option in options)
    known = _LETTERS[: len(options)] if letters and not any(len(t) == 1 and t.isalpha() for t in texts) else ""
    rules: tuple[Callable[[], set[int]], ...] = (
        lambda: _whole(answer, texts, known),
        lambda: _checked(_leading(answer, known), answer, texts),
        lambda: _stated(answer, texts, known),
        lambda: _checked(_marked(answer, known), answer, texts),
        lambda: _mentioned(answer, texts),
        lambda: _bare(answer, known),
    )
    for rule in rules:
        if found := rule() - {-1}:
            return Choice(found.pop()) if len(found) == 1 else Choice(None, "several")
    return Choice(None, "none")


def _plain(text: str) -> str:
    """Lower case, white space made one, no punctuation around it; inside, as in `c#4` or `hip-hop`, it stays."""
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'`*“”‘’")


def _whole(answer: str, texts: Sequence[str], known: str) -> set[int]:
    said = _plain(answer)
    found = {i for i, text in enumerate(texts) if said == text}
    bare = said.strip("()[]")
    if not found and len(bare) == 1:
        found = {known.find(bare.upper())} - {-1}
    start = _LEADING.match(answer)
    if not found and start and (rest := _plain(answer[start.end() :])) in texts:
        found = {known.find(start[1].upper()), texts.index(rest)} if known else {texts.index(rest)}
    return found


def _leading(answer: str, known: str) -> set[int]:
    start = _LEADING.match(answer)
    if start is None or _ANOTHER.match(answer[start.end() :]):  # `(A) or (B)` is left to the rule on marked letters
        return set()
    return {known.find(start[1].upper())}


def _stated(answer: str, texts: Sequence[str], known: str) -> set[int]:
    found: set[int] = set()
    for match in _STATED.finditer(answer):
        rest = answer[match.end() :]
        said = " ".join(rest.casefold().split()).lstrip(" \"'`*“‘([")
        named = [i for i, text in enumerate(texts) if re.match(re.escape(text) + r"(?!\w)", said)]
        if named:
            longest = max(named, key=lambda i: len(texts[i]))
            found.add(longest)
            after = said[len(texts[longest]) :]
            found |= _mentioned(after, texts) if _AND.match(after) else set()
        elif letter := re.match(r"[\s\"'`*“‘(\[]*([A-Z])\b(?!['’])", rest):
            # `the answer is A dog` names no letter
            article = letter[1] in "AI" and re.match(r"\s+[a-z]", rest[letter.end() :])
            another = _ANOTHER.match(rest[letter.end() :].lstrip(")]"))
            also = {known.find(another[1])} if another else set()
            found |= set() if article else _checked({known.find(letter[1])}, rest[letter.end() :], texts) | also
    return found


def _marked(answer: str, known: str) -> set[int]:
    found = (match for match in _MARKED.finditer(answer) if not _NOT.search(answer[: match.start()]))
    return {known.find(next(group for group in match.groups() if group)) for match in found}


def _mentioned(answer: str, texts: Sequence[str]) -> set[int]:
    said = " ".join(answer.casefold().split())
    found, taken = set(), [False] * len(said)
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):  # longer first: they hide what is inside them
        for match in _words(texts[i]).finditer(said):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = [True] * (match.end() - match.start())
                if not _NOT.search(said[: match.start()]):
                    found.add(i)
    return found


def _bare(answer: str, known: str) -> set[int]:
    found = set()
    for match in _BARE.finditer(answer):
        word = match[1] in "AI" and re.match(r"\s+(?!or\b|and\b)\w", answer[match.end() :])
        if not word and not _NOT.search(answer[: match.start()]):
            found.add(known.find(match[1]))
    return found


def _checked(found: Iterable[int], answer: str, texts: Sequence[str]) -> set[int]:
    """Options named by letter, and those named in words when they are others alone."""
    lettered = set(found) - {-1}
    named = _mentioned(answer, texts) if lettered else set()
    return lettered if lettered & named or not named else lettered | named


@lru_cache(maxsize=4096)
def _words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
