"""Metrics against values worked out by hand and against the libraries; intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jiwer
import numpy as np
import pytest
import sacrebleu
from scipy import stats
from sklearn.metrics import f1_score

from coatkit.evaluation import text
from coatkit.evaluation.bootstrap import interval, paired, resampled
from coatkit.evaluation.metrics import METRICS, Answer, bleu, cannot_score, choice, chrf, exact, f1, note, wer
from coatkit.evaluation.suite import METRICS as NAMES


def answers(*pairs: tuple[str, str], choices: Sequence[str] = ()) -> list[Answer]:
    return [Answer(said, (right,), tuple(choices)) for said, right in pairs]


# Values


def test_exact_match() -> None:
    found = exact([*answers(("Music.", "music"), ("a  Dog!", "A dog"), ("dogs", "dog")), Answer("b", ("a", "B."))])
    assert found.value == 75
    assert found.rows.tolist() == [100, 100, 0, 100]
    assert found.details["most_frequent_reference"] == 25


def test_choice_counts_what_cannot_be_read_as_wrong_and_apart() -> None:
    said = [("B", "music"), ("speech", "(A)"), ("noise", "music"), ("speech or noise", "noise"), ("hm", "B")]
    found = choice(answers(*said, choices=["speech", "music", "noise"]))
    assert found.value == pytest.approx(40)
    assert found.failures == 2
    assert found.read_as == ["music", "speech", "noise", None, None]
    assert {k: found.details[k] for k in ("right", "named_none", "named_several", "most_frequent_reference")} == {
        "right": 2,
        "named_none": 1,
        "named_several": 1,
        "most_frequent_reference": 60.0,  # music three times, by letter or text
    }


def test_weighted_f1_by_hand_and_by_scikit_learn() -> None:
    right = ["joy", "joy", "joy", "anger", "anger", "fear"]
    said = ["Joy.", "anger", "it is joy", "anger", "none of them", "joy"]
    # joy: 2 right of 3 named and 3 wanted: 2/3; anger: 1 of 2 and 2: 1/2; fear: 0. Weights 3, 2, 1.
    for choices in ((), ("joy", "anger", "fear", "calm")):
        found = f1(answers(*zip(said, right, strict=True), choices=choices))
        assert found.value == pytest.approx(100 * (3 * 2 / 3 + 2 * 1 / 2) / 6)
        assert found.failures == 1
        read = [one or "" for one in found.read_as]
        library = f1_score(right, read, labels=["joy", "anger", "fear"], average="weighted", zero_division=0)
        assert found.value == pytest.approx(100 * library)
        assert found.details["classes"]["joy"]["precision"] == pytest.approx(200 / 3)
        assert found.details["classes"]["anger"]["rows"] == 2
    always = f1(answers(*(("joy", one) for one in right)))
    assert found.details["most_frequent_reference"] == pytest.approx(always.value)


def test_weighted_f1_of_random_answers_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels = np.array(["a1", "b1", "c1", "d1"])
    right, said = labels[random.integers(0, 4, 200)].tolist(), labels[random.integers(0, 4, 200)].tolist()
    found = f1(answers(*zip(said, right, strict=True)))
    assert found.value == pytest.approx(100 * f1_score(right, said, average="weighted"))


def test_note_accuracy() -> None:
    said = ["C#4", "61", "C#5", "A sharp", "hm"]
    found = note(answers(*((one, "Db4") for one in said)))
    assert found.value == 40
    assert found.details["pitch_class"] == 60
    assert found.failures == 1
    assert note(answers(("C#5", "Db"), ("C", "Db"))).value == 50  # no octave asked for


def test_word_error_rate_by_hand_and_by_jiwer() -> None:
    said = ["the cat sat", "a dog", "", "well hello there"]
    right = ["The cat sat down.", "The dog!", "It rains", "Hello there"]
    found = wer(answers(*zip(said, right, strict=True)))
    # one deletion of 4; one substitution of 2; two deletions of 2; one insertion on 2
    assert found.value == pytest.approx(100 * (1 + 1 + 2 + 1) / (4 + 2 + 2 + 2))
    normalize = text.whisper_normalizer("en")
    assert found.value == pytest.approx(100 * jiwer.wer([normalize(r) for r in right], [normalize(s) for s in said]))
    assert found.rows.tolist() == pytest.approx([25, 50, 100, 50])
    assert {k: found.details[k] for k in ("substitutions", "deletions", "insertions", "words")} == {
        "substitutions": 1,
        "deletions": 3,
        "insertions": 1,
        "words": 10,
    }


def test_word_error_rate_follows_whisper_and_leaves_out_gigaspeechs_tags_and_empty_references() -> None:
    tagged = "HELLO <COMMA> MISTER SMITH <PERIOD>"
    found = wer(answers(("Hello, Mr. Smith", tagged), ("noise", "<NOISE>"), ("anything", "<SIL> ."), ("it's", "it is")))
    assert found.value == 0
    assert found.kept.tolist() == [True, False, False, True]
    assert math.isnan(found.rows[1])
    assert text.without_tags("a <QUESTIONMARK> <b> <music>").split() == ["a", "<b>"]
    assert wer(answers(("Straße", "straße")), "de").value == 0
    assert wer(answers(("colour", "color")), "en").value == 0
    assert wer(answers(("colour", "color")), "de").value == 100


def test_without_a_row_that_counts_there_is_no_score() -> None:
    found = wer(answers(("a", "<SIL>")))
    assert math.isnan(found.value)
    assert all(math.isnan(end) for end in interval(found))
    assert paired(found, found).rows == 0


def test_captions_against_sacrebleu() -> None:
    said = ["a dog barks loudly in the park", "rain falls on a roof", ""]
    right = [("a dog is barking in the park", "a dog barks in a park"), ("rain falls on the roof",), ("wind",)]
    rows = [Answer(one, refs) for one, refs in zip(said, right, strict=True)]
    found = bleu(rows)
    several = [[refs[0] for refs in right], [refs[1] if len(refs) > 1 else None for refs in right]]
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(said, several).score)
    assert 10 < found.value < 60
    mean = np.mean([sacrebleu.sentence_chrf(one, list(refs)).score for one, refs in zip(said, right, strict=True)])
    assert chrf(rows).value == pytest.approx(mean)
    same = [Answer("a dog barks in the park", ("a dog barks in the park",))]
    assert bleu(same).value == pytest.approx(100)
    assert chrf(same).value == pytest.approx(100)


def test_every_metric_is_named_and_takes_no_rows() -> None:
    assert set(METRICS) == set(NAMES)
    for metric in METRICS.values():
        assert math.isnan(metric((), "en").value)


@pytest.mark.parametrize(
    ("metric", "answer", "reason"),
    [
        ("choice", Answer("", ("a",)), "needs options"),
        ("choice", Answer("", ("horse",), ("dog", "cat")), "'horse' is none of its choices: dog, cat"),
        ("f1", Answer("", ("horse",), ("dog", "cat")), "none of its choices"),
        ("note", Answer("", ("loud",)), "names no note"),
        ("wer", Answer("", ("a", "b")), "takes one right answer, the row has 2"),
        ("exact", Answer("", ("?!",)), "no letter or digit"),
    ],
)
def test_rows_no_answer_could_score_on(metric: str, answer: Answer, reason: str) -> None:
    assert reason in cannot_score(metric, answer)


@pytest.mark.parametrize(
    ("metric", "answer"),
    [
        ("choice", Answer("", ("B",), ("dog", "cat"))),
        ("choice", Answer("", ("U.S.",), ("U.S.", "UK"))),
        ("exact", Answer("", ("a", "b"))),
        ("wer", Answer("", ("",))),  # left out by the metric, and counted
        ("bleu", Answer("", ("a", "b"))),
    ],
)
def test_rows_that_can_be_scored(metric: str, answer: Answer) -> None:
    assert cannot_score(metric, answer) == ""


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(Exception, match=r"needs jiwer .*pip install 'coatkit\[analysis\]'"):
        wer(())


# Intervals and comparisons


def some(right: Sequence[bool]) -> list[Answer]:
    return answers(*(("yes" if one else "no", "yes") for one in right))


def test_an_interval_covers_what_the_binomial_says() -> None:
    low, high = interval(exact(some([i % 10 < 7 for i in range(200)])))
    # the normal approximation's half width for 70 % of 200 rows
    half = 100 * 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert low == pytest.approx(70 - half, abs=1)
    assert high == pytest.approx(70 + half, abs=1)
    assert interval(exact(some([True] * 9))) == (100, 100)


def test_draws_are_the_same_every_time_and_keep_the_number_of_rows() -> None:
    counts = exact(some([True, False, True])).counts
    draws = resampled(counts, 500, seed=3)
    assert (draws[:, 1] == 3).all()
    assert np.array_equal(draws, resampled(counts, 500, seed=3))
    assert not np.array_equal(draws, resampled(counts, 500, seed=4))
    assert draws[:, 0].mean() == pytest.approx(2, abs=0.15)


def test_intervals_of_every_metric_hold_the_score() -> None:
    random = np.random.default_rng(1)
    words = ["dog", "cat", "cow"]
    pairs = [(words[random.integers(3)], words[random.integers(3)]) for _ in range(60)]
    for name, metric in METRICS.items():
        if name == "note":
            pairs = [(f"C{random.integers(2)}", f"C{random.integers(2)}") for _ in range(60)]
        given = answers(*pairs, choices=words if name in ("choice", "likelihood", "f1") else ())
        if name == "judge":
            given = [replace(one, rating=int(random.integers(6))) for one in given]
        scored = metric(given, "en")
        low, high = interval(scored, 500)
        assert low <= scored.value <= high
        if name != "bleu":  # one word has no four-gram: 0
            assert 1 < high - low < 60, name


def test_the_paired_difference_is_surer_than_two_intervals() -> None:
    """The same 40 of 80 rows are right in both, and eight more in the second."""
    first, second = [i < 40 for i in range(80)], [i < 48 for i in range(80)]
    found = paired(exact(some(first)), exact(some(second)))
    assert (found.first, found.second, found.difference) == pytest.approx((50, 60, 10))
    assert 3 < found.low < 6
    assert 15 < found.high < 19
    assert found.p < 0.01
    assert (found.first_only, found.second_only) == (0, 8)
    assert found.p_mcnemar == pytest.approx(stats.binomtest(0, 8).pvalue) == pytest.approx(2 / 2**8)
    back = paired(exact(some(second)), exact(some(first)))
    assert back.difference == -10
    assert back.p_mcnemar == found.p_mcnemar


def test_runs_that_say_the_same_do_not_differ() -> None:
    scored = exact(some([i % 3 == 0 for i in range(30)]))
    found = paired(scored, scored)
    assert (found.difference, found.low, found.high, found.p, found.p_mcnemar) == (0, 0, 0, 1, 1)


def test_p_values_of_runs_that_differ_by_chance_are_spread_evenly() -> None:
    random = np.random.default_rng(5)
    values = [
        paired(exact(some(random.random(60) < 0.5)), exact(some(random.random(60) < 0.5)), 400).p for _ in range(120)
    ]
    assert 0.0 <= np.mean(np.array(values) < 0.1) < 0.2
    assert 0.3 < np.mean(values) < 0.7


def test_other_rows_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="not of the same rows"):
        paired(exact(some([True])), exact(some([True, False])))
