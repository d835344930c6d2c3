"""Mixtures: what is drawn, that the same is drawn again, and that the file gives back the rows of its sources."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coatkit.data import mixture
from coatkit.data.mixture import MixtureRows, materialise, mix, to_data
from coatkit.data.readers import open_rows
from coatkit.data.rows import AudioRef, JsonlRows, Message, Row, parse_row
from coatkit.data.sources import open_data
from coatkit.errors import DataError
from coatkit.spec_data import MixtureSpec


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def line(name: str, i: int, **more: Any) -> dict[str, Any]:
    return {"id": f"{name}{i}", "messages": talk(f"{name}?", str(i)), "audio": f"clips/{name}{i}.flac", **more}


def source(folder: Path, name: str, count: int, **more: Any) -> str:
    """A manifest of `count` rows; a value that is a function is called with the row's number."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    rows = [line(name, i, **{k: v(i) if callable(v) else v for k, v in more.items()}) for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec_of(categories: dict[str, Any], rows: int, **more: Any) -> MixtureSpec:
    return MixtureSpec.model_validate({"rows": rows, "seed": 3, "categories": categories, **more})


@pytest.fixture
def three(tmp_path: Path) -> Callable[..., MixtureSpec]:
    """A mixture of two categories over three sources of 10, 30 and 5 rows."""

    def make(rows: int = 40, **more: Any) -> MixtureSpec:
        folder = tmp_path / "data"
        categories = {
            "speech": {"share": 3, "sources": [source(folder, "a", 10), source(folder, "b", 30)]},
            "text": {"share": 1, "sources": [source(folder, "c", 5)]},
        }
        return spec_of(categories, rows, **more)

    return make


def counts(rows: MixtureRows) -> Counter[str]:
    return Counter(row.id for row in rows)


# What is drawn


def slow_mixture(spec: MixtureSpec, pools: dict[str, list[int]]) -> dict[str, list[int]]:
    """Rows of each source, worked out one row at a time: each next row goes to whoever is furthest behind its share.

    Only for mixtures where shares and pools divide without rest, so that there is one right answer.
    """
    found = {name: [0] * len(sizes) for name, sizes in pools.items()}
    whole = sum(category.share for category in spec.categories.values())

    def lacking(name: str) -> float:
        return spec.categories[name].share / whole - sum(found[name]) / spec.rows

    for _ in range(spec.rows):
        name = max(found, key=lacking)
        by_rows = (spec.categories[name].draw or spec.draw) == "rows"
        weights = pools[name] if by_rows else [1] * len(pools[name])
        i = min(range(len(weights)), key=lambda i: Fraction(found[name][i] + 1, weights[i]))
        found[name][i] += 1
    return found


@pytest.mark.parametrize("draw", ["rows", "sources"])
@pytest.mark.parametrize("max_epochs", [None, 2])
def test_numbers_are_those_of_a_slow_reference(tmp_path: Path, draw: str, max_epochs: float | None) -> None:
    pools = {"speech": [10, 30], "music": [20, 20, 40], "text": [4]}
    categories = {
        name: {"share": share, "sources": [source(tmp_path, f"{name}{i}-", n) for i, n in enumerate(pools[name])]}
        for name, share in (("speech", 0.25), ("music", 0.5), ("text", 0.25))
    }
    spec = spec_of(categories, 48 if draw == "sources" else 160, draw=draw, max_epochs=max_epochs, overflow="shrink")
    slow = slow_mixture(spec, pools)
    found = Counter(row.id.partition("-")[0] for row in MixtureRows(materialise(spec)))
    for name, rows in slow.items():
        for i, wanted in enumerate(rows):
            cap = max_epochs * pools[name][i] if max_epochs else wanted
            assert found[f"{name}{i}"] == min(wanted, cap)


