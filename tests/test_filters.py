"""Filters: which rows pass, where a row's length comes from, and what is said when none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from coatkit.data.filters import Sieve, keys_of, passes, seconds_of
from coatkit.data.rows import AudioRef, Message, Row
from coatkit.errors import DataError
from coatkit.spec_data import FilterSpec

TALK = (Message("user", "a"), Message("assistant", "b"))


def row(*audios: AudioRef, **labels: Any) -> Row:
    return Row("r", TALK, audios, "rows.jsonl:3", labels)


@pytest.mark.parametrize(
    ("keep", "labels", "seconds", "taken"),
    [
        ({}, {}, 0.0, True),
        ({"min_seconds": 1}, {}, 1.0, True),
        ({"min_seconds": 1}, {}, 0.99, False),
        ({"max_seconds": 2}, {}, 2.0, True),
        ({"max_seconds": 2}, {}, 2.01, False),
        ({"language": "en"}, {"language": "en"}, 1.0, True),
        ({"language": ["de", "en"]}, {"language": "en"}, 1.0, True),
        ({"language": "en"}, {"language": "de"}, 1.0, False),
        ({"language": "en"}, {}, 1.0, False),
        ({"where": {"task": "asr"}}, {"task": "asr"}, 1.0, True),
        ({"where": {"task": ["asr", "mc"]}}, {"task": "mc"}, 1.0, True),
        ({"where": {"task": "asr"}}, {"task": "mc"}, 1.0, False),
        ({"where": {"task": "asr", "n": 3}}, {"task": "asr", "n": 3.0}, 1.0, True),
        ({"where": {"task": "asr", "n": 3}}, {"task": "asr", "n": 4}, 1.0, False),
        ({"where": {"clean": True}}, {"clean": 1}, 1.0, False),  # true is not 1
        ({"where": {"clean": 1}}, {"clean": True}, 1.0, False),
        ({"where": {"clean": False}}, {}, 1.0, False),
        ({"where": {"chord": None}}, {}, 1.0, True),
        ({"where": {"chord": None}}, {"chord": "C"}, 1.0, False),
        ({"where": {"labels.chord": "C"}}, {"labels": {"chord": "C"}}, 1.0, True),
        ({"where": {"labels.chord": "C"}}, {"labels.chord": "C", "labels": {"chord": "D"}}, 1.0, True),
        ({"where": {"labels.chord": "C"}}, {"labels": "chord"}, 1.0, False),
        ({"where": {"tags": "x"}}, {"tags": ["x"]}, 1.0, False),
        ({"language": "en", "where": {"language": ["en", "de"]}}, {"language": "de"}, 1.0, False),
        ({"max_seconds": 2, "where": {"task": "asr"}}, {"task": "asr"}, 3.0, False),
    ],
)
def test_what_passes(keep: dict[str, Any], labels: dict[str, Any], seconds: float, taken: bool) -> None:
    spec = FilterSpec.model_validate(keep)
    assert passes(row(**labels), seconds, spec) is taken
    stretch = [AudioRef(Path("a.wav"), 1.0, 1.0 + seconds)] if seconds else []
    assert Sieve({"x": spec}).takes(row(*stretch, **labels)) is taken


def test_length_of_stretches_then_what_is_declared_then_the_file(tmp_path: Path) -> None:
    path, missing = tmp_path / "a.wav", tmp_path / "missing.wav"
    soundfile.write(path, np.zeros(24_000, np.float32), 16_000)
    assert seconds_of(row(duration=7.0)) == 0.0  # text alone
    assert seconds_of(row(AudioRef(missing, 1.0, 3.5), AudioRef(missing, None, 1.0), duration=9)) == 3.5
    assert seconds_of(row(AudioRef(missing), duration=9)) == 9.0
    assert seconds_of(row(AudioRef(missing, 1.0), seconds=4.25)) == 4.25
    for odd in ("9", True, -1, float("nan"), None):
        assert seconds_of(row(AudioRef(path), AudioRef(path, 0.5), duration=odd)) == 2.5
    with pytest.raises(DataError, match=r"rows\.jsonl:3 \(row r\): .*missing\.wav.*no such file"):
        seconds_of(row(AudioRef(missing)))


def test_sounds_are_looked_at_only_when_nothing_else_decides(tmp_path: Path) -> None:
    sieve = Sieve({"x": FilterSpec(min_seconds=1, where={"task": ["asr"]})})
    assert not sieve.takes(row(AudioRef(tmp_path / "missing.wav"), task="mc"))
    with pytest.raises(DataError, match="no such file"):
        sieve.takes(row(AudioRef(tmp_path / "missing.wav"), task="asr"))


def test_a_sieve_is_all_its_filters_and_says_which_refused() -> None:
    sieve = Sieve(
        {"the mixture": FilterSpec(language=["en"]), "nothing": FilterSpec(), "the source": FilterSpec(max_seconds=2)}
    )
    assert sieve
    assert not Sieve({"a": FilterSpec(), "b": FilterSpec()})
    rows = [row(language="en"), row(language="de"), row(language="de"), row(AudioRef(Path("a"), 0, 3), language="en")]
    assert [sieve.takes(one) for one in rows] == [True, False, False, False]
    assert sieve.reasons() == "2 do not pass the mixture's language; 1 do not pass the source's seconds"
    assert sieve.unknown_key() is None


def test_a_key_no_row_has_is_found_unless_it_may_be_absent() -> None:
    sieve = Sieve({"a": FilterSpec(where={"task": ["asr"]}), "b": FilterSpec(where={"chord": [None], "tsak": ["x"]})})
    sieve.takes(row(task="mc"))
    assert sieve.unknown_key() == ("b", "where.tsak")
    sieve.takes(row(task="mc", tsak="y"))
    assert sieve.unknown_key() is None


def test_keys_of_rows() -> None:
    rows = [row(task="a", labels={"chord": "C", "n": 1}), row(task="b", extra=None)]
    assert keys_of(rows) == ["extra", "labels.chord", "labels.n", "task"]
