"""Metrics: from answers and references to counts for each row, and from sums of counts to a score in percent.

Every score is a function of sums over rows, so that a bootstrap draws rows, sums, and scores again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coatkit.evaluation.choices import choose
from coatkit.evaluation.notes import read_note
from coatkit.evaluation.rubric import HIGHEST
from coatkit.evaluation.suite import WITH_CHOICES
from coatkit.evaluation.text import library, plain, whisper_normalizer

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What was said to a row, and what would have been right.

    Attributes:
        said: The model's answer.
        references: The right answer; for captions there may be several.
        choices: Options of the row; empty where it has none.
        rating: What a judge gave it, 0 to 5; None where none did.
    """

    said: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    rating: int | None = None


@dataclass
class Scored:
    """The scores of rows.

    Attributes:
        counts: [R, k] of each row; rows that do not count are all 0.
        score: From sums of counts [..., k] to a score in percent [...].
        kept: [R] whether a row counts.
        rows: [R] score of each row in percent; NaN where it has none.
        read_as: [R] what each answer was read as; None where it could not be read.
        parse: Whether answers have to be read, so that reading can fail.
        right_or_wrong: Whether a row is 0 or 100.
        details: Other numbers, by name.
    """

    counts: Array
    score: Callable[[Array], Array]
    kept: NDArray[np.bool_]
    rows: Array
    read_as: list[str | None]
    parse: bool = False
    right_or_wrong: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The score in percent; NaN without a row that counts."""
        return float(self.score(self.counts.sum(0))) if self.kept.any() else float("nan")

    @property
    def failures(self) -> int:
        """Answers of rows that count which could not be read."""
        return sum(read is None and bool(kept) for read, kept in zip(self.read_as, self.kept, strict=True))


Metric = Callable[[Sequence[Answer], str], Scored]
"""From answers and the task's language to scores."""


