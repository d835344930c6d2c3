"""Files that lhotse and `datasets` themselves wrote: those kept here and, after `make test-formats`, new ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from coatkit.data import audio
from coatkit.data.readers import detect, open_rows
from coatkit.data.rows import Row
from coatkit.errors import DataError

ROOT = Path(__file__).parent.parent
SECONDS = {"low": 0.50, "high": 0.20, "both": 0.25}


@pytest.fixture(params=["kept", "new"])
def folder(request: pytest.FixtureRequest) -> Path:
    path = ROOT / ("tests/data/formats" if request.param == "kept" else ".formats/work")
    if not (path / "versions.json").exists():
        pytest.skip("written by `make test-formats`, which installs lhotse and datasets into .formats")
    return path


def said(row: Row) -> list[str]:
    return [message.content for message in row.messages]


def heard(row: Row) -> list[float]:
    """Seconds of a row's sounds, by the header and by what is decoded."""
    found = []
    for ref in row.audios:
        samples, rate = audio.read(ref, 10)
        assert abs(samples.size / rate - audio.duration(ref)) < 1e-3
        assert samples.std() > 0.05
        found.append(round(samples.size / rate, 3))
    return found


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_cuts(folder: Path, name: str) -> None:
    assert detect(folder / "lhotse" / name) == "lhotse"
    low, both = open_rows(folder / "lhotse" / name)
    assert said(low) == ["<audio>Transcribe the speech.", "a low tone"]  # by time, not by their order in the cut
    assert said(both) == ["<audio>How many tones?", "Two."]
    assert heard(low) == [0.45]
    assert heard(both) == [0.2]
    assert (low.id, low.where) == ("low", f"{folder}/lhotse/{name}:1")
    assert (low.labels["language"], low.labels["duration"]) == ("en", 0.45)
    assert "speaker" not in low.labels  # one of two supervisions names one
    assert (both.labels["task"], both.labels["duration"]) == ("count", 0.2)


def test_cuts_that_only_change_the_rate_are_heard(folder: Path) -> None:
    assert heard(open_rows(folder / "lhotse/resampled.jsonl")[0]) == [0.45]


def test_cuts_whose_sound_is_in_no_file_or_whose_text_is_not_in_the_sound_are_refused(folder: Path) -> None:
    rows = open_rows(folder / "lhotse/odd.jsonl")
    reasons = [
        "'type' is MixedCut or PaddingCut",
        "'type' is MixedCut or PaddingCut",
        "recording.transforms holds 'Speed'",
        "'channel' is 1 of [0, 1]",
        "recording.sources[0].type is 'url'",
        "supervisions[0] is from 0 to 0.25 s, outside the cut's 0.1 s",
        "'supervisions' holds no text",
    ]
    assert len(rows) == len(reasons)
    for i, reason in enumerate(reasons):
        with pytest.raises(DataError) as caught:
            rows[i]
        assert str(caught.value).startswith(f"{folder}/lhotse/odd.jsonl:{i + 1}: {reason}")


@pytest.mark.parametrize("path", ["datasets/spoken", "parquet/spoken.parquet"])
def test_one_sound_in_a_row(folder: Path, path: str) -> None:
    rows = pickle.loads(pickle.dumps(open_rows(folder / path)))
    assert detect(folder / path) == path.partition("/")[0]
    assert [said(row)[1] for row in rows] == ["a low tone", "a high tone", "both"]
    assert {said(row)[0] for row in rows} == {"<audio>Transcribe the speech."}
    assert [heard(row) for row in rows] == [[0.5], [0.2], [0.25]]
    assert [row.labels["kind"] for row in rows] == ["one", "one", "two"]  # the names of a ClassLabel
    assert [row.labels["language"] for row in rows] == ["en", "en", "de"]
    assert len({row.id for row in rows}) == 3
    assert [heard(rows[i]) for i in (2, 0, 1, 0, 2)] == [[0.25], [0.5], [0.2], [0.5], [0.25]]


@pytest.mark.parametrize("path", ["datasets/talks", "parquet/talks.parquet"])
def test_several_sounds_and_turns_in_a_row(folder: Path, path: str) -> None:
    two, one, none = open_rows(folder / path)
    assert said(two) == ["<audio>How high?", "Low.", "And <audio>?", "High."]
    assert heard(two) == [0.5, 0.2]
    assert said(one) == ["<audio>How many?", "Two."]
    assert heard(one) == [0.25]
    assert (said(none), none.audios) == (["1 plus 1?", "2"], ())


def test_columns_may_be_named(folder: Path) -> None:
    rows = open_rows(folder / "datasets/spoken", columns={"answer": "kind"}, question="One tone or two?")
    assert said(rows[2]) == ["<audio>One tone or two?", "two"]
    assert rows[2].labels["text"] == "both"


def test_a_sound_beside_the_table(folder: Path) -> None:
    rows = open_rows(folder / "beside.parquet")
    assert heard(rows[0]) == [0.5]
    with pytest.raises(DataError, match=r"beside\.parquet\[1\]: has no question and no sound"):
        rows[1]


def test_a_folder_of_splits_names_them(folder: Path) -> None:
    with pytest.raises(DataError, match="holds the splits test, train; give one, as in splits/test"):
        open_rows(folder / "datasets/splits")
    assert len(open_rows(folder / "datasets/splits/train", columns={"question": "text", "answer": "text"})) == 1
