"""Names of musical notes, read out of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

_STEPS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_SIGN = r"(?:\s?(?:#|♯|♭|b(?![a-z])|-?sharp\b|-?flat\b))"
_FULL = re.compile(rf"(?<![\w#])([A-Ga-g])({_SIGN})?\s?(-?\d)(?!\w|\.\d)")
_SIGNED = re.compile(rf"(?<![\w#])([A-G])({_SIGN})|(?<![\w#])([a-g])(\s?[#♯♭]|[ -](?:sharp|flat)\b)")
_BARE = re.compile(rf"(?<![\w#])([A-G])(?!{_SIGN}|[\w'’])")
_NUMBER = re.compile(r"\s*(?:midi(?:\s+(?:note|number|pitch))?|note(?:\s+number)?)?\s*:?\s*(\d{1,3})\s*\.?\s*", re.I)


@dataclass(frozen=True)
class Note:
    """A note.

    Attributes:
        step: Semitones above C, 0 to 11.
        midi: MIDI number, where the octave is known; C4 is 60.
    """

    step: int
    midi: int | None = None


def read_note(text: str) -> Note | None:
    """The one note a text names; None when it names none or several.

    A text that is a number from 0 to 127 is a MIDI number. Else notes with an octave (`C#4`, `Db4`, `c sharp 4`) come
    before notes without one (`F#`, `E flat`, capital letters alone); the word `A` is no note.
    """
    if number := _NUMBER.fullmatch(text):
        return Note(int(number[1]) % 12, int(number[1])) if int(number[1]) < 128 else None
    found = _full(text) or _signed(text) | _bare(text)
    return found.pop() if len(found) == 1 else None


def _full(text: str) -> set[Note]:
    found = set()
    for letter, sign, octave in _FULL.findall(text):
        midi = 12 * (int(octave) + 1) + _STEPS[letter.lower()] + _shift(sign)
        found.add(Note(midi % 12, midi))
    return found


def _signed(text: str) -> set[Note]:
    return {Note((_STEPS[(a or b).lower()] + _shift(s or t)) % 12) for a, s, b, t in _SIGNED.findall(text)}


def _bare(text: str) -> set[Note]:
    found = set()
    for match in _BARE.finditer(text):
        if match[1] == "A" and re.match(r"\s+(?!major\b|minor\b)\w", text[match.end() :]):
            continue
        found.add(Note(_STEPS[match[1].lower()]))
    return found


def _shift(sign: str) -> int:
    sign = sign.strip(" -")
    return 0 if not sign else 1 if sign in ("#", "♯", "sharp") else -1
