"""Tables as rows: which columns are taken for what, what is refused, and reading them from several processes."""

from __future__ import annotations

import datetime
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from coatkit.data import audio
from coatkit.data.formats.columns import TableRows
from coatkit.data.formats.datasets import DatasetsRows
from coatkit.data.formats.parquet import ParquetRows
from coatkit.data.readers import detect, open_rows
from coatkit.data.rows import AudioRef, Row, Rows, parse_row
from coatkit.errors import DataError

SOUND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
NONE = {"bytes": b"x", "path": "x.wav"}
Write = Callable[..., Path]


@pytest.fixture(params=["parquet", "arrow"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    def make(rows: dict[str, Any], name: str = "table", **types: Any) -> Path:
        made = pa.table({key: pa.array(values, types.get(key)) for key, values in rows.items()})
        path = tmp_path / f"{name}.{request.param}"
        if request.param == "parquet":
            pq.write_table(made, path, row_group_size=2)
        else:
            with pa.ipc.new_stream(str(path), made.schema) as writer:
                writer.write_table(made, max_chunksize=2)
        return path

    return make


def said(row: Row) -> list[tuple[str, str]]:
    return [(message.role[0], message.content) for message in row.messages]


def test_the_usual_columns(write: Write) -> None:
    path = write(
        {"audio": [NONE, None], "question": ["Who?", "1+1?"], "answer": ["She.", "2"], "id": ["a", None], "n": [1, 2]},
        audio=SOUND,
    )
    rows = open_rows(path)
    assert [row.id for row in rows] == ["a", f"{path.name}[1]"]
    assert said(rows[0]) == [("u", "<audio>Who?"), ("a", "She.")]
    assert said(rows[1]) == [("u", "1+1?"), ("a", "2")]
    assert rows[0].audios == (AudioRef(path, part="audio[0]"),)
    assert rows[0].labels == {"n": 1, "question": "Who?", "answer": "She."}
    assert rows.where(1) == rows[1].where == f"{path}[1]"


def test_paths_segments_and_our_own_messages(write: Write, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Rain."}]
    path = write(
        {"audio": ["a.wav", "b.tar#1+2"], "start": [0.5, None], "end": [1, None], "messages": [turns, turns]},
        messages=pa.list_(TURN),
    )
    rows = open_rows(path)
    assert rows[0].audios == (AudioRef(tmp_path / "a.wav", 0.5, 1.0),)
    assert rows[1].audios == (AudioRef(tmp_path / "b.tar", part="1+2"),)
    assert said(rows[0]) == [("u", "<audio>What?"), ("a", "Rain.")]


def test_lists_of_sounds_with_their_times(write: Write, tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("path", pa.string()), ("start", pa.float64()), ("end", pa.float64())]))
    path = write({"audios": [[{"path": "a", "start": 1.0}, {"path": "b", "end": 2.0}]], "text": ["c"]}, audios=kind)
    assert open_rows(path)[0].audios == (AudioRef(tmp_path / "a", 1.0), AudioRef(tmp_path / "b", None, 2.0))


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())]), pa.list_(pa.binary())]
)
def test_bytes_without_a_path(write: Write, kind: Any, sound: Callable[..., np.ndarray]) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, sound(0.2), 16_000, format="WAV")
    data: Any = {"bytes": stream.getvalue()} if pa.types.is_struct(kind) else stream.getvalue()
    path = write({"audio": [[data, data] if pa.types.is_list(kind) else data], "text": ["a"]}, audio=kind)
    refs = open_rows(path)[0].audios
    assert [audio.duration(ref) for ref in refs] == [pytest.approx(0.2)] * (2 if pa.types.is_list(kind) else 1)


def test_a_sound_by_another_name_is_found_by_its_type(write: Write) -> None:
    path = write({"clip": [NONE], "sentence": ["hello"]}, clip=SOUND)
    assert open_rows(path)[0].audios == (AudioRef(path, part="clip[0]"),)