def test_the_rest_a_cap_leaves_goes_to_the_others(tmp_path: Path) -> None:
    categories = {
        "many": {"share": 1, "sources": [source(tmp_path, "m", 50)]},
        "few": {"share": 1, "sources": [source(tmp_path, "f", 4)], "max_epochs": 2.5},
        "more": {"share": 2, "sources": [source(tmp_path, "n", 50)]},
    }
    made = mix(spec_of(categories, 100))
    assert [c["requested"] for c in made.data["categories"]] == [25, 25, 50]
    assert [c["actual"] for c in made.data["categories"]] == [30, 10, 60]
    assert [c["repeats"] for c in made.data["categories"]] == [[0, 1], [2, 3], [1, 2]]
    assert [c["epochs"] for c in made.data["categories"]] == [0.6, 2.5, 1.2]
    shrunk = mix(spec_of(categories, 100, overflow="shrink"))
    assert [c["actual"] for c in shrunk.data["categories"]] == [25, 10, 50]
    assert (shrunk.data["rows"], shrunk.data["requested"], len(MixtureRows(shrunk.path))) == (85, 100, 85)
    with pytest.raises(DataError, match=r"overflow is refuse:\n  few: .*f\.jsonl: 25 rows asked for, 10 allowed"):
        mix(spec_of(categories, 100, overflow="refuse"))
    assert mix(spec_of(categories, 40, overflow="refuse")).data["rows"] == 40


def test_a_cap_on_each_source_where_sources_are_drawn_alike(tmp_path: Path) -> None:
    sources = [source(tmp_path, "a", 3), source(tmp_path, "b", 40)]
    categories = {"speech": {"share": 1, "sources": sources, "draw": "sources", "max_epochs": 1}}
    made = mix(spec_of(categories, 20)).data["categories"][0]
    assert [s["requested"] for s in made["sources"]] == [10, 10]
    assert [s["actual"] for s in made["sources"]] == [3, 17]
    shrunk = mix(spec_of(categories, 20, overflow="shrink")).data["categories"][0]
    assert [s["actual"] for s in shrunk["sources"]] == [3, 10]
    with pytest.raises(DataError, match=r"speech: .*a\.jsonl: 10 rows asked for, 3 allowed"):
        mix(spec_of(categories, 20, overflow="refuse"))


