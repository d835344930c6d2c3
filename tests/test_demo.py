"""What the page of `coatkit demo` is made of, without a browser: asking, limits, plots, and the command."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import coatkit
from coatkit import cli
from coatkit.analysis import plots, view_plots
from coatkit.data.rows import Row
from coatkit.demo import page, server
from coatkit.demo.asking import BEFORE, BLOCKLESS, LABELS, WITH, WITHOUT, Asker, Limits, Reply, Said, words
from coatkit.errors import CoatkitError, DataError, PluginError, RunError
from coatkit.evaluation.cot import without_block
from coatkit.infer import AudioThinker, asked
from coatkit.readout import Readout
from coatkit.thought import Heard

LIMITS = Limits(seconds=2.0, bytes=100_000, characters=60, new_tokens=4)
QUESTION = "What is heard?"


@pytest.fixture(scope="module")
def asker(thinking_run: Any) -> Asker:
    return Asker.of_run(thinking_run.run.folder, device="cpu", limits=LIMITS)


@pytest.fixture(scope="module")
def clip(thinking_run: Any) -> Path:
    path: Path = thinking_run.folder / "clips/r15.flac"
    return path


def last(model: AudioThinker, row: Row) -> torch.Tensor:
    """The state that the answer begins from."""
    state = model.think([row])[0].last
    assert state is not None
    return state


# Asking


def test_each_way_to_ask_is_the_model_that_its_label_says(asker: Asker, thinking_run: Any, clip: Path) -> None:
    folder, row = thinking_run.run.folder, asked(clip, QUESTION)
    wanted = {
        WITH: coatkit.load(folder, device="cpu"),
        WITHOUT: without_block(coatkit.load(folder, device="cpu")),
        BEFORE: without_block(coatkit.load(folder, trained=False, device="cpu")),
    }
    states, answers = {}, {}
    for way, model in wanted.items():
        with asker._as(way):
            states[way] = last(asker.model, row)
        torch.testing.assert_close(states[way], last(model, row), rtol=0, atol=0)
        answers[way] = model.answer([row], max_new_tokens=4)[0]
    for one, other in ((WITH, WITHOUT), (WITH, BEFORE), (WITHOUT, BEFORE)):
        assert not torch.equal(states[one], states[other])
    said = asker.ask(clip, QUESTION, (WITHOUT, BEFORE)).said
    assert {one.way: one.text for one in said} == answers
    assert asker.model.step == wanted[WITH].step > 0


def test_a_step_can_be_chosen(thinking_run: Any, clip: Path) -> None:
    row = asked(clip, QUESTION)
    early = Asker.of_run(thinking_run.run.folder, step=3, device="cpu", limits=LIMITS)
    assert early.model.step == 3
    wanted = coatkit.load(thinking_run.run.folder, step=3, device="cpu")
    assert torch.equal(last(early.model, row), last(wanted, row))


@pytest.mark.parametrize("way", [WITHOUT, BEFORE])
def test_the_model_is_itself_again_afterwards(asker: Asker, clip: Path, way: str) -> None:
    row = asked(clip, QUESTION)
    before = last(asker.model, row)

    def fail() -> None:
        with asker._as(way):
            assert not torch.equal(last(asker.model, row), before)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert torch.equal(last(asker.model, row), before)


def test_what_is_thought_comes_with_the_answer(asker: Asker, thinking_run: Any, clip: Path) -> None:
    reply = asker.ask(clip, QUESTION)
    assert [one.way for one in reply.said] == [WITH]
    assert reply.notes == ()
    assert reply.heard is not None
    assert reply.seconds == pytest.approx(soundfile.info(clip).duration)
    (wanted,) = coatkit.load(thinking_run.run.folder, device="cpu").think([asked(clip, QUESTION)])
    torch.testing.assert_close(reply.heard.predicted["level"], wanted.sounds[0].predicted["level"], rtol=0, atol=0)
    assert set(reply.heard.readout) == {"level"}


def test_a_run_without_a_block_is_asked_too(new_project: Callable[[], Any]) -> None:
    project = new_project()
    del project.spec["experts"], project.spec["head"], project.spec["stages"][1]
    project.spec["stages"][0].pop("weights")
    run = project.train("thinking=off")
    asker = Asker.of_run(run.folder, device="cpu", limits=LIMITS)
    assert (asker.has_block, asker.ways, asker.label(WITH)) == (False, (BEFORE,), BLOCKLESS)
    path = project.folder / "clips/r15.flac"
    reply = asker.ask(path, QUESTION, (BEFORE,))
    assert reply.heard is None
    assert len(reply.said) == 2
    with asker._as(BEFORE):
        state = last(asker.model, asked(path, QUESTION))
    assert torch.equal(state, last(coatkit.load(run.folder, trained=False, device="cpu"), asked(path, QUESTION)))
    assert len(view_plots.overview(reply.heard, reply.samples, reply.rate).axes) == 1


def test_a_run_that_has_no_checkpoint_yet_says_so(thinking_run: Any, tmp_path: Path) -> None:
    for name in ("spec.yaml", "run.json"):
        (tmp_path / name).write_bytes((thinking_run.run.folder / name).read_bytes())
    with pytest.raises(RunError, match="no checkpoint yet"):
        Asker.of_run(tmp_path, device="cpu")


def test_an_expert_that_cannot_run_is_noted_without_a_reason(thinking_run: Any, clip: Path) -> None:
    asker = Asker.of_run(thinking_run.run.folder, device="cpu", limits=LIMITS)
    asker.model.mind.unheard["level"] = "no weights in /some/where"
    reply = asker.ask(clip, QUESTION)
    assert reply.notes == ("Expert level cannot run here, so what its head reads has no names.",)
    assert reply.heard is not None
    assert reply.heard.readout == {}
    assert reply.heard.predicted.keys() == {"audio", "level"}


# Limits


@pytest.mark.parametrize(
    ("question", "beside", "told"),
    [
        ("  ", (), "no question yet"),
        ("x" * 61, (), "61 characters; 60 are taken"),
        ("<audio><audio>What?", (), "holds <audio> more than once"),
        (QUESTION, ("../other",), r"cannot be asked so: \.\./other"),
    ],
)
def test_a_bad_question_is_told(asker: Asker, clip: Path, question: str, beside: tuple[str, ...], told: str) -> None:
    with pytest.raises(DataError, match=told):
        asker.ask(clip, question, beside)


@pytest.mark.parametrize(
    ("seconds", "rate", "told"),
    [
        (3.0, 16_000, r"a\.wav is 3\.0 s long; 2 s are taken \(--max-seconds\)"),
        (2.0, 48_000, r"a\.wav has 0\.2 MB; 0\.1 MB are taken \(--max-megabytes\)"),
        (0.01, 16_000, r"a\.wav cannot be heard: 10 ms is too short"),
        (0.0, 16_000, r"a\.wav: holds no sound"),
    ],
)
def test_a_sound_outside_the_limits_is_told(asker: Asker, tmp_path: Path, seconds: float, rate: int, told: str) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(round(seconds * rate), np.float32), rate)
    with pytest.raises(DataError, match=told):
        asker.ask(tmp_path / "a.wav", QUESTION)


def test_what_is_no_sound_is_told_without_its_folder(asker: Asker, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("This is no sound.\n" * 20)
    for name in ("a.wav", "missing.wav", "."):
        with pytest.raises(DataError) as caught:
            asker.ask(tmp_path / name, QUESTION)
        assert str(tmp_path) not in str(caught.value)
        assert (tmp_path / name).name in str(caught.value)
        assert not str(caught.value).endswith("..")


def test_an_answer_is_cut_off_when_its_time_is_over(thinking_run: Any, clip: Path) -> None:
    few = Asker.of_run(thinking_run.run.folder, device="cpu", limits=Limits(new_tokens=200, answer_seconds=1e-3))
    (said,) = few.ask(clip, QUESTION).said
    assert said.cut
    assert few.ask(clip, QUESTION).notes == (f"“{LABELS[WITH]}” was cut off after 0.001 s (--max-answer-seconds).",)
    tokens = few.model.backbone.preparer.tokenizer  # type: ignore[attr-defined]
    assert len(tokens(said.text)["input_ids"]) < 50


# What is shown


def heard(**readouts: Readout) -> Heard:
    random = torch.Generator().manual_seed(0)
    predicted = {name: torch.rand(50, 6, generator=random) for name in (*readouts, "speech")}
    return Heard(25.0, torch.zeros(50, 8), predicted, readout=dict(readouts))


def events(*peaks: tuple[int, int, float]) -> Readout:
    values = torch.full((50, 30), 0.01)
    for at, channel, value in peaks:
        values[at, channel] = value
    return Readout("sound events", values, tuple(f"class {i}" for i in range(30)))


def pitch(*peaks: tuple[int, int, float]) -> Readout:
    hertz = tuple(27.5 * 2 ** (i / 36) for i in range(264))
    values = torch.full((50, 264), 0.01)
    for at, channel, value in peaks:
        values[at, channel] = value
    return Readout("pitch", values, tuple(f"{f:.1f} Hz" for f in hertz), hertz=hertz)


def test_the_strongest_is_said_in_words() -> None:
    found = words(heard(panns=events((10, 3, 0.9), (20, 7, 0.5), (30, 1, 0.2)), notes=pitch((25, 108, 0.7))))
    (none,) = words(heard(notes=pitch((25, 108, 0.4))))
    assert none == "notes, pitch: nothing reaches 0.5; strongest A3 (220 Hz) 0.40 at 1.0 s"
    assert found == [
        "panns, sound events: strongest class 3 0.90 at 0.4 s; class 7 0.50 at 0.8 s; class 1 0.20 at 1.2 s",
        "notes, pitch: strongest A3 (220 Hz) 0.70 at 1.0 s",
    ]


def test_all_heads_are_drawn_under_the_sound_on_one_time_axis() -> None:
    samples = np.zeros(32_000, np.float32)
    samples[16_000:] = 0.5
    seen = heard(panns=events((10, 3, 0.9)), notes=pitch((25, 108, 0.7)))
    figure = view_plots.overview(seen, samples, 16_000)
    axes = [axis for axis in figure.axes if axis.get_title(loc="left")]
    titles = [axis.get_title(loc="left") for axis in axes]
    assert titles[:3] == ["the sound", "panns: sound events", "notes: pitch"]
    assert titles[3].startswith("speech: strength of the predicted features")
    assert len(titles) == 4
    assert {axis.get_xlim() for axis in axes} == {(0.0, 2.0)}
    (line,) = axes[3].lines
    torch.testing.assert_close(torch.tensor(line.get_ydata()), seen.predicted["speech"].square().mean(1).sqrt())
    (wave,) = axes[0].collections
    outline = wave.get_paths()[0].vertices
    assert outline[outline[:, 0] < 0.99, 1].max() == 0
    assert outline[outline[:, 0] > 1.01, 1].max() == 0.5
    names = [tick.get_text() for tick in axes[1].get_yticklabels()]
    assert names[-1] == "class 3"
    assert plots.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("samples", [np.zeros(10, np.float32), np.full(16_000, -1e-9, np.float32)])
def test_little_and_silent_sounds_are_drawn(samples: np.ndarray) -> None:
    one = Heard(25.0, torch.zeros(1, 8), {"a": torch.zeros(1, 4)})
    assert plots.png(view_plots.overview(one, samples, 16_000)).startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["a_b.c", "*a* [b](c) <b> `x` $y$ # h", "a\n# b\\"])
def test_markdown_shows_a_name_as_it_stands(text: str) -> None:
    found = page.plain(text)
    assert "\n" not in found
    # CommonMark: a backslash before ASCII punctuation gives that character, and punctuation alone has a meaning.
    taken = found.replace("\\\\", "\0")
    rest = taken
    for mark in "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~":
        rest = rest.replace("\\" + mark, "")
    assert not set(rest) & set("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~\\")


def test_an_answer_says_how_long_it_took_and_whether_it_is_whole(asker: Asker) -> None:
    assert page._label(asker, Said(WITHOUT, "x", 1.23)) == f"{LABELS[WITHOUT]} (1.2 s)"
    assert page._label(asker, Said(WITH, "x", 60.0, cut=True)) == f"{LABELS[WITH]} (60.0 s, cut off)"
    reply = Reply(np.zeros(16_000, np.float32), 16_000, heard(), ())
    said = page._alternative(reply, ["a, b: strongest c"])
    assert said == "The waveform of 1.0 s of sound above what the heads read: speech. a, b: strongest c"


def test_only_a_file_among_the_uploads_is_asked_about(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "a.wav").write_bytes(b"x")
    (tmp_path / "b.wav").write_bytes(b"x")
    (uploads / "link.wav").symlink_to(tmp_path / "b.wav")
    assert page._among(uploads, str(uploads / "a.wav")) == uploads / "a.wav"
    for path in (tmp_path / "b.wav", uploads / "../b.wav", uploads / "link.wav"):
        with pytest.raises(CoatkitError, match="were uploaded"):
            page._among(uploads, str(path))


# Listening, and the command


def test_it_listens_where_it_is_told_and_says_where(tmp_path: Path) -> None:
    with server.listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert bound.getsockname()[0] == "127.0.0.1"
        assert server.address_of(bound, "127.0.0.1") == f"http://127.0.0.1:{port}/"
        assert server.address_of(bound, "::1") == f"http://[::1]:{port}/"
        assert server.address_of(bound, "0.0.0.0") == f"http://127.0.0.1:{port}/"
        assert server.hosts_of(bound, "localhost") == {f"{n}:{port}" for n in ("127.0.0.1", "localhost", "[::1]")}
        assert server.hosts_of(bound, "0.0.0.0") is None
        assert server.hosts_of(bound, "127.0.0.2") == {f"127.0.0.2:{port}"}
        with pytest.raises(RunError, match=rf"127\.0\.0\.1:{port}: .*--port"):
            server.listen("127.0.0.1", port)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["coatkit", "demo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_a_missing_gradio_is_named_before_the_model_is_loaded(
    thinking_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(monkeypatch, str(thinking_run.run.folder), "--port", "0") == PluginError.exit_code
    told = capsys.readouterr().err
    assert "pip install 'coatkit[demo]'" in told
    assert "password" not in told


def test_a_page_that_others_can_reach_is_warned_of(
    thinking_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    run(monkeypatch, str(thinking_run.run.folder), "--port", "0", "--host", "0.0.0.0")
    assert "anyone who can reach 0.0.0.0 can use the page, which has no password" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["{}/none"], "none"), (["{}", "--step", "2"], "no checkpoint of step 2; there: 3, 6")],
)
def test_what_is_wrong_with_the_run_is_told(
    thinking_run: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    told: str,
) -> None:
    assert run(monkeypatch, *(one.format(thinking_run.run.folder) for one in arguments)) == RunError.exit_code
    assert told in capsys.readouterr().err


def test_a_taken_port_is_told_before_the_model_is_loaded(
    thinking_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(monkeypatch, str(thinking_run.run.folder), "--port", port) == RunError.exit_code
    assert f"127.0.0.1:{port}: cannot be listened on" in capsys.readouterr().err