def test_conversations_and_structs_of_lists(write: Write) -> None:
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    talk = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]
    assert said(open_rows(write({"conversations": [talk]}, conversations=pa.list_(turn)))[0]) == [
        ("u", "Hi?"),
        ("a", "Hi."),
    ]
    lists = pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))])
    talk = {"role": ["user", "assistant"], "content": ["Hi?", "Hi."]}
    path = write({"messages": [talk]}, "lists", messages=lists)
    assert said(open_rows(path)[0]) == [("u", "Hi?"), ("a", "Hi.")]


def test_loss_of_a_message(write: Write) -> None:
    turn = pa.struct([*TURN, ("loss", pa.bool_())])
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a", "loss": False}]
    assert [m.learn for m in open_rows(write({"messages": [talk]}, messages=pa.list_(turn)))[0].messages] == [
        True,
        False,
    ]


def test_what_json_does_not_have_becomes_text_or_nothing(write: Write) -> None:
    day = datetime.datetime(2026, 1, 2)
    path = write(
        {"question": ["?"], "answer": [2.5], "day": [day], "raw": [b"x"], "nest": [{"a": [day, None], "b": b"y"}]}
    )
    row = open_rows(path)[0]
    assert said(row)[1] == ("a", "2.5")
    assert row.labels["day"] == "2026-01-02 00:00:00"
    assert "raw" not in row.labels
    assert row.labels["nest"] == {"a": ["2026-01-02 00:00:00", None]}
    json.dumps(row.labels)


WRONG_TABLES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no answer": ({"audio": [NONE], "words": ["a"]}, {}, "no column is known to hold the answer; name it"),
    "no such part": (
        {"text": ["a"]},
        {"sound": "text"},
        "columns.sound is no part of a row; there are audio, messages,",
    ),
    "no such column": (
        {"text": ["a"]},
        {"answer": "txt"},
        "columns.answer: there is no column 'txt'; the columns are text",
    ),
    "two sounds": (
        {"one": [NONE], "two": [NONE], "text": ["a"]},
        {},
        "several columns hold sounds, one, two; name one",
    ),
    "audio and audios": ({"audio": [NONE], "audios": [[NONE]], "text": ["a"]}, {}, "has the columns audio and audios"),
    "two ways": (
        {"messages": ["a"], "text": ["a"]},
        {"messages": "messages", "answer": "text"},
        "columns.messages goes",
    ),
    "no rows": ({"text": []}, {"answer": "text"}, "holds no row"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_tables_name_the_file_and_the_remedy(write: Write, case: str) -> None:
    rows, columns, reason = WRONG_TABLES[case]
    path = write(rows, **dict.fromkeys(("audio", "one", "two"), SOUND))
    with pytest.raises(DataError) as caught:
        open_rows(path, columns=columns)
    assert str(caught.value).startswith(f"{path}: {reason}")


WRONG_CELLS: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"audio": [NONE], "text": [None]}, "'text' must be text, found NoneType"),
    "a list": ({"audio": [NONE], "text": [["a", "b"]]}, "'text' must be text, found list"),
    "truth": ({"audio": [NONE], "text": [True]}, "'text' must be text, found bool"),
    "no sound": ({"audio": [None], "text": ["a"]}, "has no question and no sound to ask about"),
    "path": ({"audio": [3], "text": ["a"]}, "'audio' must be a path, found int"),
    "paths": ({"audios": [["a", None]], "text": ["a"]}, "'audios[1]' must be a path, found NoneType"),
    "empty": ({"audio": [""], "text": ["a"]}, "'audio' is no file name"),
    "times": (
        {"audio": ["a"], "text": ["a"], "start": [2], "end": [1]},
        "'end' of audio (1.0 s) is not after its 'start'",
    ),
    "start": ({"audio": ["a"], "text": ["a"], "start": ["x"]}, "'start' of audio must be seconds, found 'x'"),
    "start of many": ({"audios": [["a"]], "text": ["a"], "start": [2.0]}, "'start' and 'end' go with one sound"),
    "turns": ({"audio": ["a"], "messages": ["hello"]}, "'messages' must be a non-empty list"),
    "no turns": ({"audio": ["a"], "messages": [[]]}, "'messages' must be a non-empty list"),
    "role": ({"messages": [[{"role": "x", "content": "a"}]]}, "messages[0].role is 'x'; expected one of"),
    "tags": ({"question": ["<audio>?"], "answer": ["a"]}, "1 <audio> tags in the messages but 0 sounds"),
}