def test_caps_that_allow_too_few_rows_say_what_would_fit(tmp_path: Path) -> None:
    categories = {"a": {"share": 1, "sources": [source(tmp_path, "a", 3)]}}
    with pytest.raises(DataError, match=r"10 rows are asked for, but max_epochs allows 6 in all categories together"):
        mix(spec_of(categories, 10, max_epochs=2))
    with pytest.raises(DataError, match="max_epochs allows no row at all"):
        mix(spec_of(categories, 10, max_epochs=0.3, overflow="shrink"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pools=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=3),
    shares=st.lists(st.sampled_from([0.1, 0.25, 1, 3]), min_size=3, max_size=3),
    rows=st.integers(1, 60),
    draw=st.sampled_from(["rows", "sources"]),
    max_epochs=st.sampled_from([None, 0.5, 1, 2.5]),
    overflow=st.sampled_from(["redistribute", "shrink", "refuse"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_holds_of_any_mixture(tmp_path: Path, pools: list[list[int]], shares: list[float], **more: Any) -> None:
    names = {(c, i): source(tmp_path, f"{c}.{i}-", n) for c, sizes in enumerate(pools) for i, n in enumerate(sizes)}
    categories = {
        f"c{c}": {"share": shares[c], "sources": [names[c, i] for i in range(len(sizes))]}
        for c, sizes in enumerate(pools)
    }
    spec = MixtureSpec.model_validate({**more, "categories": categories})
    try:
        made = mix(spec)
    except DataError as error:
        if spec.max_epochs is None or "max_epochs" not in str(error):
            raise  # without caps anything can be drawn
        return
    rows = MixtureRows(made.path)
    drawn = Counter((row.labels["category"], row.labels["source"], row.id) for row in rows)
    assert sum(drawn.values()) == len(rows) == made.data["rows"]
    assert len(rows) == spec.rows if spec.overflow != "shrink" else len(rows) <= spec.rows
    for c, (category, sizes) in enumerate(zip(made.data["categories"], pools, strict=True)):
        for i, (entry, size) in enumerate(zip(category["sources"], sizes, strict=True)):
            times = [drawn[f"c{c}", names[c, i], f"{c}.{i}-{n}"] for n in range(size)]
            assert sum(times) == entry["actual"]
            assert [min(times), max(times)] == entry["repeats"]
            assert max(times) - min(times) <= 1
            if spec.max_epochs is not None and spec.draw == "sources":
                assert entry["actual"] <= spec.max_epochs * size
        if spec.max_epochs is not None:
            assert category["actual"] <= spec.max_epochs * sum(sizes)
        if spec.draw == "rows":  # one pool: every row of the category comes as often, to one
            times = [drawn[f"c{c}", names[c, i], f"{c}.{i}-{n}"] for i, size in enumerate(sizes) for n in range(size)]
            assert max(times) - min(times) <= 1


# The same again


def test_the_same_bytes_from_the_same_inputs(
    three: Callable[..., MixtureSpec], tmp_path: Path, monkeypatch: Any
) -> None:
    first = materialise(three())
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "another"))
    second = materialise(three())
    assert first != second
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_bytes() == second.with_suffix(".json").read_bytes()


def test_a_seed_changes_which_rows_and_their_order_but_not_how_many(three: Callable[..., MixtureSpec]) -> None:
    one, two = mix(three()), mix(three(seed=4))
    rows, others = MixtureRows(one.path), MixtureRows(two.path)
    assert counts(rows) != counts(others)
    assert [row.id for row in rows] != [row.id for row in others]
    assert one.data["categories"] == two.data["categories"]
    assert rows.fingerprint() != others.fingerprint()


def test_the_order_is_shuffled(three: Callable[..., MixtureSpec]) -> None:
    categories = [row.labels["category"] for row in MixtureRows(materialise(three(100)))]
    runs = 1 + sum(a != b for a, b in pairwise(categories))
    assert 20 < runs < 60  # 2 when one follows the other; 38.5 on average when shuffled


def test_the_same_rows_are_drawn_whatever_else_is_in_the_mixture(
    three: Callable[..., MixtureSpec], tmp_path: Path
) -> None:
    spec = three(40)
    alone = spec.model_copy(update={"rows": 30, "categories": {"speech": spec.categories["speech"]}})
    both = [row.id for row in MixtureRows(materialise(spec)) if row.labels["category"] == "speech"]
    assert Counter(both) == counts(MixtureRows(materialise(alone)))


def test_categories_that_share_a_source_draw_from_it_on_their_own(tmp_path: Path) -> None:
    path = source(tmp_path, "a", 40)
    rows = MixtureRows(materialise(spec_of({n: {"share": 1, "sources": [path]} for n in ("one", "two")}, 40)))
    one, two = ({row.id for row in rows if row.labels["category"] == name} for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert one != two


def test_made_once_and_used_again_until_an_input_changes(three: Callable[..., MixtureSpec], tmp_path: Path) -> None:
    first, again = mix(three()), mix(three())
    assert (first.made, again.made) == (True, False)
    assert (first.path, first.data) == (again.path, again.data)
    told = json.loads(first.path.with_suffix(".json").read_text())
    assert len(told.pop("sidecar_sha256")) == 64
    assert told == first.data
    spec = three()
    (tmp_path / "data/c.jsonl").write_text(json.dumps(line("z", 1)) + "\n")
    changed = mix(spec)
    assert changed.made
    assert changed.path != first.path
    assert first.path.exists()
    assert "z1" in counts(MixtureRows(changed.path))


@pytest.mark.parametrize(
    "harm", ["no sidecar", "another sidecar", "a key gone", "no mapping", "cut off", "gone", "empty"]
)
def test_what_is_not_whole_is_made_anew(three: Callable[..., MixtureSpec], harm: str) -> None:
    first = mix(three())
    before, sidecar = first.path.read_bytes(), first.path.with_suffix(".json")
    if harm == "no sidecar":
        sidecar.unlink()
    elif harm == "another sidecar":
        sidecar.write_text(json.dumps({**first.data, "content_sha256": "0" * 64}))
    elif harm == "a key gone":
        told = json.loads(sidecar.read_text())
        del told["bad_rows"]
        sidecar.write_text(json.dumps(told))
    elif harm == "no mapping":
        sidecar.write_text('["hash"]')
    elif harm == "cut off":
        first.path.write_bytes(before[:-20])
    elif harm == "gone":
        first.path.unlink()
    else:
        first.path.write_bytes(b"")
    again = mix(three())
    assert again.made
    assert again.path.read_bytes() == before


def test_what_a_killed_process_left_is_removed(three: Callable[..., MixtureSpec]) -> None:
    path = materialise(three())
    left = path.with_name(f".{path.name}.12345.partial")
    left.write_bytes(b"half")
    path.unlink()
    materialise(three())
    assert not left.exists()


def test_two_processes_make_it_once(three: Callable[..., MixtureSpec], tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(three(2000).model_dump_json())
    code = (
        "import sys; from coatkit.data.mixture import mix; from coatkit.spec_data import MixtureSpec\n"
        f"made = mix(MixtureSpec.model_validate_json(open({str(spec)!r}).read()))\n"
        "print(made.made, made.path.stat().st_size)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [run.communicate(timeout=120)[0].split() for run in runs]
    assert sorted(made for made, _ in said) == ["False", "False", "True"]
    assert len({size for _, size in said}) == 1


# The file


def test_rows_are_those_of_the_sources(three: Callable[..., MixtureSpec], tmp_path: Path) -> None:
    rows = open_data(three(60))
    assert isinstance(rows, MixtureRows)
    originals = {row.id: row for name in "abc" for row in JsonlRows(tmp_path / f"data/{name}.jsonl")}
    for i, row in enumerate(rows):
        original = originals[row.id]
        assert (row.messages, row.audios) == (original.messages, original.audios)
        assert row.labels == {
            "category": "text" if row.id.startswith("c") else "speech",
            "source": str(tmp_path / f"data/{row.id[0]}.jsonl"),
        }
        assert row.where == rows.where(i) == f"{rows.path} row {i + 1}, {original.where}"


def test_a_rows_own_source_stays_and_its_category_is_the_mixtures(tmp_path: Path) -> None:
    path = source(tmp_path, "a", 3, source="a radio", category="x")
    (row,) = MixtureRows(materialise(spec_of({"speech": {"share": 1, "sources": [path]}}, 1)))
    assert row.labels == {"source": "a radio", "category": "speech"}


def test_a_bad_line_passes_through_and_is_named_by_its_own_line(tmp_path: Path) -> None:
    good = {key: value for key, value in line("a", 1).items() if key != "id"}
    bad = [b'{"id": "cut', b'{"id": "x", "messages": []}', b'\xff\xfe{"id": 1}', b"[" * 5000]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n".join([*bad, json.dumps(good).encode()]) + b"\n")  # blank lines are no rows
    rows = MixtureRows(materialise(spec_of({"c": {"share": 1, "sources": [str(path)]}}, 5)))
    said = {}
    for i in range(len(rows)):
        try:
            said[rows[i].id] = ""
        except DataError as error:
            said[rows.where(i).rpartition(":")[2]] = str(error)
    assert said.pop("line 9") == ""  # a row without an id is named by its line, as in its source
    assert set(said) == {"1", "3", "5", "7"}
    for number, error in said.items():
        assert f"{path}:{number}: " in error
    assert "not valid JSON" in said["1"]
    assert "'messages' must be a non-empty list" in said["3"]


def test_more_rows_than_a_group_and_any_order(tmp_path: Path) -> None:
    count = 2 * mixture._GROUP + 17
    categories = {"c": {"share": 1, "sources": [source(tmp_path, "a", count)]}}
    rows = MixtureRows(materialise(spec_of(categories, count)))
    assert pq.ParquetFile(rows.path).metadata.num_row_groups == 3
    forward = [row.id for row in rows]
    assert sorted(forward) == sorted(f"a{i}" for i in range(count))
    some = [count - 1, 0, mixture._GROUP, mixture._GROUP - 1, 2 * mixture._GROUP, 5]
    assert [rows[i].id for i in some] == [forward[i] for i in some]
    assert rows[-1].id == forward[-1]
    assert [row.id for row in rows[3:6]] == forward[3:6]
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            rows[i]


def test_workers_read_it_pickled_or_forked(three: Callable[..., MixtureSpec]) -> None:
    rows = MixtureRows(materialise(three()))
    wanted = [row.id for row in rows]
    copy = pickle.loads(pickle.dumps(rows))
    assert [row.id for row in copy] == wanted
    assert len(pickle.dumps(rows)) < 1000
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, json.dumps([rows[i].id for i in range(len(rows))]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(reading, 1 << 16)) == wanted


def test_a_project_that_moves_with_its_mixture_keeps_it(tmp_path: Path) -> None:
    path = source(tmp_path / "project/data", "a", 8)
    spec = spec_of({"c": {"share": 1, "sources": [path]}}, 8)
    out = mix(spec, tmp_path / "project/made/mixed.parquet").path
    assert mix(spec, out).made is False
    (tmp_path / "project").rename(tmp_path / "moved")
    rows = open_rows(tmp_path / "moved/made/mixed.parquet")
    assert isinstance(rows, MixtureRows)
    assert {ref.path.parent for row in rows for ref in row.audios} == {tmp_path / "moved/data/clips"}
    assert rows[0].where.startswith(f"{rows.path} row 1, {tmp_path}/moved/data/a.jsonl:")
    # Made anew there, it is the same to the bit.
    before = rows.path.read_bytes()
    moved = json.loads(spec.model_dump_json().replace("/project/", "/moved/"))
    again = mix(MixtureSpec.model_validate(moved), rows.path)
    assert again.made
    assert again.path.read_bytes() == before


def test_no_file_of_the_users_is_written_over(three: Callable[..., MixtureSpec], tmp_path: Path) -> None:
    mine = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"a": [1]}), mine)
    before = mine.read_bytes()
    with pytest.raises(DataError, match=r"mine\.parquet: is there and is no mixture"):
        mix(three(), mine)
    assert mine.read_bytes() == before
    notes = tmp_path / "mixed.json"
    notes.write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"mixed\.json: is there and is no mixture"):
        mix(three(), tmp_path / "mixed.parquet")
    with pytest.raises(DataError, match="sidecar takes this name"):
        mix(three(), tmp_path / "other.json")
    out = tmp_path / "out.parquet"
    mix(three(), out)
    assert mix(three(seed=9), out).made  # a mixture is


