"""Reading answers: the option or the note an answer names, and failure where it names none or several."""

from __future__ import annotations

import random

import pytest

from coatkit.evaluation.choices import choose
from coatkit.evaluation.notes import Note, read_note

OPTIONS = ["dog", "cat", "electric piano", "piano"]
SEVERAL, NONE = "several", "none"

SAID: dict[str, list[tuple[str, int | str]]] = {
    "whole": [("B", 1), ("b", 1), ("(b)", 1), ("B.", 1), ("**B**", 1), ("dog", 0), (" Dog. ", 0), ('"cat"', 1)],
    "both": [("(B) cat", 1), ("B: cat", 1), ("C) electric piano", 2), ("(B) dog", SEVERAL)],
    "leading": [
        ("B. Because it meows", 1),
        ("(B) I hear it", 1),
        ("B. cat, since a dog would bark", 1),
        ("B. The dog", SEVERAL),
        ("(A) or (B)", SEVERAL),
    ],
    "stated": [
        ("The answer is B", 1),
        ("The answer is (B).", 1),
        ("The correct answer is (B) cat.", 1),
        ("answer: dog.", 0),
        ("The answer is a dog", 0),
        ("The answer is an electric piano.", 2),
        ("The answer is A dog", 0),
        ("The answer is B or C", SEVERAL),
        ("The answer is dog, or cat?", SEVERAL),
        ("The answer is B. No, the answer is C.", SEVERAL),
        ("The answer is B: the dog.", SEVERAL),
    ],
    "marked": [("I go with option C", 2), ("It must be (D) then", 3), ("Either (A), or (D)", SEVERAL)],
    "mentioned": [
        ("I hear a dog", 0),
        ("A dog barks, and the dog growls", 0),
        ("an electric piano", 2),
        ("an electric  PIANO!", 2),
        ("a piano", 3),
        ("a piano and an electric piano", SEVERAL),
        ("dog or cat", SEVERAL),
        ("It is not a dog but a cat", 1),
        ("It isn't the dog", NONE),
        ("Hotdog", NONE),
        ("pianos", NONE),
    ],
    "bare": [
        ("I think B", 1),
        ("I think it is C because", 2),
        ("A or B", SEVERAL),
        ("not B", NONE),
        ("A loud bang", NONE),
        ("I'd say so", NONE),
    ],
    "nothing": [("", NONE), ("E", NONE), ("assortment assortment", NONE), ("(E) horse", NONE), ("\n", NONE)],
}


@pytest.mark.parametrize(
    ("answer", "right"), [pytest.param(*case, id=f"{kind}: {case[0]}") for kind, cs in SAID.items() for case in cs]
)
def test_the_option_an_answer_names(answer: str, right: int | str) -> None:
    found = choose(answer, OPTIONS)
    assert (found.why if found.index is None else found.index) == right


def test_letters_are_left_out_where_an_option_is_a_letter() -> None:
    assert choose("C", ["D", "C", "A"]).index == 1
    assert choose("(B)", ["D", "C", "A"]).index is None


def test_letters_are_left_out_when_asked() -> None:
    assert choose("B", OPTIONS, letters=False).index is None
    assert choose("cat", OPTIONS, letters=False).index == 1


@pytest.mark.parametrize(
    "options", [["yes", "no"], ["c#4", "c4"], ["hip-hop", "hop"], ["U.S.", "Mr. (x)"], ["ja", "あ"]]
)
def test_an_option_names_itself(options: list[str]) -> None:
    for i, option in enumerate(options):
        assert choose(option, options).index == i
        assert choose(f"It sounds like {option}.", options).index == i
        assert choose(f"({'AB'[i]}) {option}", options).index == i


def test_noise_is_never_guessed_at() -> None:
    """Whatever is said: no error, an index in range, and for words that are no option nothing."""
    source = random.Random(0)
    for _ in range(2000):
        said = "".join(source.choice("abcABCdog cat().:,'\n not") for _ in range(source.randrange(30)))
        found = choose(said, OPTIONS)
        assert (found.index is None) == (found.why in (SEVERAL, NONE))
        assert found.index is None or 0 <= found.index < 4
        assert choose(said, OPTIONS) == found
    for _ in range(200):
        said = " ".join(source.choice(["hum", "xyz", "loud", "the", "sound"]) for _ in range(source.randrange(8)))
        assert choose(said, OPTIONS).index is None


NOTES = [
    ("C4", 60),
    ("c#4", 61),
    ("Db4", 61),
    ("D♭4", 61),
    ("C sharp 4", 61),
    ("C-sharp 4", 61),
    ("The note is A4.", 69),
    ("It is C5, that is C5", 72),
    ("G-1", 7),
    ("eb4", 63),
    ("61", 61),
    ("MIDI note 61.", 61),
    ("note 0", 0),
]
CLASSES = [("F#", 6), ("Bb", 10), ("B flat", 10), ("A flat", 8), ("It is an A.", 9), ("E major", 4), ("note: C", 0)]
UNREAD = ["", "A note", "a sound", "128", "C4 or D4", "F# or G", "C, E and G", "be", "Hello", "C5, an octave above C4"]


def test_notes() -> None:
    assert [read_note(text) for text, _ in NOTES] == [Note(midi % 12, midi) for _, midi in NOTES]
    assert [read_note(text) for text, _ in CLASSES] == [Note(step) for _, step in CLASSES]
    assert [text for text in UNREAD if read_note(text)] == []
