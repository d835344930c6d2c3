"""`coatkit data`: what it counts, that it finds what is bad or twice there, and that its page is safe to open."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from coatkit.cli import cli
from coatkit.data.page import CLIP_SECONDS, page
from coatkit.data.readers import open_rows
from coatkit.data.survey import SECONDS, Survey, bin_name, histogram, kind_of, middle, plain, survey, used
from coatkit.plan_rows import Lengths
from coatkit.spec_data import FilterSpec

LENGTHS = Lengths(25.0, 1.0)
BAD = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def talk(answer: str = "yes", question: str = "What is heard?") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def look(path: Path, **options: Any) -> Survey:
    return survey(open_rows(path), LENGTHS, **{"max_seconds": 120.0, **options})


def clip(path: Path, seconds: float = 1.0, rate: int = 16_000, scale: float = 0.3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, (scale * np.sin(2 * np.pi * 440 * time)).astype(np.float32), rate)
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["data", *words])


# Counting


def test_rows_are_counted_by_category(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav", 2.0)
    found = look(
        write_rows(
            tmp_path,
            {"id": 1, "audio": "a.wav", "messages": talk("a" * 40), "category": "sound", "language": "de"},
            {"id": 2, "audio": "a.wav", "end": 1.5, "messages": talk(), "category": "sound", "source": "unused"},
            {"id": 3, "audios": ["a.wav", "a.wav"], "messages": talk() + talk(), "source": "pairs"},
            {"id": 4, "messages": [{"role": "system", "content": "Be kind."}, *talk()], "labels": {"language": "fr"}},
            {"id": 5, "messages": talk(), "category": {"no": "name"}},
        )
    )
    assert list(found.groups) == ["rows.jsonl", "sound", "pairs"]
    assert [group.rows for group in found.groups.values()] == [2, 2, 1]
    text, sound, pairs = found.groups.values()
    assert (text.text_only, list(text.seconds), dict(text.languages)) == (2, [], {"fr": 1})
    assert (sound.text_only, list(sound.seconds), dict(sound.languages)) == (0, [2.0, 1.5], {"de": 1})
    assert (dict(pairs.sounds), dict(pairs.turns), dict(text.turns)) == ({2: 1}, {4: 1}, {2: 2})
    assert pairs.hours == pytest.approx(4 / 3600)
    # 7 + 14 + 40 bytes of text, 24 of markup, 2 s heard and thought about at 25 Hz, the block's two ends
    assert sound.tokens[0] == pytest.approx((7 + 14 + 40) / 4 + 24 + 2 * 25 * 2 + 2)
    assert (found.whole.rows, found.whole.text_only, found.whole.hours) == (5, 2, pytest.approx(7.5 / 3600))
    assert (found.stated, found.opened) == (1, 2)


def test_any_label_can_be_the_category(tmp_path: Path) -> None:
    rows = [{"id": i, "messages": talk(str(i)), "labels": {"kind": k}, "n": i % 2} for i, k in enumerate("aab")]
    path = write_rows(tmp_path, *rows, {"id": 9, "messages": talk("9")})
    for by in ("labels.kind", "kind"):
        assert {n: g.rows for n, g in look(path, by=by).groups.items()} == {"a": 2, "b": 1, f"(no {by})": 1}
    assert {n: g.rows for n, g in look(path, by="n").groups.items()} == {"0": 2, "1": 1, "(no n)": 1}


def test_a_stated_length_is_taken_and_no_header_read_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"this is no sound")
    path = write_rows(
        tmp_path,
        {"id": 1, "audio": "a.wav", "messages": talk(), "duration": 7.5},
        {"id": 2, "audio": "a.wav", "start": 1.0, "end": 2.0, "messages": talk()},
        {"id": 3, "audio": "a.wav", "messages": talk("no length")},
    )
    found = look(path)
    assert (list(found.groups["rows.jsonl"].seconds), found.kinds.total(), found.opened) == ([7.5, 1.0], 1, 1)
    assert found.unopened == 2
    found = look(path, headers=True)
    assert (found.kinds.total(), found.unopened) == (3, 0)
    found = look(path, headers=False)
    (group,) = found.groups.values()
    assert (found.kinds.total(), found.opened, group.unknown, len(group.tokens)) == (0, 0, 1, 2)
    assert found.unopened == 3


@pytest.mark.parametrize("said", [-1, "7", True, float("nan")])
def test_a_length_that_is_none_is_not_taken(tmp_path: Path, said: Any) -> None:
    clip(tmp_path / "a.wav", 2.0)
    found = look(write_rows(tmp_path, {"id": 1, "audio": "a.wav", "messages": talk(), "duration": said}))
    assert list(found.whole.seconds) == [2.0]


def test_the_sources_filter_leaves_rows_out_that_are_not_bad(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav", 2.0)
    path = write_rows(
        tmp_path,
        {"id": 1, "audio": "a.wav", "messages": talk("1"), "language": "de"},
        {"id": 2, "audio": "a.wav", "messages": talk("2"), "language": "en"},
        {"id": 3, "audio": "a.wav", "end": 0.5, "messages": talk("3"), "language": "de"},
    )
    found = look(path, keep=FilterSpec(language="de", min_seconds=1.0))
    assert (found.whole.rows, found.left_out, found.kinds.total()) == (1, 2, 0)
    # What is not known is not compared: row 1 stays, row 3 states its length.
    found = look(path, keep=FilterSpec(language="de", min_seconds=1.0), headers=False)
    assert (found.whole.rows, found.left_out, found.whole.unknown) == (1, 2, 1)


# What is bad, or twice there


def test_bad_rows_are_named_and_counted_by_kind(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav", 2.0)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "text.wav").write_text("no sound at all")
    found = look(
        write_rows(
            tmp_path,
            "{ not json",
            {"id": "no1", "audio": "gone1.wav", "messages": talk(), "duration": 1},
            {"id": "no2", "audio": "gone2.wav", "messages": talk(), "end": 1.0},
            {"id": "dir", "audio": "folder.wav", "messages": talk(), "duration": 1},
            {"id": "txt", "audio": "text.wav", "messages": talk()},
            {"id": "long", "audio": "a.wav", "messages": talk()},
            {"id": "longer", "audio": "a.wav", "messages": talk(), "duration": 900.25},
            {"id": "mute", "messages": talk()[:1]},
            {"id": "unlearnt", "messages": [*talk()[:1], {"role": "assistant", "content": "x", "learn": False}]},
            {"id": "good", "messages": talk()},
        ),
        max_seconds=1.5,
    )
    assert (found.count, found.whole.rows, found.kinds.total()) == (10, 1, 9)
    assert found.kinds["cannot be opened as sound: there is no such file"] == 2
    assert found.kinds["N s is over data.max_seconds (N s)"] == 2
    assert found.kinds["cannot be opened as sound: it is no file"] == 1
    assert found.kinds["the last message must be the assistant's answer"] == 1
    assert found.kinds["the row keeps the loss off every answer"] == 1
    assert any(kind.startswith("not valid JSON") for kind in found.kinds)
    assert len(found.kinds) == 7
    for line, said in ((1, "not valid JSON"), (2, "(row no1)"), (5, "text.wav: cannot be opened"), (7, "900.2 s is")):
        assert any(f"rows.jsonl:{line}" in reason and said in reason for reason in found.bad), line


def test_the_first_bad_rows_are_named_and_all_are_counted(tmp_path: Path) -> None:
    found = look(write_rows(tmp_path, *[{"id": i, "messages": talk()[:1]} for i in range(50)]))
    assert (len(found.bad), found.kinds.total(), len(found.kinds), found.groups) == (20, 50, 1, {})


def test_rows_that_are_twice_there_are_named(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    path = write_rows(
        tmp_path,
        {"id": "x", "audio": "a.wav", "messages": talk("1")},
        {"id": "y", "audio": "a.wav", "messages": talk("1")},
        {"id": "x", "audio": "a.wav", "messages": talk("2")},
        {"id": "z", "audio": "a.wav", "end": 0.5, "messages": talk("1")},
        {"audio": "a.wav", "messages": talk("3")},
        {"audio": "a.wav", "messages": talk("4")},
    )
    found = look(path)
    assert (found.same_id.count, found.same_content.count) == (1, 1)
    assert found.same_id.named == [(f"{path}:3", f"{path}:1")]
    assert found.same_content.named == [(f"{path}:2", f"{path}:1")]


# Bins


def test_every_value_is_in_the_bin_that_names_it() -> None:
    counts = histogram([0.0, 0.49, 0.5, 1.0, 1.99, 2.0, 119.9, 120.0, 5000.0], SECONDS)
    said = {bin_name(SECONDS, i): counts[i] for i in range(len(counts)) if counts[i]}
    assert said == {
        "0 to 0.5": 2, "0.5 to 1": 1, "1 to 2": 2, "2 to 3": 1, "60 to 120": 1, "120 to 300": 1, "from 1,200": 1
    }  # fmt: skip
    assert used([0, 0, 3, 0, 1, 0]) == range(2, 5)
    assert used([0, 0]) == range(0)
    assert middle([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    assert middle([]) == (0.0, 0.0, 0.0)


def test_what_is_shown_cannot_move_a_cursor() -> None:
    assert plain("a\x1b[2J\nb\u202ec") == "a [2J b c"
    assert plain("abcdef", 4) == "abc…"
    assert kind_of("d.jsonl:7: messages[3].role is 'x'", "d.jsonl:7") == "messages[N].role is 'x'"


# The command


def test_the_command_prints_what_it_found(project: Any) -> None:
    project.rows[0]["category"] = "first\x1b[31m"
    project.add_row(id="gone", audio="clips/gone.wav", messages=talk())
    project.add_row(id="r01", messages=talk("again"))
    project.spec["data"]["heldout"] = "heldout.jsonl"
    (project.folder / "heldout.jsonl").write_text(
        json.dumps({"id": "h", "messages": talk("fresh")}) + "\n" + json.dumps(project.rows[-1]) + "\n"
    )
    result = run(str(project.write()))
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert lines[0] == (
        "note: tokens are estimated: mini's 25 audio tokens per second, 1 thinking position for each,"
        " and a token for 4 bytes of text"
    )
    assert lines[1] == "stage one, two: project/train.jsonl"
    assert lines[2] == "21 of 22 rows usable; 0.1 min of sound"
    assert lines[3] == "lengths: 0 stated by rows, 16 from headers"
    table = [line.split() for line in lines[4:8]]
    assert table[0] == ["category", "rows", "hours", "text", "only", "sounds", "turns", "seconds", "tokens", "lengths"]
    assert table[1][:4] == ["train.jsonl", "20", "0.00", "5"]
    assert table[2][:4] == ["first", "[31m", "1", "0.00"]
    assert table[3][:4] == ["all", "21", "0.00", "5"]
    bars = {tuple(line.split()[:3]): line.split()[3:] for line in lines[9:11]}
    assert bars == {("0", "to", "0.5"): ["16", "#" * 40]} | {k: v for k, v in bars.items() if k[0] != "0"}
    assert "rows with the id of an earlier row: 1" in lines
    assert "bad rows: 1; training would stop: data.on_bad_row is refuse" in lines
    assert "1 x cannot be opened as sound: there is no such file" in lines
    assert any("train.jsonl:21 (row gone): " in line for line in lines)
    assert "heldout: project/heldout.jsonl" in lines
    assert lines[-2:] == ["in training too, same sounds and text: 1", "bad rows: none found"]
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("bad", "policy", "said"),
    [
        (2, {"on_bad_row": "quarantine"}, "bad rows: 2; they would be set aside in training"),
        (
            2,
            {"on_bad_row": "quarantine", "max_bad_rows": 1},
            "bad rows: 2; training would stop: data.max_bad_rows is 1",
        ),
        (0, {}, "bad rows: none found; the sounds of 16 rows were not opened (--headers)"),
    ],
)
def test_what_training_would_do_about_bad_rows_is_said(project: Any, bad: int, policy: Any, said: str) -> None:
    for i in range(bad):
        project.add_row(id=f"b{i}", messages=talk()[:1])
    project.spec["data"].update(policy)
    assert said in run(str(project.write()), "--no-headers").output


def test_a_mixture_is_drawn_and_its_repeats_are_no_duplicates(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    project.write()
    # Without ids: that two sources have a third line makes no duplicates.
    clips = [{key: value for key, value in row.items() if key != "id"} for row in project.rows[:16]]
    sentences = [{"messages": talk(str(i)), "lesson": 1} for i in range(4)]
    for name, rows in (("clips", clips), ("text", [*sentences, {"messages": "none", "lesson": 1}])):
        (project.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"path": "text.jsonl", "filter": {"where": {"lesson": 1}}}  # with a filter every row is looked at
    project.spec["data"] = {
        "mixture": {
            "rows": 40,
            "categories": {
                "sound": {"share": 0.5, "sources": ["clips.jsonl"]},
                "text": {"share": 0.5, "sources": [text]},
            },
        }
    }
    result = run(str(project.write()))
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert lines[2] == "40 of 41 rows usable, 20 of them drawn again; 0.1 min of sound"
    assert [line.split()[:2] for line in lines[5:7]] == [["sound", "20"], ["text", "20"]]
    assert "earlier row" not in result.output
    assert any(line.startswith("1 x not drawn: ") for line in lines)
    assert "bad rows: 1; training would stop: data.on_bad_row is refuse" in lines


def test_looking_loads_no_torch(project: Any) -> None:
    code = (
        "import sys; from coatkit.cli import cli\n"
        f"cli(['data', {str(project.write())!r}], standalone_mode=False)\n"
        "assert 'soundfile' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_letters_that_the_output_lacks_are_not_needed(project: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coatkit", "data", str(project.write())],
        capture_output=True, text=True, timeout=120, env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--html", "{}/spec.yaml"], "name a file that ends in .html"),
        (["--html", "{}/gone/data.html"], "there is no folder"),
        (["--set", "data.train=gone.jsonl"], "gone.jsonl"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_rows_are_read(project: Any, words: list[str], said: str) -> None:
    spec = project.write()
    before = spec.read_text()
    result = run(str(spec), *[word.format(project.folder) for word in words])
    assert result.exit_code != 0
    assert said in str(result.exception)
    assert (result.output, spec.read_text()) == ("", before)


# The page


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def sounds(self) -> list[tuple[np.ndarray, int]]:
        """Samples and rate of each player."""
        found = []
        for player in self.of("audio"):
            kind, _, data = str(player["src"]).partition(",")
            assert kind == "data:audio/wav;base64"
            found.append(soundfile.read(io.BytesIO(base64.b64decode(data, validate=True))))
        return found


def test_the_page_holds_plots_tables_and_players_and_needs_nothing_else(project: Any) -> None:
    for row in project.rows[:8]:
        row["category"] = "early"
    clip(project.folder / "long.wav", 12.0, rate=48_000)
    project.add_row(id="long", audio="long.wav", messages=talk("long"), category="long")
    out = project.folder / "data.html"
    result = run(str(project.write()), "--html", str(out), "--rows", "2")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith(f"written: {out} (")
    found = Page(out.read_text(encoding="utf-8"))
    assert len(found.of("svg")) == 2 * (1 + 3)  # all, and three categories
    assert len(found.of("table")) == 1
    for name in ("early", "train.jsonl", "long", "all"):
        assert f"<td>{name}</td>" in out.read_text(encoding="utf-8")
    sounds = found.sounds()
    assert 4 <= len(sounds) <= 5  # two of `early`, one of `long`, and those of train.jsonl that have a sound
    assert max((len(samples) / rate, rate) for samples, rate in sounds) == (CLIP_SECONDS, 24_000)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "a"})
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert name not in ("href", "srcset", "action", "style")
            assert not name.startswith("on")
            assert name != "src" or str(value).startswith("data:audio/wav;base64,"), tag
    assert not re.search(r"url\(|@import|https?:", out.read_text(encoding="utf-8"))


def test_loudness_is_as_in_the_file(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav", 0.5, scale=0.01)
    found = look(write_rows(tmp_path, {"id": 1, "audio": "a.wav", "messages": talk()}), examples=1)
    ((samples, rate),) = Page(page("t", [("p", found)])).sounds()
    assert (rate, len(samples)) == (16_000, 8_000)
    assert np.abs(samples).max() == pytest.approx(0.01, rel=0.01)


def test_nothing_in_the_data_becomes_markup(project: Any) -> None:
    """Text, ids, labels, languages, file names and reasons, of good rows, bad ones and duplicates."""
    name = 'a"><script>alert(2)<b>&amp;.wav'.replace("/", "_")
    clip(project.folder / "clips" / name)
    rows = [
        {"id": BAD, "audio": f"clips/{name}", "messages": talk(BAD, f"<audio>{BAD}"), "category": BAD, "language": BAD},
        {"id": BAD, "audio": f"clips/{name}", "messages": talk(BAD, f"<audio>{BAD}"), "category": BAD},
        {"id": f"bad{BAD}", "audio": f"gone{BAD.replace('/', '_')}", "messages": talk()},
        {"id": "role", "messages": [{"role": BAD, "content": "x"}]},
    ]
    project.rows = rows
    out = project.folder / "data.html"
    result = run(str(project.write()), "--html", str(out))
    assert result.exit_code == 0, result.output
    found = Page(out.read_text(encoding="utf-8"))
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "h4",
        "p",
        "div",
        "svg",
        "rect",
        "text",
    }
    allowed |= {"table", "tr", "th", "td", "ul", "li", "details", "summary", "span", "audio"}
    assert {tag for tag, _ in found.tags} <= allowed
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.text.count(BAD) >= 8  # shown as it is, not lost
    assert name in found.text
    assert len(found.sounds()) == 2


def test_players_stop_at_the_limit_and_every_category_comes_first(tmp_path: Path) -> None:
    rows = []
    for category in "abc":
        for i in range(3):
            clip(tmp_path / f"{category}{i}.wav", 1.0)
            name = f"{category}{i}"
            rows.append({"id": name, "audio": f"{name}.wav", "messages": talk(name), "category": category})
    found = look(write_rows(tmp_path, *rows), examples=3)
    whole = page("t", [("p", found)])
    assert len(Page(whole).of("audio")) == 9
    each = max(len(str(player["src"])) for player in Page(whole).of("audio"))
    text = page("t", [("p", found)], limit=4 * each)
    few = Page(text)
    sounds = [str(player["src"]) for player in few.of("audio")]
    assert 4 <= len(sounds) <= 5
    assert sum(map(len, sounds)) <= 4 * each + len(sounds) * len("data:audio/wav;base64,")
    assert few.text.count("the page holds as many sounds as it may") == 9 - len(sounds)
    for card in text.split("<h3>")[1:]:
        assert "<audio" in card


def test_a_sound_that_cannot_be_played_is_a_line_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "<img src=x>.wav").write_text("no sound at all")
    row = {"id": 1, "audio": "<img src=x>.wav", "messages": talk(), "duration": 2}
    found = Page(page("t", [("p", look(write_rows(tmp_path, row), examples=1))]))
    assert not found.of("audio")
    assert not found.of("img")
    assert "<img src=x>.wav: cannot be opened as sound" in found.text


@pytest.mark.parametrize("rate", [100, 8_000, 11_025, 96_000, 192_000])
def test_sounds_of_any_rate_can_be_played(tmp_path: Path, rate: int) -> None:
    clip(tmp_path / "a.wav", 1.0, rate=rate)
    found = look(write_rows(tmp_path, {"id": 1, "audio": "a.wav", "messages": talk()}), examples=1)
    ((samples, played),) = Page(page("t", [("p", found)])).sounds()
    assert (len(samples) / played, played) == (1.0, min(rate, 24_000))


def test_the_same_rows_are_shown_every_time(tmp_path: Path) -> None:
    path = write_rows(tmp_path, *[{"id": i, "messages": talk(str(i))} for i in range(200)])
    first, again = (look(path, examples=5).groups["rows.jsonl"].examples for _ in range(2))
    assert [row.id for row in first] == [row.id for row in again]
    assert len({row.id for row in first}) == 5
    assert max(int(row.id) for row in first) > 50  # from all over, not the first few
    assert len(look(path, examples=300).groups["rows.jsonl"].examples) == 200