def test_what_cannot_be_read_as_a_mixture(three: Callable[..., MixtureSpec], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        MixtureRows(tmp_path / "none.parquet")
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"row": [b"{}"]}), plain)
    with pytest.raises(DataError, match="is no mixture; coatkit mix makes one"):
        MixtureRows(plain)
    path = materialise(three())
    table = pq.read_table(path)
    later = table.replace_schema_metadata({b"coatkit.mixture": b'{"version": 99}', b"coatkit.mixture.sha256": b"0"})
    pq.write_table(later, plain)
    with pytest.raises(DataError, match="a mixture of format 99, but this coatkit reads format 1"):
        MixtureRows(plain)
    for place in range(60, 300, 7):  # in the first page; not every harmed byte spoils the compression
        harmed = bytearray(path.read_bytes())
        harmed[place] ^= 0xFF
        plain.write_bytes(harmed)
        rows = MixtureRows(plain)
        with pytest.raises(DataError, match=r"(?s)cannot be read as a mixture: .* Delete it and make it anew"):
            rows[0]


def test_a_cache_that_cannot_be_written_is_named(
    three: Callable[..., MixtureSpec], tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"the mixture cannot be written: Not a directory\.\n  COATKIT_CACHE=FOLDER"):
        materialise(three())


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        materialise(spec_of({"c": {"share": 1, "sources": [str(tmp_path / "none.jsonl")]}}, 5))


