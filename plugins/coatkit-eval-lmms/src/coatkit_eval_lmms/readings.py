"""Right answer and options of a document, for each of upstream's benchmarks. Needs no lmms-eval.

Field names are those that upstream's own task code (lmms-eval 0.7.3) reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]
Read = tuple[list[str], list[str]]
"""Right answers, and options."""

VOCAL_SOUNDS = ("Laughter", "Sniff", "Throat clearing", "Cough", "Sigh", "Sneeze")
_LETTERED = re.compile(r"^\s*[(\[]?([A-Z])[)\].:]\s*")
_LETTER = re.compile(r"\s*[(\[]?([A-Za-z])[)\].:]?\s*")
_SPLIT = re.compile(r"(?:^|\s)\(([A-Z])\)\s*")


def _unlettered(options: Sequence[str]) -> list[str]:
    """Options without the letters in front of them, when these are A, B, C and so on; names have initials too."""
    letters = [found[1] if (found := _LETTERED.match(option)) else "" for option in options]
    if letters == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]):
        return [_LETTERED.sub("", option, count=1).strip() for option in options]
    return [option.strip() for option in options]


def _by_letter(letter: str, options: Sequence[str]) -> str:
    """The option of a letter; the text itself when it is no letter of one, which `cannot_score` refuses if it must."""
    found = _LETTER.fullmatch(letter)
    place = ord(found[1].upper()) - ord("A") if found else -1
    return options[place] if 0 <= place < len(options) else letter


def mmau(doc: Doc) -> Read:
    """MMAU: options as a JSON list, the answer as one of them."""
    return [doc["answer"]], _unlettered(json.loads(doc["choices"]))


def mmar(doc: Doc) -> Read:
    """MMAR: options with their letters, the answer as a letter."""
    options = _unlettered(doc["choices"])
    return [_by_letter(str(doc["answer"]), options)], options


def mmsu(doc: Doc) -> Read:
    """MMSU: four options in fields of their own, the answer as a letter."""
    options = [doc[f"choice_{letter}"] for letter in "abcd"]
    return [_by_letter(str(doc["answer"]), options)], options


def air_bench(doc: Doc) -> Read:
    """AIR-Bench Foundation: two to four options in fields of their own, the answer as one of them."""
    options = [str(text) for letter in "abcd" if (text := doc.get(f"choice_{letter}")) and str(text).strip()]
    return [doc["answer_gt"]], options


def muchomusic(doc: Doc) -> Read:
    """MuChoMusic: options as a list or one text, each after its letter as in `(A)`; the answer starts with its own."""
    given = doc["choices"]
    if isinstance(given, str):
        found = _SPLIT.split(given)
        options = [text.strip(" \n,") for text in found[2::2]]
    else:
        options = _unlettered(given)
    letter = re.match(r"\s*\(?([A-Z])\)", str(doc["answer"]))
    return [_by_letter(letter[1], options) if letter else str(doc["answer"])], options


def vocalsound(doc: Doc) -> Read:
    """VocalSound: six classes."""
    return [doc["answer"]], list(VOCAL_SOUNDS)


def answer(doc: Doc) -> Read:
    """ClothoAQA, WavCaps and Alpaca-Audio: the right answer in `answer`."""
    return [doc["answer"]], []


def gt(doc: Doc) -> Read:
    """LibriSpeech and GigaSpeech: the transcript in `gt`."""
    return [doc["gt"]], []


def sentence(doc: Doc) -> Read:
    """Common Voice: the transcript in `sentence`."""
    return [doc["sentence"]], []


def text(doc: Doc) -> Read:
    """SPGISpeech in the Open ASR collection: the transcript in `text`, or in the fields upstream falls back to."""
    return [next(doc[key] for key in ("text", "transcript", "gt") if doc.get(key) is not None)], []


def normalized_text(doc: Doc) -> Read:
    """VoxPopuli: the transcript in `normalized_text`, or in `raw_text` where that is empty."""
    return [str(doc["normalized_text"] or doc.get("raw_text") or "")], []


def written(doc: Doc) -> Read:
    """A row of coatkit, as `coatkit_eval_lmms.task.Rows` lays it out."""
    return list(doc["references"]), list(doc["choices"] or [])
