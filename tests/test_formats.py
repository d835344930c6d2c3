"""JSON rows in others' formats: what a row becomes, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatkit.data.formats.common import JsonRows
from coatkit.data.formats.lhotse import LhotseRows
from coatkit.data.formats.ms_swift import MsSwiftRows
from coatkit.data.formats.nemo import NemoRows
from coatkit.data.formats.sharegpt import SharegptRows
from coatkit.data.rows import AUDIO_TAG, AudioRef, Row, learning, parse_row
from coatkit.errors import DataError

HERE, WHERE = Path("/data"), "rows.jsonl:7"
TURNS = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "Rain."}]
SAID = [{"from": "human", "value": "<audio>What?"}, {"from": "gpt", "value": "Rain."}]
CUT = {
    "id": "c",
    "start": 1.0,
    "duration": 2.5,
    "channel": 0,
    "supervisions": [{"start": 0.0, "duration": 2.5, "text": "hello", "language": "en"}],
    "recording": {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}]},
    "type": "MonoCut",
}
FORMATS: dict[str, type[JsonRows]] = {
    "ms-swift": MsSwiftRows,
    "sharegpt": SharegptRows,
    "nemo": NemoRows,
    "lhotse": LhotseRows,
}
GOOD: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": TURNS, "audios": ["a.wav"]},
    "sharegpt": {"conversations": SAID, "audios": ["a.wav"]},
    "nemo": {"audio_filepath": "a.wav", "duration": 2.5, "offset": 1.0, "text": "hello"},
    "lhotse": CUT,
}


def parse(format: str, asked: str = "Transcribe the speech.", **row: Any) -> Row:
    return FORMATS[format].parse({**GOOD[format], **row}, WHERE, HERE, asked)


def said(row: Row) -> list[tuple[str, str]]:
    return [(message.role[0], message.content) for message in row.messages]


# What a row becomes


def test_ms_swift_messages() -> None:
    row = parse("ms-swift", id="x", system="Be brief.", solution="rain", locale="en")
    assert said(row) == [("s", "Be brief."), ("u", "<audio>What?"), ("a", "Rain.")]
    assert row.audios == (AudioRef(HERE / "a.wav"),)
    assert (row.id, row.where, row.labels) == ("x", WHERE, {"solution": "rain", "locale": "en", "language": "en"})


@pytest.mark.parametrize(("loss", "learn"), [(None, True), (True, True), (False, False), (0, False), (1, True)])
def test_ms_swift_says_which_answers_are_learnt(loss: Any, learn: bool) -> None:
    turns = [*TURNS, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", "loss": loss}]
    assert [m.learn for m in parse("ms-swift", messages=turns).messages] == [True, True, True, learn]


def test_ms_swift_query_response_history() -> None:
    data = {"query": "And <audio>?", "response": "Dog.", "history": [["<audio>?", "Rain."]], "audios": ["a", "b"]}
    row = MsSwiftRows.parse(data, WHERE, HERE, "")
    assert said(row) == [("u", "<audio>?"), ("a", "Rain."), ("u", "And <audio>?"), ("a", "Dog.")]
    assert len(row.audios) == 2


def test_sharegpt_roles_and_system() -> None:
    turns = [
        *SAID,
        {"from": "observation", "value": "It is 5."},
        {"from": "function_call", "value": "{}"},
    ]
    row = parse("sharegpt", conversations=turns, system="Be brief.", tools="")
    assert said(row)[0] == ("s", "Be brief.")
    assert said(row)[3:] == [("u", "It is 5."), ("a", "{}")]


def test_sharegpt_as_openai_messages() -> None:
    row = SharegptRows.parse({"messages": TURNS, "audios": ["a.wav"]}, WHERE, HERE, "")
    assert said(row) == [("u", "<audio>What?"), ("a", "Rain.")]


def test_nemo() -> None:
    row = parse("nemo", lang="de", speaker=3)
    assert said(row) == [("u", "<audio>Transcribe the speech."), ("a", "hello")]
    assert row.audios == (AudioRef(HERE / "a.wav", 1.0, 3.5),)
    assert (row.labels["language"], row.labels["duration"], row.labels["speaker"]) == ("de", 2.5, 3)


@pytest.mark.parametrize("asks", ["question", "context"])
def test_nemo_questions(asks: str) -> None:
    row = parse("nemo", **{asks: "Who?", "answer": "She.", "offset": None})
    assert said(row) == [("u", "<audio>Who?"), ("a", "She.")]
    assert row.audios == (AudioRef(HERE / "a.wav", None, 2.5),)


def test_lhotse() -> None:
    row = parse("lhotse", "What is said?", custom={"emotion": "calm"})
    assert said(row) == [("u", "<audio>What is said?"), ("a", "hello")]
    assert row.audios == (AudioRef(HERE / "a.wav", 1.0, 3.5),)
    assert row.labels == {"emotion": "calm", "duration": 2.5, "language": "en"}


def test_learning_all_or_the_last() -> None:
    turns = [*TURNS, {"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]
    row = parse("ms-swift", messages=turns)
    assert learning(row, "all") is row
    assert [m.learn for m in learning(row, "last").messages if m.role == "assistant"] == [False, True]
    off = parse("ms-swift", messages=[*turns[:3], {**turns[3], "loss": False}])
    assert [m.learn for m in learning(off, "all").messages if m.role == "assistant"] == [True, False]
    with pytest.raises(DataError, match=r"rows\.jsonl:7 .*: the row keeps the loss off its last answer"):
        learning(off, "last")
    with pytest.raises(DataError, match="the row keeps the loss off every answer"):
        learning(parse("ms-swift", messages=[TURNS[0], {**TURNS[1], "loss": False}]), "all")


def test_our_own_rows_say_it_with_learn() -> None:
    row = parse_row({"messages": [TURNS[0], {**TURNS[1], "learn": False}], "audio": "a"}, WHERE, HERE)
    assert [m.learn for m in row.messages] == [True, False]
    with pytest.raises(DataError, match=r"messages\[1\]\.learn must be true or false, found 'no'"):
        parse_row({"messages": [TURNS[0], {**TURNS[1], "learn": "no"}], "audio": "a"}, WHERE, HERE)
    with pytest.raises(DataError, match=r"messages\[1\]\.loss is a key of ms-swift"):
        parse_row({"messages": [TURNS[0], {**TURNS[1], "loss": False}], "audio": "a"}, WHERE, HERE)


# What is refused


def recording(**change: Any) -> dict[str, Any]:
    return {"recording": {**CUT["recording"], **change}}  # type: ignore[dict-item]


def source(**change: Any) -> dict[str, Any]:
    return recording(sources=[{"type": "file", "channels": [0], "source": "a.wav", **change}])


def supervised(**change: Any) -> dict[str, Any]:
    return {"supervisions": [{"start": 0.0, "duration": 2.5, "text": "hello", **change}]}


WRONG = [
    ("ms-swift", {"messages": None}, "'messages' must be a non-empty list of {role, content}"),
    (
        "ms-swift",
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0].role is 'tool'; expected one of system,",
    ),
    ("ms-swift", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text, found int"),
    ("ms-swift", {"messages": [TURNS[0], {**TURNS[1], "loss": 0.5}]}, "messages[1].loss must be true or false"),
    ("ms-swift", {"audios": []}, "1 <audio> tags in the messages but 0 sounds"),
    ("ms-swift", {"audios": ["a", "b"]}, "1 <audio> tags in the messages but 2 sounds"),
    ("ms-swift", {"audios": "a.wav"}, "'audios' must be a list"),
    (
        "ms-swift",
        {"audios": ["https://a.org/a.wav"]},
        "'audios[0]' is an address, 'https://a.org/a.wav'; fetch it first",
    ),
    ("ms-swift", {"images": ["a.png"]}, "'images' cannot be used"),
    ("ms-swift", {"tools": "[{}]"}, "'tools' cannot be used"),
    ("ms-swift", {"system": 3}, "'system' must be text, found int"),
    ("sharegpt", {"conversations": []}, "'conversations' must be a non-empty list of {from, value}"),
    ("sharegpt", {"conversations": ["a"]}, "conversations[0].from is None; expected one of human, gpt, system,"),
    ("sharegpt", {"conversations": [{"from": ["human"], "value": "a"}]}, "conversations[0].from is ['human']"),
    ("sharegpt", {"conversations": [SAID[0], {"from": "gpt"}]}, "conversations[1].value must be text, found NoneType"),
    ("sharegpt", {"conversations": [SAID[1]]}, "'conversations' needs a user turn"),
    (
        "sharegpt",
        {"conversations": [*SAID, SAID[1]]},
        "conversations[1] and conversations[2] are both from the assistant",
    ),
    (
        "sharegpt",
        {"conversations": [SAID[0], {"from": "gpt", "value": "<audio>"}]},
        "conversations[1]: <audio> may stand",
    ),
    ("sharegpt", {"videos": ["a.mp4"]}, "'videos' cannot be used"),
    ("sharegpt", {"audios": [{"bytes": "x"}]}, "'audios[0]' must be a path, or an object with 'path'"),
    ("nemo", {"audio_filepath": None}, "'audio_filepath' must be a path, found NoneType"),
    ("nemo", {"audio_filepath": ["a.wav"]}, "'audio_filepath' must be a path, found list"),
    ("nemo", {"audio_filepath": ""}, "'audio_filepath' is no file name"),
    ("nemo", {"audio_filepath": "s3://b/a.wav"}, "'audio_filepath' is an address"),
    ("nemo", {"duration": "2.5"}, "'duration' must be seconds, found '2.5'"),
    ("nemo", {"duration": 0}, "'end' of audio_filepath (1.0 s) is not after its 'start' (1.0 s)"),
    ("nemo", {"offset": -1}, "'offset' must be seconds, found -1"),
    ("nemo", {"text": None}, "'text' must be text, found NoneType"),
    ("nemo", {"text": 3}, "'text' must be text, found int"),
    ("nemo", {"answer": ["a"]}, "'answer' must be text, found list"),
    ("nemo", {"question": 3}, "'question' must be text, found int"),
    ("nemo", {"text": "\ud800"}, "'text' holds half a surrogate pair"),
    ("lhotse", {"duration": None}, "'duration' is missing"),
    ("lhotse", {"start": "0"}, "'start' must be seconds, found '0'"),
    ("lhotse", {"recording": None}, "'recording' is missing: a cut of features alone"),
    ("lhotse", recording(sources=[]), "'recording.sources' must be a list of one"),
    ("lhotse", recording(sources=[{}, {}]), "'recording.sources' must be a list of one"),
    ("lhotse", source(type="command"), "recording.sources[0].type is 'command'"),
    ("lhotse", source(source=3), "recording.sources[0].source must be a path, found int"),
    ("lhotse", source(channels=[0, 1]), "'channel' is 0 of [0, 1]"),
    ("lhotse", source(channels=3), "'channel' is 0 of 3"),
    ("lhotse", recording(transforms=[{"name": "ReverbWithImpulseResponse"}]), "recording.transforms holds 'Reverb"),
    ("lhotse", recording(transforms=["x"]), "recording.transforms holds 'x'"),
    ("lhotse", recording(transforms=3), "'recording.transforms' must be a list"),
    ("lhotse", {"supervisions": "hello"}, "'supervisions' must be a list of objects"),
    ("lhotse", {"supervisions": []}, "'supervisions' holds no text"),
    ("lhotse", supervised(text=""), "'supervisions' holds no text"),
    ("lhotse", supervised(text=3), "supervisions[0].text must be text, found int"),
    ("lhotse", supervised(start="a"), "supervisions[0].start and .duration must be seconds"),
    ("lhotse", supervised(start=-1), "supervisions[0] is from -1 to 1.5 s, outside the cut's 2.5 s"),
    ("lhotse", supervised(duration=9), "supervisions[0] is from 0 to 9 s, outside the cut's 2.5 s"),
    ("lhotse", {"custom": [1]}, "'custom' must be an object"),
    ("lhotse", {"custom": {"answer": 5}}, "'custom.answer' must be text, found int"),
    ("lhotse", {"tracks": [], "type": "MixedCut"}, "'type' is MixedCut or PaddingCut"),
]


@pytest.mark.parametrize(("format", "change", "reason"), WRONG, ids=[f"{f}-{r[:30]}" for f, _, r in WRONG])
def test_a_wrong_row_names_its_place_and_field(format: str, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(format, **change)
    assert str(caught.value).startswith(f"{WHERE}: {reason}")
    str(caught.value).encode()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("data", [None, 3, "a", [], {}, [{}]])
def test_what_is_no_row_is_told_what_a_row_needs(format: str, data: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*(must be|needs|is missing)"):
        FORMATS[format].parse(data, WHERE, HERE, "?")


@pytest.mark.parametrize(
    "change", [{"history": "a"}, {"history": [["a"]]}, {"history": [["a", 1]]}, {"query": 3}, {"response": None}]
)
def test_wrong_queries_name_the_field(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:7: '?{next(iter(change))}"):
        MsSwiftRows.parse({"query": "a", "response": "b", **change}, WHERE, HERE, "")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", AUDIO_TAG, "\ud800", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["from", "value", "role", "content", "type", "source", "sources", "text", "start", "duration", "path"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
@pytest.mark.parametrize("format", ["coatkit", *FORMATS])
def test_any_json_is_a_row_or_a_data_error(format: str, data: st.DataObject) -> None:
    """A good row with some of its values replaced, at any depth."""
    good = GOOD.get(format, {"messages": TURNS, "audio": "a.wav", "start": 0.5})

    def spoil(value: Any) -> Any:
        if data.draw(st.integers(0, 5)) == 0:
            return data.draw(values)
        if isinstance(value, dict):
            return {key: spoil(one) for key, one in value.items() if data.draw(st.integers(0, 9))}
        return [spoil(one) for one in value] if isinstance(value, list) else value

    spoilt = spoil(good)
    try:
        if format == "coatkit":
            row = parse_row(spoilt, WHERE, HERE)
        else:
            row = FORMATS[format].parse(spoilt, WHERE, HERE, "?")
    except DataError as error:
        said = str(error)
        said.encode()
    else:
        said = f"{WHERE}: "
        assert sum(m.content.count(AUDIO_TAG) for m in row.messages) == len(row.audios)
        assert all((a.end or 1e9) > (a.start or 0.0) >= 0 for a in row.audios)
        f"{row.id}{''.join(m.content for m in row.messages)}".encode()
    assert said.startswith(f"{WHERE}: ")