def ratio(sums: Array) -> Array:
    """First count over second, in percent."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(100 * sums[..., 0] / sums[..., 1])


def _judged(right: Sequence[bool], read_as: list[str | None], commonest: float, *, parse: bool, **more: Any) -> Scored:
    hits = np.array(right, np.float64)
    counts = np.stack([hits, np.ones(len(hits))], 1)
    details = {"right": int(hits.sum()), "most_frequent_reference": commonest, **more}
    return Scored(counts, ratio, np.ones(len(hits), bool), 100 * hits, read_as, parse, True, details)


def _commonest(references: Sequence[str]) -> float:
    """The score in percent of always giving the most frequent reference: what can be had without listening."""
    return 100 * Counter(references).most_common(1)[0][1] / len(references) if references else float("nan")


def exact(answers: Sequence[Answer], language: str = "") -> Scored:
    """Exact match: share of answers that equal a reference, case, ASCII punctuation and white space apart."""
    right = [plain(a.said) in [plain(r) for r in a.references] for a in answers]
    commonest = _commonest([plain(a.references[0]) for a in answers])
    return _judged(right, [plain(a.said) for a in answers], commonest, parse=False)


def choice(answers: Sequence[Answer], language: str = "") -> Scored:
    """Multiple-choice accuracy: share of answers that name the right option and no other, by `choices.choose`.

    An answer that names none or several is a parse failure: it counts as wrong and is counted apart.
    """
    found = [choose(a.said, a.choices) for a in answers]
    wanted = [option_of(a.references[0], a.choices) for a in answers]
    return _judged(
        [one.index is not None and one.index == right for one, right in zip(found, wanted, strict=True)],
        [None if one.index is None else a.choices[one.index] for one, a in zip(found, answers, strict=True)],
        _commonest([plain(a.choices[right or 0]) for right, a in zip(wanted, answers, strict=True)]),
        parse=True,
        named_none=sum(one.why == "none" for one in found),
        named_several=sum(one.why == "several" for one in found),
    )


def likelihood(answers: Sequence[Answer], language: str = "") -> Scored:
    """Accuracy of the likeliest options (`likelihood.likeliest`): what is said is one of them, word for word."""
    place = [{option: i for i, option in enumerate(a.choices)} for a in answers]
    wanted = [option_of(a.references[0], a.choices) for a in answers]
    return _judged(
        [of.get(a.said, -1) == right for of, right, a in zip(place, wanted, answers, strict=True)],
        [a.said for a in answers],
        _commonest([plain(a.choices[right or 0]) for right, a in zip(wanted, answers, strict=True)]),
        parse=False,
    )


def option_of(reference: str, choices: Sequence[str]) -> int | None:
    """The option a reference names, by letter or text; None when it is none of them."""
    same = [i for i, option in enumerate(choices) if plain(option) == plain(reference)]
    return same[0] if len(same) == 1 else choose(reference, choices).index


def f1(answers: Sequence[Answer], language: str = "") -> Scored:
    """Weighted F1 (scikit-learn's `f1_score(average="weighted")`): the F1 of each class, weighted by its references.

    Classes are the rows' choices, or the references there are. The class of an answer is the one it names, in words
    (`choices.choose`); an answer that names none or several is a parse failure, and counts for no class.
    """
    library("sklearn.metrics")  # told now if it is missing
    labels = list(dict.fromkeys(label for a in answers for label in a.choices or a.references[:1]))
    labels = [label for i, label in enumerate(labels) if plain(label) not in map(plain, labels[:i])]
    place = {plain(label): i for i, label in enumerate(labels)}
    found = [choose(a.said, labels, letters=False).index for a in answers]
    wanted = [place[plain(a.choices[option_of(a.references[0], a.choices) or 0] if a.choices else a.references[0])]
              for a in answers]  # fmt: skip
    size = len(labels)
    counts = np.zeros((len(answers), 3 * size))  # right, named, wanted
    for i, (named, right) in enumerate(zip(found, wanted, strict=True)):
        counts[i, 2 * size + right] = 1
        if named is not None:
            counts[i, size + named] = 1
            counts[i, named] = named == right
    rows = 100 * np.array([named == right for named, right in zip(found, wanted, strict=True)], np.float64)
    read_as = [None if named is None else labels[named] for named in found]
    return Scored(
        counts, _weighted_f1, np.ones(len(answers), bool), rows, read_as, True, False, _classes(labels, wanted, found)
    )


def _weighted_f1(sums: Array) -> Array:
    right, named, wanted = np.split(sums, 3, -1)
    one = np.divide(2 * right, named + wanted, out=np.zeros_like(right), where=named + wanted > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(100 * (one * wanted).sum(-1) / wanted.sum(-1))


def _classes(labels: Sequence[str], wanted: Sequence[int], found: Sequence[int | None]) -> dict[str, Any]:
    """Precision, recall and F1 of each class, in percent."""
    if not wanted:
        return {}
    named = [-1 if one is None else one for one in found]
    of = library("sklearn.metrics").precision_recall_fscore_support(
        wanted, named, labels=list(range(len(labels))), zero_division=0
    )
    names = ("precision", "recall", "f1")
    table = {
        label: {**{name: 100 * float(of[j][i]) for j, name in enumerate(names)}, "rows": int(of[3][i])}
        for i, label in enumerate(labels)
    }
    return {"classes": table, "most_frequent_reference": _always(wanted)}


def _always(wanted: Sequence[int]) -> float:
    """Weighted F1 in percent of always naming the most frequent class: its share p gives F1 2p/(1+p), weighted by p."""
    share = Counter(wanted).most_common(1)[0][1] / len(wanted)
    return 100 * share * 2 * share / (1 + share)


def note(answers: Sequence[Answer], language: str = "") -> Scored:
    """Note accuracy: share of answers that name the reference's note and no other, by `notes.read_note`.

    Notes are compared as MIDI numbers, so C#4 is Db4; where the reference has no octave, as pitch classes. The paper
    leaves the definition open; this one is ours. `pitch_class` is the share that is right but for the octave.
    """
    found, wanted = [read_note(a.said) for a in answers], [read_note(a.references[0]) for a in answers]
    pairs = list(zip(found, wanted, strict=True))
    steps = [said is not None and ref is not None and said.step == ref.step for said, ref in pairs]
    whole = [same and (ref.midi is None or said.midi == ref.midi)  # type: ignore[union-attr]
             for same, (said, ref) in zip(steps, pairs, strict=True)]  # fmt: skip
    read_as = [None if said is None else str(said.midi if said.midi is not None else f"class {said.step}")
               for said in found]  # fmt: skip
    commonest = _commonest([str(ref) for ref in wanted])
    return _judged(whole, read_as, commonest, parse=True, pitch_class=100 * sum(steps) / max(len(steps), 1))


def wer(answers: Sequence[Answer], language: str = "en") -> Scored:
    """Word error rate: substitutions, deletions and insertions over the references' words, of all rows together.

    Both texts go through Whisper's normaliser, GigaSpeech's tags taken out first; a row whose reference is then empty
    is left out (paper Appendix B). Lower is better, and over 100 is possible.
    """
    jiwer, normalize = library("jiwer"), whisper_normalizer(language)
    counts, kept, kinds = np.zeros((len(answers), 2)), np.ones(len(answers), bool), np.zeros(3, int)
    heard: list[str | None] = []
    for i, answer in enumerate(answers):
        right, said = normalize(answer.references[0]), normalize(answer.said)
        heard.append(said)
        if not right:
            kept[i] = False
            continue
        found = jiwer.process_words(right, said)
        errors = np.array([found.substitutions, found.deletions, found.insertions])
        counts[i] = errors.sum(), found.hits + found.substitutions + found.deletions
        kinds += errors
    rows = np.where(kept, ratio(np.where(kept[:, None], counts, [0.0, 1.0])), np.nan)
    details = dict(zip(("substitutions", "deletions", "insertions"), map(int, kinds), strict=True))
    return Scored(counts, ratio, kept, rows, heard, details={**details, "words": int(counts[:, 1].sum())})


def bleu(answers: Sequence[Answer], language: str = "") -> Scored:
    """BLEU-4 of the corpus by sacrebleu with its default tokeniser and smoothing, all references of a row used."""
    sacrebleu = library("sacrebleu")
    one, whole = sacrebleu.BLEU(effective_order=True), sacrebleu.BLEU()
    rows = [one.sentence_score(a.said, list(a.references)) for a in answers]
    counts = np.array([[*r.counts, *r.totals, r.sys_len, r.ref_len] for r in rows], np.float64).reshape(-1, 10)

    def score(sums: Array) -> Array:
        flat = sums.reshape(-1, 10).astype(int).tolist()
        made = [
            whole.compute_bleu(s[:4], s[4:8], s[8], s[9], whole.smooth_method, whole.smooth_value).score for s in flat
        ]
        return np.array(made).reshape(sums.shape[:-1])

    said: list[str | None] = [a.said for a in answers]
    return Scored(counts, score, np.ones(len(rows), bool), np.array([r.score for r in rows], np.float64), said)


def chrf(answers: Sequence[Answer], language: str = "") -> Scored:
    """chrF2 by sacrebleu, the mean over rows of each row's own score, against the best of its references."""
    metric = library("sacrebleu").CHRF()
    rows = np.array([metric.sentence_score(a.said, list(a.references)).score for a in answers], np.float64)
    counts = np.stack([rows / 100, np.ones(len(rows))], 1)
    return Scored(counts, ratio, np.ones(len(rows), bool), rows, [a.said for a in answers])


def judge(answers: Sequence[Answer], language: str = "") -> Scored:
    """Mean of the ratings 0 to 5 that a judge gave (`judge.judge_answers`), times 20.

    An answer that was not rated does not count; it is never taken for a 0.
    """
    kept = np.array([a.rating is not None for a in answers], bool)
    rows = np.array([np.nan if a.rating is None else 100 * a.rating / HIGHEST for a in answers], np.float64)
    counts = np.where(kept[:, None], np.stack([rows / 100, np.ones(len(rows))], 1), 0.0)
    given = Counter(a.rating for a in answers if a.rating is not None)
    details = {"ratings": {str(rating): given[rating] for rating in range(HIGHEST + 1)}}
    read_as = [None if a.rating is None else str(a.rating) for a in answers]
    return Scored(counts, ratio, kept, rows, read_as, details=details)


METRICS: Mapping[str, Metric] = {
    "exact": exact, "choice": choice, "likelihood": likelihood, "f1": f1, "note": note, "wer": wer, "bleu": bleu,
    "chrf": chrf, "judge": judge,
}  # fmt: skip
CLOSED = ("choice", "likelihood")
LOWER_IS_BETTER = frozenset({"wer"})


def cannot_score(metric: str, answer: Answer) -> str:
    """Why a row cannot be scored by a metric, whatever is said; empty when it can."""
    first = answer.references[0]
    if metric in CLOSED and not answer.choices:
        return f"the metric {metric} needs options: a list `choices` in the row, or the task's"
    if answer.choices and metric in WITH_CHOICES and option_of(first, answer.choices) is None:
        return f"the right answer {first!r:.60} is none of its choices: {', '.join(answer.choices)}"
    if metric == "note" and read_note(first) is None:
        return f"the right answer {first!r:.60} names no note, or several"
    if metric in (*WITH_CHOICES, "note", "wer") and len(answer.references) > 1:
        return f"the metric {metric} takes one right answer, the row has {len(answer.references)}"
    if metric in ("f1", "exact") and not plain(first):
        return f"the right answer {first!r:.60} has no letter or digit"
    if metric == "judge" and not all(reference.strip() for reference in answer.references):
        return "the right answer is empty, and a judge has nothing to go by"
    return ""