@pytest.mark.parametrize("case", WRONG_CELLS)
def test_wrong_cells_name_the_row_and_the_column(write: Write, case: str) -> None:
    rows, reason = WRONG_CELLS[case]
    first = next(iter(rows.values()))[0]
    path = write(rows, audio=SOUND if first is None or isinstance(first, dict) else None)
    with pytest.raises(DataError) as caught:
        open_rows(path)[0]
    assert str(caught.value).startswith(f"{path}[0]: {reason}")


def test_text_that_is_not_utf8_spoils_its_row_alone(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"\xff\xfe", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": text}), tmp_path / "t.parquet")
    rows = open_rows(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet\[1\]: cannot be read: column 'answer'"):
        rows[1]
    assert [rows[i].messages[1].content for i in (0, 2)] == ["fine", "fine"]


def test_columns_of_one_name(tmp_path: Path) -> None:
    made = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_stream(str(tmp_path / "t.arrow"), made.schema) as writer:
        writer.write_table(made)
    with pytest.raises(DataError, match="several columns have the same name: text, text"):
        open_rows(tmp_path / "t.arrow")


# Folders


def parquet(path: Path, *texts: str, column: str = "answer") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"question": ["?"] * len(texts), column: list(texts)}), path)
    return path


def test_a_folder_of_parquet_is_read_in_order(tmp_path: Path) -> None:
    for i in (1, 0, 2):
        parquet(tmp_path / f"train-0000{i}-of-00003.parquet", f"{i}a", f"{i}b")
    rows = open_rows(tmp_path)
    assert isinstance(rows, ParquetRows)
    assert [row.messages[1].content for row in rows] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert rows[3].where == f"{tmp_path}/train-00001-of-00003.parquet[1]"
    assert rows[-1].messages[1].content == "2b"


def test_folders_that_are_not_one_set_of_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "splits/train-00000-of-00001.parquet", "a")
    parquet(tmp_path / "splits/test-00000-of-00001.parquet", "b")
    with pytest.raises(DataError, match="splits: holds the splits test, train; put one split's files, or links, in a"):
        open_rows(tmp_path / "splits")
    parquet(tmp_path / "mixed/a.parquet", "a")
    other = parquet(tmp_path / "mixed/b.parquet", "a", column="text")
    with pytest.raises(DataError, match=rf"{other}: its columns are not those of a\.parquet"):
        open_rows(tmp_path / "mixed")
    with pytest.raises(DataError, match=r"holds no \.parquet file; there are some in mixed, splits"):
        open_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds neither Parquet files nor what `datasets` saves"):
        detect(tmp_path / "empty")