# Rows of other formats

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/#"), min_size=1, max_size=8)
TIMES = st.tuples(st.none() | st.floats(0, 100), st.none() | st.floats(0.001, 100)).map(
    lambda pair: (pair[0], None if pair[1] is None else (pair[0] or 0.0) + pair[1])
)
REFS = st.tuples(NAMES, TIMES, st.sampled_from(["", "512+4096"]), st.booleans()).map(
    lambda parts: AudioRef(Path("/rows" if parts[3] else "/sounds") / f"x{parts[0]}", *parts[1], parts[2])
)
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5)


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    audios = tuple(draw(st.lists(REFS, max_size=3)))
    turns = draw(st.integers(1, 3))
    tags = [0] * turns
    for _ in audios:
        tags[draw(st.integers(0, turns - 1))] += 1
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=8)
    messages = [Message("system", draw(text))] if draw(st.booleans()) else []
    for count in tags:
        messages += [
            Message("user", "<audio>" * count + draw(text)),
            Message("assistant", draw(text), draw(st.booleans())),
        ]
    labels = draw(st.dictionaries(NAMES.filter(lambda key: key not in mixture._NAMED), VALUES, max_size=3))
    return Row(draw(NAMES), tuple(messages), audios, "x:1", labels)


@settings(deadline=None)
@given(any_row())
def test_a_row_written_as_data_is_read_as_the_same_row(row: Row) -> None:
    folder = Path("/rows")
    data = json.loads(json.dumps(to_data(row, folder)))
    assert parse_row(data, row.where, folder) == row


