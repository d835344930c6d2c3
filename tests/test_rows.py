"""Rows of a manifest: every wrong one names its file, line and field."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatkit.data.rows import AUDIO_TAG, AudioRef, JsonlRows, Message, Row, parse_row
from coatkit.errors import DataError

TURNS = [{"role": "user", "content": "What is heard?"}, {"role": "assistant", "content": "A bell."}]
HERE = Path("/data")


def parse(**row: Any) -> Row:
    return parse_row({"messages": TURNS, **row}, "rows.jsonl:7", HERE)


def manifest(tmp_path: Path, content: str | bytes) -> JsonlRows:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return JsonlRows(path)


def line(**row: Any) -> str:
    return json.dumps({"messages": TURNS, **row}) + "\n"


# One row


def test_a_row_with_a_sound_gets_its_tag_in_the_first_user_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = parse(messages=[system, *TURNS], audio="a.flac", start=1, end=2.5, id="bell-1", instrument="bell", pitch=3)
    assert row == Row(
        "bell-1",
        (
            Message("system", "Be brief."),
            Message("user", f"{AUDIO_TAG}What is heard?"),
            Message("assistant", "A bell."),
        ),
        (AudioRef(HERE / "a.flac", 1.0, 2.5),),
        "rows.jsonl:7",
        {"instrument": "bell", "pitch": 3},
    )


def test_tags_stay_where_they_are_written() -> None:
    turns = [{"role": "user", "content": f"One: {AUDIO_TAG} two: {AUDIO_TAG}?"}, TURNS[1]]
    row = parse(messages=turns, audios=["a.flac", {"path": "/abs/b.flac", "start": 2}])
    assert row.messages[0].content == turns[0]["content"]
    assert row.audios == (AudioRef(HERE / "a.flac"), AudioRef(Path("/abs/b.flac"), 2.0, None))


def test_several_sounds_without_tags_come_first_in_order() -> None:
    assert parse(audios=["a", "b", "c"]).messages[0].content == AUDIO_TAG * 3 + "What is heard?"


def test_tags_may_be_spread_over_turns() -> None:
    turns = [
        {"role": "user", "content": f"{AUDIO_TAG} what?"},
        TURNS[1],
        {"role": "user", "content": f"and {AUDIO_TAG}?"},
        TURNS[1],
    ]
    assert len(parse(messages=turns, audios=["a", "b"]).audios) == 2


def test_a_row_of_text_alone_has_no_sound() -> None:
    row = parse()
    assert row.audios == ()
    assert AUDIO_TAG not in row.messages[0].content


@pytest.mark.parametrize(
    ("given_id", "found"), [("x", "x"), (0, "0"), (None, "line 7"), ("", "line 7"), ("\ud800", "'\\ud800'")]
)
def test_the_id_is_text_or_the_line(given_id: Any, found: str) -> None:
    row = parse(id=given_id)
    assert row.id == found
    row.id.encode()  # it must survive being written to a log
    assert "id" not in row.labels


def test_a_failure_names_file_line_and_row() -> None:
    assert str(parse(id="bell-1").fail("is too loud")) == "rows.jsonl:7 (row bell-1): is too loud"


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


WRONG_ROWS = {
    "list": ([], "a row must be an object with 'messages'"),
    "null": (None, "a row must be an object with 'messages'"),
    "nothing": ({}, "'messages' must be a non-empty list"),
    "no turns": ({"messages": []}, "'messages' must be a non-empty list"),
    "text for turns": ({"messages": "hello"}, "'messages' must be a non-empty list"),
    "turn is text": ({"messages": ["hello"]}, "messages[0].role is None; expected one of system, user, assistant"),
    "role": (turns(("usr", "a")), "messages[0].role is 'usr'; expected one of system, user, assistant"),
    "role is a list": (turns((["user"], "a")), "messages[0].role is ['user']"),
    "content": (turns(("user", "a"), ("assistant", 3)), "messages[1].content must be text, found int"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content must be text, found NoneType"),
    "half a character": (turns(("user", "\ud83d")), "messages[0].content holds half a surrogate pair"),
    "tag of the assistant": (turns(("user", "a"), ("assistant", AUDIO_TAG)), "messages[1]: <audio> may stand in user"),
    "no user": (turns(("system", "a"), ("assistant", "b")), "'messages' needs a user turn"),
    "user twice": (turns(("user", "a"), ("user", "b")), "messages[0] and messages[1] are both from the user"),
    "tag without sound": (turns(("user", AUDIO_TAG)), "1 <audio> tags in the messages but 0 sounds"),
    "too few tags": (
        {**turns(("user", AUDIO_TAG)), "audios": ["a", "b"]},
        "1 <audio> tags in the messages but 2 sounds",
    ),
    "both keys": ({"audio": "a", "audios": ["b"]}, "give either 'audio' or 'audios', not both"),
    "audio object": ({"audio": {"path": "a"}}, "'audio' must be a path, found dict"),
    "audio number": ({"audio": 3}, "'audio' must be a path, found int"),
    "audio empty": ({"audio": ""}, "'audio' must be a path"),
    "audios text": ({"audios": "a"}, "'audios' must be a list"),
    "audios entry": ({"audios": ["a", 3]}, "'audios[1]' must be a path, or an object with 'path'"),
    "audios entry without path": ({"audios": [{"start": 3}]}, "'audios[0]' must be a path, or an object with 'path'"),
    "unknown key of a sound": ({"audios": [{"path": "a", "strat": 1}]}, "'audios[0]' has unknown keys 'strat'"),
    "NUL": ({"audio": "a\0b"}, "'audio' is no file name: 'a\\x00b'"),
    "surrogate in a name": ({"audio": "\ud800"}, "'audio' is no file name: '\\ud800'"),
    "start beside audios": ({"audios": ["a"], "start": 1}, "'start' and 'end' go with 'audio'"),
    "end without sound": ({"end": 1}, "'start' and 'end' go with 'audio'"),
    "start is text": ({"audio": "a", "start": "1"}, "'start' of audio must be seconds, found '1'"),
    "start is true": ({"audio": "a", "start": True}, "'start' of audio must be seconds, found True"),
    "start is negative": ({"audio": "a", "start": -0.1}, "'start' of audio is -0.1; seconds must be finite"),
    "end is infinite": ({"audio": "a", "end": float("inf")}, "'end' of audio is inf; seconds must be finite"),
    "end is NaN": ({"audio": "a", "end": float("nan")}, "'end' of audio is nan; seconds must be finite"),
    "start is huge": ({"audio": "a", "start": 10**400}, "'start' of audio is 1000"),
    "end before start": ({"audio": "a", "start": 2, "end": 1}, "'end' of audio (1.0 s) is not after its 'start' (2.0"),
    "end at start": ({"audio": "a", "end": 0}, "'end' of audio (0.0 s) is not after its 'start'"),
    "time in a list": (
        {"audios": ["a", {"path": "b", "start": 3, "end": 2}]},
        "'end' of audios[1] (2.0 s) is not after its 'start' (3.0 s)",
    ),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_names_its_place_and_field(case: str) -> None:
    data, said = WRONG_ROWS[case]
    if isinstance(data, dict) and data and "messages" not in data:
        data = {"messages": TURNS, **data}
    with pytest.raises(DataError) as caught:
        parse_row(data, "rows.jsonl:7", HERE)
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert said in str(caught.value)
    str(caught.value).encode()  # a message must survive being printed


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
near_turns = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]) | json_values,
            "content": st.sampled_from(["a", AUDIO_TAG, AUDIO_TAG * 2, "\ud800"]) | json_values,
        }
    )
    | json_values,
    max_size=4,
)
near_rows = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.just(TURNS) | near_turns | json_values,
        "audio": st.sampled_from(["a.wav", "", "\0", None]) | json_values,
        "audios": st.lists(
            st.just("a.wav")
            | st.fixed_dictionaries(
                {"path": st.just("b.wav") | json_values, "start": st.none() | st.floats() | json_values}
            )
            | json_values,
            max_size=3,
        )
        | json_values,
        "start": st.floats(0, 5) | json_values,
        "end": st.floats(1, 9) | json_values,
        "id": json_values,
        "label": json_values,
    },
)


@settings(max_examples=300, deadline=None)
@given(near_rows | json_values)
def test_any_json_is_a_row_or_a_data_error(data: Any) -> None:
    try:
        row = parse_row(data, "rows.jsonl:7", HERE)
    except DataError as error:
        said = str(error)
        said.encode()
    else:
        said = ""
        assert sum(m.content.count(AUDIO_TAG) for m in row.messages) == len(row.audios)
        assert all(m.role in ("system", "user", "assistant") and isinstance(m.content, str) for m in row.messages)
        assert all((a.end or 1e9) > (a.start or 0.0) >= 0 for a in row.audios)
        f"{row.id}{''.join(m.content for m in row.messages)}".encode()
    assert said == "" or said.startswith("rows.jsonl:7: ")


# The file


def test_blank_lines_are_no_rows_and_keep_the_line_numbers(tmp_path: Path) -> None:
    rows = manifest(tmp_path, "\n" + line(id="a") + "\n \t\n\r\n" + line(id="b").rstrip("\n"))
    assert [row.id for row in rows] == ["a", "b"]
    assert len(rows) == 2
    assert [rows.where(i) for i in (0, 1)] == [f"{tmp_path}/rows.jsonl:2", f"{tmp_path}/rows.jsonl:6"]
    assert rows[1].where == f"{tmp_path}/rows.jsonl:6"


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    assert manifest(tmp_path, line(audio="sub/a.wav"))[0].audios[0].path == tmp_path / "sub/a.wav"


def test_windows_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    rows = manifest(tmp_path, ("\ufeff" + (line(id="a") + line(id="ä")).replace("\n", "\r\n")).encode())
    assert [row.id for row in rows] == ["a", "ä"]


def test_slices_negative_indices_and_the_end(tmp_path: Path) -> None:
    rows = manifest(tmp_path, "".join(line(id=f"r{i}") for i in range(5)))
    assert [row.id for row in rows[1:4:2]] == ["r1", "r3"]
    assert rows[-1].id == "r4"
    assert rows[9:] == []
    for index in (5, -6):
        with pytest.raises(IndexError):
            rows[index]


def test_rows_are_the_same_after_travelling_to_a_worker(tmp_path: Path) -> None:
    rows = manifest(tmp_path, "".join(line(id=f"r{i}") for i in range(1000)))
    travelling = pickle.dumps(rows)
    assert len(travelling) < 500  # the path, not the content
    assert list(pickle.loads(travelling)) == list(rows)


def test_of_a_wrong_line_the_column_is_said_and_no_second_line(tmp_path: Path) -> None:
    rows = manifest(tmp_path, line(id="a") + '{"audio": "a.wav", "messages": [')
    with pytest.raises(DataError, match=r"jsonl:2: not valid JSON: Expecting value: column 33 \(char 32\)$"):
        rows.row(1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b'{"messages": [', "not valid JSON: "),
        (b"hello", "not valid JSON: "),
        (b'{"a": "\xff"}', "not valid JSON: "),
        (b"[" * 100_000, "not valid JSON: "),
        (b"9" * 5000, "not valid JSON: "),
        (b"5", ""),
        (b"{}", "'messages' must be a non-empty list"),
    ],
)
def test_a_wrong_line_is_named_and_its_neighbours_are_read(tmp_path: Path, wrong: bytes, said: str) -> None:
    rows = manifest(tmp_path, line(id="a").encode() + b"\n" + wrong + b"\n" + line(id="c").encode())
    assert len(rows) == 3
    assert (rows[0].id, rows[2].id) == ("a", "c")
    with pytest.raises(DataError) as caught:
        rows[1]
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:3: {said}")


def test_files_without_rows(tmp_path: Path) -> None:
    for content, said in (("", "the file is empty"), ("\n\n  \n", "the file holds no row")):
        with pytest.raises(DataError, match=f"rows.jsonl: {said}"):
            manifest(tmp_path, content)
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        JsonlRows(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        JsonlRows(tmp_path)


def test_a_conversation_must_start_with_the_user() -> None:
    turns = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "hi?"}]
    with pytest.raises(DataError, match="must start with the user"):
        parse_row({"messages": turns}, "a.jsonl:1", Path())


@pytest.mark.parametrize(
    ("audio", "inside"),
    [
        ("a.wav", True),
        ("sub/../a.wav", True),
        ("link-within.wav", True),
        ("theirs.tar#512+100", True),
        ("rows.parquet#audio[3]", True),
        ("../mine.wav", False),
        ("link-out.wav", False),
        ("out/mine.wav", False),  # through a folder that is a link
        ("out/rows.parquet#audio[3]", False),
        ("out/mine.tar#512+100", False),
    ],
)
def test_sounds_outside_the_folders_that_were_allowed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audio: str, inside: bool
) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for folder in (theirs / "sub", mine):
        folder.mkdir(parents=True)
    (theirs / "link-within.wav").symlink_to("a.wav")
    (theirs / "link-out.wav").symlink_to(mine / "mine.wav")
    (theirs / "out").symlink_to(mine)
    row = {"messages": TURNS, "audio": audio}
    assert len(parse_row(row, "rows.jsonl:7", theirs).audios) == 1  # without the variable, any place
    monkeypatch.setenv("COATKIT_AUDIO_ROOTS", f"{tmp_path}/none:{theirs}/:")
    if inside:
        assert len(parse_row(row, "rows.jsonl:7", theirs).audios) == 1
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl:7: 'audio' is outside COATKIT_AUDIO_ROOTS .*/mine"):
            parse_row(row, "rows.jsonl:7", theirs)


def test_absolute_paths_are_held_to_the_allowed_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_AUDIO_ROOTS", str(tmp_path))
    assert len(parse(audios=[f"{tmp_path}/a.wav", f"{tmp_path}/b/c.wav"]).audios) == 2
    with pytest.raises(DataError, match=r"'audios\[1\]' is outside .*: '/etc/passwd'; add its folder"):
        parse(audios=[f"{tmp_path}/a.wav", "/etc/passwd"])