@pytest.mark.parametrize(
    "state",
    ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [{}]}', '{"_data_files": [{"filename": "../x.arrow"}]}'],
)
def test_a_damaged_folder_of_datasets(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"no folder of save_to_disk: its state\.json is missing or damaged"):
        open_rows(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(DataError, match=r"gone\.arrow: cannot be read: No such file"):
        open_rows(tmp_path)


def test_formats_by_what_is_in_the_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.data", "a")
    assert detect(path) == "parquet"
    made = pq.read_table(path)
    with pa.ipc.new_file(str(tmp_path / "file"), made.schema) as writer:
        writer.write_table(made)
    assert detect(tmp_path / "file") == "datasets"
    assert isinstance(open_rows(tmp_path / "file"), DatasetsRows)
    marked = made.replace_schema_metadata({"coatkit.mixture": "{}"})
    pq.write_table(marked, tmp_path / "mix.parquet")
    assert detect(tmp_path / "mix.parquet") == "mixture"
    path.write_bytes(b"PAR1" + b"x" * 100)
    assert detect(path) == "parquet"
    with pytest.raises(DataError, match=r"rows\.data: cannot be read: "):
        open_rows(path)


# Everything at once


def test_the_fingerprint_follows_rows_columns_and_question(tmp_path: Path) -> None:
    first, second = parquet(tmp_path / "1/a.parquet", "a"), parquet(tmp_path / "2/a.parquet", "b")
    same = parquet(tmp_path / "3/a.parquet", "a")
    prints = [open_rows(path).fingerprint() for path in (first, second, same)]
    assert prints[0] == prints[2] != prints[1]
    swapped = open_rows(first, columns={"question": "answer", "answer": "question"}).fingerprint()
    assert len({*prints, swapped, open_rows(first, question="What?").fingerprint()}) == 4


def test_the_fingerprint_of_a_large_file_is_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatkit.data.formats.columns._WHOLE", 1000)
    monkeypatch.setattr("coatkit.data.formats.columns._HEAD", 64)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["?"] * 50_000, "answer": [str(i) for i in range(50_000)]}), path)
    rows = open_rows(path)
    before = rows.fingerprint()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert rows.fingerprint() != before


class Loaded(Dataset[tuple[str, float]]):
    """A row's answer and the seconds of its sound, read in a worker."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, float]:
        row = self.rows[index]
        return row.messages[-1].content, audio.duration(row.audios[0])


def test_workers_read_the_same(write: Write, sound: Callable[..., np.ndarray]) -> None:
    cells = []
    for i in range(12):
        stream = io.BytesIO()
        soundfile.write(stream, sound(0.1 + i / 100), 16_000, format="WAV")
        cells.append({"bytes": stream.getvalue(), "path": None})
    rows = open_rows(write({"audio": cells, "text": [str(i) for i in range(12)]}, audio=SOUND))
    here = [Loaded(rows)[i] for i in range(12)]  # opens the table in this process first
    workers = DataLoader(Loaded(pickle.loads(pickle.dumps(rows))), batch_size=None, num_workers=2)
    assert list(map(tuple, workers)) == here
    assert [text for text, _ in here] == [str(i) for i in range(12)]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "bytes", "path", "from", "value"]), inner, min_size=1, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["audio", "audios", "messages", "text", "question", "start", "id"]), values))
def test_any_table_is_rows_or_a_data_error(tmp_path: Path, columns: dict[str, Any]) -> None:
    path = tmp_path / f"{os.urandom(6).hex()}.parquet"
    try:
        pq.write_table(pa.table({name: [value, value] for name, value in columns.items()}), path)
    except (pa.ArrowException, ValueError):  # what no table can hold
        return
    try:
        rows = open_rows(path)
        for row in rows:
            f"{row.id}{''.join(m.content for m in row.messages)}".encode()
            assert sum(m.content.count("<audio>") for m in row.messages) == len(row.audios)
        assert isinstance(rows, TableRows)
        named = True
    except DataError as error:
        named = str(error).startswith(str(path))
    assert named


def test_what_a_sound_is_called_leads_back_to_it(write: Write, tmp_path: Path) -> None:
    """A mixture keeps sounds by these names."""
    path = write({"audio": [NONE], "text": ["a"]}, audio=SOUND)
    os.rename(path, bare := tmp_path / "without suffix")
    [ref] = open_rows(bare)[0].audios
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]
    assert parse_row({"messages": turns, "audio": str(ref)}, "rows.jsonl:1", tmp_path / "other").audios == (ref,)
