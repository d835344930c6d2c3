"""Files of rows: lines and lists, compressed or not, damaged; and finding out which format a file is in."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from coatkit.data.formats.nemo import NemoRows
from coatkit.data.lines import peek
from coatkit.data.readers import READERS, detect, open_rows
from coatkit.errors import DataError

TURNS = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "Rain."}]
NEMO = {"audio_filepath": "a.wav", "duration": 2.5, "offset": 1.0, "text": "hello"}
GOOD: dict[str, dict[str, Any]] = {
    "ms-swift": {"query": "<audio>What?", "response": "Rain.", "audios": ["a.wav"]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<audio>What?"}, {"from": "gpt", "value": "Rain."}],
        "audios": ["a.wav"],
    },
    "nemo": NEMO,
    "lhotse": {
        "start": 1.0,
        "duration": 2.5,
        "supervisions": [{"start": 0.0, "duration": 2.5, "text": "hello"}],
        "recording": {"sources": [{"type": "file", "channels": [0], "source": "a.wav"}]},
    },
}


def written(path: Path, *rows: Any, indent: int | None = None) -> Path:
    text = json.dumps(list(rows), indent=indent) if indent else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("format", GOOD)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["jsonl", "json.gz"])
def test_every_format_is_read_from_lines_and_lists_packed_or_not(
    tmp_path: Path, format: str, indent: int | None, suffix: str
) -> None:
    path = written(tmp_path / f"rows.{suffix}", *[{**GOOD[format], "id": name} for name in "abc"], indent=indent)
    assert detect(path) == format
    rows = open_rows(path)
    assert f"{type(rows).__module__}:{type(rows).__name__}" == READERS[format]
    assert [row.id for row in pickle.loads(pickle.dumps(rows))] == ["a", "b", "c"]
    assert rows[2].audios[0].path == tmp_path / "a.wav"
    assert len(rows[0].audios) == 1


def test_places_in_a_list_are_lines_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    texts = [json.dumps({"messages": TURNS, "audio": f"{name}.wav"}, ensure_ascii=False) for name in ("ä", "日本", "c")]
    path.write_text("\ufeff\n[\n" + ",\n\n".join(texts) + "\n]\n", encoding="utf-8")
    rows = open_rows(path)
    assert [row.audios[0].path.name for row in rows] == ["ä.wav", "日本.wav", "c.wav"]
    assert [rows.where(i) for i in range(3)] == [f"{path}:{line}" for line in (3, 5, 7)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{}, ", r"rows\.json:1: not a valid JSON list"),
        ('[\n{"messages": []}\n{}]', r"rows\.json:3: not a valid JSON list: expected ',' or '\]'"),
        ("[\n{}]\nmore", "there is text after the list"),
        ("[\n" * 100_000, "not a valid JSON list"),
        ("[]", "holds no row"),
        ("[\n\xff]", "not UTF-8"),
    ],
    ids=range(6),
)
def test_damaged_lists(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        open_rows(path)


def test_a_list_that_is_a_line_is_a_wrong_row(tmp_path: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl", [1, 2], {"messages": TURNS[1:] + TURNS[:1]}, {"messages": TURNS, "audio": "a"}
    )
    rows = open_rows(path)
    assert len(rows) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a row must be an object"):
        rows[0]
    assert len(rows[2].audios) == 1


@pytest.mark.parametrize("cut", [5, 30, -9])
def test_damaged_gzip(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "rows.jsonl.gz", *[NEMO] * 50)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: is no whole gzip file"):
        open_rows(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(tmp_path / "pipe")


# Which format


def test_a_later_row_with_loss_makes_the_file_ms_swifts(tmp_path: Path) -> None:
    plain = {"messages": TURNS, "audios": ["a.wav"]}
    path = written(tmp_path / "rows.jsonl", plain, plain)
    assert detect(path) == "coatkit"
    path = written(tmp_path / "rows.jsonl", plain, {**plain, "messages": [TURNS[0], {**TURNS[1], "loss": False}]})
    assert detect(path) == "ms-swift"


def test_unknown_rows_tell_their_keys_and_what_each_format_needs(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"wav": "a.wav", "txt": "hello"}, {"wav": "b.wav"})
    with pytest.raises(DataError) as caught:
        open_rows(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: rows with the keys 'wav', 'txt' are in no known format.")
    assert {line.split(":")[0].strip() for line in said.splitlines()[1:-1]} == {"coatkit", *GOOD}


def test_a_named_format_is_taken_at_its_word(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"wav": "a.wav"})
    assert isinstance(open_rows(path, "nemo"), NemoRows)
    with pytest.raises(DataError, match=r"there is no format 'share-gpt'; did you mean 'sharegpt'\?"):
        open_rows(path, "share-gpt")


def test_options_a_format_has_no_use_for_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", NEMO)
    assert open_rows(path, question="Say it.")[0].messages[0].content == "<audio>Say it."
    with pytest.raises(DataError, match="rows in the format 'nemo' take no columns"):
        open_rows(path, columns={"answer": "text"})
    with pytest.raises(DataError, match="rows in the format 'coatkit' take no question"):
        open_rows(path, "coatkit", question="What?")


def test_the_question_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", NEMO)
    prints = {open_rows(path, question=question).fingerprint() for question in (None, "What?", "Who?")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    "head", [b"", b"\n\n", b"\x00\x01", b"[", b"{", b"\x1f\x8b", b"5\n6\n", b"[[[", b"\xff\xfe[\x00"]
)
def test_any_file_has_a_format_or_an_error(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "rows"
    path.write_bytes(head)
    assert detect(path) == "coatkit"
    assert all(not isinstance(row, dict) for row in peek(path))
    with pytest.raises(DataError):
        list(open_rows(path))


def test_long_rows_are_looked_at_as_far_as_they_are_whole(tmp_path: Path) -> None:
    long = {**NEMO, "text": "a" * (1 << 23)}
    path = written(tmp_path / "rows.json", NEMO, long, indent=1)
    assert peek(path) == [NEMO]
    assert len(open_rows(path)) == 2


def test_what_takes_too_much_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatkit.data.lines._UNPACKED_LIMIT", 1 << 10)
    monkeypatch.setattr("coatkit.data.lines._LIST_LIMIT", 1 << 10)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: unpacks to over 0 GiB; unpack it yourself"):
        open_rows(written(tmp_path / "rows.jsonl.gz", *[NEMO] * 50))
    with pytest.raises(DataError, match=r"rows\.json: a JSON list of over 0 GiB, .*write one row a line"):
        open_rows(written(tmp_path / "rows.json", *[NEMO] * 50, indent=1))
    assert len(open_rows(written(tmp_path / "rows.jsonl", *[NEMO] * 50))) == 50


def test_every_reader_is_there() -> None:
    for target in READERS.values():
        module, _, name = target.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)