def test_paths_in_the_folder_are_written_relative() -> None:
    refs = (AudioRef(Path("/rows/clips/a.flac"), None, 2.0), AudioRef(Path("/other/s.tar"), part="1+2"))
    row = Row(
        "r", (Message("user", "<audio><audio>?"), Message("assistant", "!", learn=False)), refs, "x", {"start": 1}
    )
    assert to_data(row, Path("/rows")) == {
        "id": "r",
        "messages": [
            {"role": "user", "content": "<audio><audio>?"},
            {"role": "assistant", "content": "!", "learn": False},
        ],
        "audios": [{"path": "clips/a.flac", "end": 2.0}, {"path": "/other/s.tar#1+2"}],
    }


def test_rows_of_another_format_are_converted(tmp_path: Path) -> None:
    path = tmp_path / "nemo.jsonl"
    entries = [{"audio_filepath": f"wav/{i}.wav", "duration": 1.0 + i, "text": f"word {i}"} for i in range(4)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    kept = {"path": str(path), "question": "What is said?", "filter": {"max_seconds": 3.5}}
    categories = {"speech": {"share": 1, "sources": [kept, source(tmp_path, "a", 2)]}}
    rows = MixtureRows(materialise(spec_of(categories, 5)))
    found = {row.where.partition(", ")[2]: row for row in rows}
    originals = open_rows(path, question="What is said?")
    assert len(found) == 5
    for original in originals[:3]:
        row = found[original.where]
        assert (row.id, row.messages, row.audios) == (original.id, original.messages, original.audios)
        assert row.labels.items() >= {"duration": 1.0 + original.labels["duration"] - 1, "category": "speech"}.items()


def test_rows_that_must_be_converted_are_looked_at_first(tmp_path: Path) -> None:
    path = tmp_path / "nemo.jsonl"
    good = json.dumps({"audio_filepath": "a.wav", "duration": 1.0, "text": "word"})
    path.write_text(f'{good}\n{good}\n{{"audio_filepath": 5, "text": "word"}}\n')
    spec = spec_of({"speech": {"share": 1, "sources": [{"path": str(path), "question": "?"}]}}, 4)
    with pytest.raises(DataError, match=r"1 bad row\(s\) in its sources:\n  .*nemo\.jsonl:3"):
        mix(spec)
    rows = MixtureRows(mix(spec, on_bad_row="quarantine").path)
    assert sorted(row.where.rpartition(":")[2] for row in rows) == ["1", "1", "2", "2"]


def test_a_mixture_can_be_a_source(three: Callable[..., MixtureSpec]) -> None:
    first = materialise(three())
    rows = MixtureRows(materialise(spec_of({"all": {"share": 1, "sources": [str(first)]}}, 40)))
    assert counts(rows) == counts(MixtureRows(first))
    assert {row.labels["category"] for row in rows} == {"all"}


# Filters and bad rows


def test_filters_of_mixture_category_and_source_all_apply(tmp_path: Path) -> None:
    def tens(i: int) -> int:
        return i // 10

    path = source(tmp_path, "a", 100, language=lambda i: "en" if i % 2 else "de", tens=tens, duration=float)
    categories = {
        "c": {
            "share": 1,
            "filter": {"where": {"tens": [1, 2, 3]}},
            "sources": [{"path": path, "filter": {"min_seconds": 15, "max_seconds": 33}}],
        },
        "rest": {"share": 1, "sources": [path]},
    }
    made = mix(spec_of(categories, 40, filter={"language": "en"}))
    rows = MixtureRows(made.path)
    assert {row.id for row in rows if row.labels["category"] == "c"} == {f"a{i}" for i in range(15, 34, 2)}
    entry, rest = (category["sources"][0] for category in made.data["categories"])
    assert (entry["rows"], entry["pool"], entry["left_out"]) == (100, 10, 90)
    assert (rest["rows"], rest["pool"], rest["left_out"]) == (100, 50, 50)
    assert entry["filter"] == {"min_seconds": 15.0, "max_seconds": 33.0}


def test_a_filter_on_a_key_no_row_has_names_the_keys_there_are(tmp_path: Path) -> None:
    path = source(tmp_path, "a", 3, task="asr", labels={"chord": "C"})
    categories = {"c": {"share": 1, "sources": [path], "filter": {"where": {"tsak": "asr"}}}}
    said = (
        r"category 'c': .*a\.jsonl: category 'c''s filter asks for where\.tsak, a key no row has\.\n"
        r"  Keys there are: labels\.chord, task"
    )
    with pytest.raises(DataError, match=said):
        mix(spec_of(categories, 5))


def test_an_empty_pool_names_the_source_and_the_filter(tmp_path: Path) -> None:
    path = source(tmp_path, "a", 3, task="asr", duration=2.0)
    kept = {"path": path, "filter": {"min_seconds": 5}}
    said = r"mixture: category 'c': .*a\.jsonl: no row is left of 3: 3 do not pass the source's seconds$"
    with pytest.raises(DataError, match=said):
        mix(spec_of({"c": {"share": 1, "sources": [kept]}}, 5))


@pytest.fixture
def spoiled(tmp_path: Path) -> dict[str, Any]:
    """A category whose source has three bad rows among ten, and a filter that looks at all of them."""
    path = Path(source(tmp_path, "a", 10, duration=2.0))
    lines = path.read_text().splitlines()
    lines[2], lines[5], lines[7] = "{", '{"id": "x"}', json.dumps({**line("a", 7), "audio": "none.flac"})
    path.write_text("\n".join(lines))
    return {"c": {"share": 1, "sources": [{"path": str(path), "filter": {"max_seconds": 3}}]}}


def test_bad_rows_that_are_looked_at_are_refused_or_counted(spoiled: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(spoiled, 14)
    with pytest.raises(DataError, match=r"3 bad row\(s\) in its sources:\n  .*a\.jsonl:3: not valid JSON"):
        mix(spec)
    made = mix(spec, on_bad_row="quarantine")
    assert [bad["reason"].partition(": ")[0].partition(" ")[0] for bad in made.data["bad_rows"]] == [
        f"{tmp_path}/a.jsonl:{n}" for n in (3, 6, 8)
    ]
    entry = made.data["categories"][0]["sources"][0]
    assert (entry["rows"], entry["pool"], entry["bad"], entry["left_out"]) == (10, 7, 3, 0)
    assert set(counts(MixtureRows(made.path)).values()) == {2}
    # What was made with another policy does not slip through.
    with pytest.raises(DataError, match=r"3 bad row\(s\)"):
        mix(spec)
    with pytest.raises(DataError, match=r"3 bad rows are more than data\.max_bad_rows: 2"):
        mix(spec, on_bad_row="quarantine", max_bad_rows=2)
    assert mix(spec, on_bad_row="quarantine").made is False


def test_dry_writes_nothing(three: Callable[..., MixtureSpec], own_cache: Path) -> None:
    dry = mix(three(), dry=True)
    assert (dry.made, dry.there) == (False, False)
    assert not own_cache.exists()
    made = mix(three())
    assert {**made.data, "content_sha256": None} == dry.data
    assert mix(three(), dry=True).there
