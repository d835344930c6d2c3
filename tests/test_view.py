"""Seeing and hearing what a run thinks of a sound: numbers, the decoder, pictures, the page and the command."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

import coatkit
from coatkit import cli, page
from coatkit.analysis import agreement, hear, plots, view, view_plots
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError, PluginError, RunError
from coatkit.infer import AudioThinker, asked
from coatkit.readout import Readout
from coatkit.thought import Heard


@pytest.fixture(scope="module")
def model(thinking_run: Any) -> AudioThinker:
    return coatkit.load(thinking_run.run.folder, device="cpu")


@pytest.fixture(scope="module")
def clip(thinking_run: Any) -> AudioRef:
    return AudioRef(thinking_run.folder / "clips/r15.flac")


@pytest.fixture(scope="module")
def seen(model: AudioThinker, clip: AudioRef) -> view.View:
    return view.look(model, clip, question="What is heard?", max_new_tokens=4)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["coatkit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


# Numbers


def test_features_agree_as_worked_out_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = agreement.of_features(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), target)
    assert found["cosine"] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found["cosine of the mean"] == pytest.approx(math.sqrt(0.5))
    assert found["variance explained"] == pytest.approx(1 - 2 / 1.0)
    assert agreement.of_features(target, target)["variance explained"] == 1
    assert agreement.of_features(target.mean(0).expand(2, 2), target)["variance explained"] == 0
    assert "variance explained" not in agreement.of_features(target[:1], target[:1])
    assert set(found) <= set(agreement.MEANING)


def test_readouts_agree_as_worked_out_by_hand() -> None:
    target = Readout("x", torch.tensor([[0.9, 0.1], [0.8, 0.6]]), ("a", "b"), threshold=0.5)
    predicted = replace(target, values=torch.tensor([[0.7, 0.6], [0.2, 0.5]]))
    found = agreement.of_readouts(predicted, target)
    assert found["frame F1"] == pytest.approx(2 * 2 / (3 + 3))
    assert (found["present"], found["predicted present"]) == (3, 3)
    by_hand = -np.mean(
        [
            0.9 * math.log(0.7) + 0.1 * math.log(0.3),
            0.1 * math.log(0.6) + 0.9 * math.log(0.4),
            0.8 * math.log(0.2) + 0.2 * math.log(0.8),
            math.log(0.5),
        ]
    )
    assert found["BCE"] == pytest.approx(by_hand, rel=1e-5)
    assert agreement.of_readouts(target, target)["BCE"] == pytest.approx(found["least BCE"])
    nothing = replace(target, values=torch.zeros(2, 2))
    assert math.isnan(agreement.of_readouts(nothing, nothing)["frame F1"])
    assert "BCE" not in agreement.of_readouts(replace(predicted, unit="dB"), replace(target, unit="dB"))


def test_frequencies_are_counted_by_semitone() -> None:
    """A note a third of a semitone beside the right bin is the right note; one of the next semitone is not."""
    hertz = tuple(440 * 2 ** (i / 36) for i in (-1, 0, 1, 2, 3, 4))
    target = Readout("pitch", torch.zeros(1, 6), ("",) * 6, hertz=hertz)
    target.values[0, 1] = 1.0
    for bin_, score in ((0, 1.0), (2, 1.0), (4, 0.0)):
        predicted = replace(target, values=torch.eye(6)[bin_ : bin_ + 1])
        assert agreement.of_readouts(predicted, target)["frame F1"] == score


# The decoder


def _clips(
    count: int, dim: int = 12, rate: float = 25.0, noise: float = 0.0
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Features, and log-mel frames that are a linear map of them where there is no noise."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(dim, hear.BANDS, generator=random)
    clips = []
    for i in range(count):
        features = torch.randn(20 + i, dim, generator=random)
        where = hear._frames_of(len(features), rate)
        mel = torch.zeros(int(where.max()) + 1, hear.BANDS)
        mel[where.flatten()] = (features @ weight).repeat_interleave(where.shape[1], 0)
        clips.append((features, mel if not noise else noise * torch.randn(mel.shape, generator=random)))
    return clips, weight


def test_a_linear_map_is_found_again_and_noise_is_not() -> None:
    clips, weight = _clips(30)
    made = hear.fit(clips, 25.0, [str(i) for i in range(30)])
    assert made.fit.r2 > 0.999
    assert (made.fit.clips, made.fit.held_out, len(made.fit.sounds)) == (30, 3, 24)
    assert {"8", "9", "18", "19"}.isdisjoint(made.fit.sounds)  # neither those that chose nor those that judged
    features = torch.randn(9, 12)
    torch.testing.assert_close(made(features, 25.0), (features @ weight).repeat_interleave(4, 0), rtol=0.02, atol=0.05)
    assert hear.fit(_clips(30, noise=1.0)[0], 25.0).fit.r2 < 0.05


@pytest.mark.parametrize("shift", [-1, 1])
def test_neighbours_are_seen_on_both_sides(shift: int) -> None:
    clips, _ = _clips(30)
    assert hear.fit([(features.roll(shift, 0), mel) for features, mel in clips], 25.0).fit.r2 > 0.9


def test_what_is_told_is_of_clips_that_were_held_out() -> None:
    clips, _ = _clips(30)
    odd = [(f, torch.randn(mel.shape) if i % 10 == 9 else mel) for i, (f, mel) in enumerate(clips)]
    found = hear.fit(odd, 25.0).fit
    assert found.r2 < 0.05
    assert found.ridge == min(hear.RIDGES)
    odd = [(f, torch.randn(mel.shape) if i % 10 == 8 else mel) for i, (f, mel) in enumerate(clips)]
    assert hear.fit(odd, 25.0).fit.ridge == max(hear.RIDGES)  # others choose it


@pytest.mark.parametrize("rate", [12.5, 25.0, 30.0, 50.0, 1000 / 30])
def test_frames_of_positions_cover_their_time(rate: float) -> None:
    where = hear._frames_of(50, rate)
    assert sorted(set(where.flatten().tolist())) == list(range(int(where.max()) + 1))
    starts = where[:, 0] * hear.HOP / hear.RATE
    assert ((starts - torch.arange(50) / rate).abs() < hear.HOP / hear.RATE + 1e-6).all()
    clips, _ = _clips(12, rate=rate)
    assert len(hear.fit(clips, rate)(clips[0][0], rate)) == int(hear._frames_of(20, rate).max()) + 1


def test_too_few_clips_are_told() -> None:
    with pytest.raises(DataError, match="4 clips are too few to fit a decoder on"):
        hear.fit(_clips(4)[0], 25.0)


def test_a_spectrogram_sounds_as_what_it_was_made_of() -> None:
    time = np.arange(hear.RATE) / hear.RATE
    tone = 0.3 * np.sin(2 * np.pi * 1000 * time)
    mel = hear.log_mel(tone)
    assert mel.shape == (101, hear.BANDS)
    again = hear.audible(mel, len(tone))
    spectrum = np.abs(np.fft.rfft(again * np.hanning(len(again))))
    assert abs(int(spectrum.argmax()) - 1000) < 40
    assert abs(20 * math.log10(again.std() / tone.std())) < 6  # 80 bands do not say all of a level
    torch.manual_seed(12)
    assert np.array_equal(again, hear.audible(mel, len(tone)))
    assert float(np.abs(hear.audible(torch.full((20, hear.BANDS), math.log(hear.FLOOR)), 3200)).max()) < 1e-3
    assert hear.audible(mel[:3], 20_000).shape == (20_000,)
    for samples in (1, 100, 700):
        short = hear.log_mel(tone[:samples])
        assert short.shape == (1 + samples // hear.HOP, hear.BANDS)
        assert hear.audible(short, samples).shape == (samples,)


def test_a_decoder_is_fitted_once_and_again_when_what_it_is_of_changes(
    model: AudioThinker, seen: view.View, clip: AudioRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen.hearing is not None
    assert seen.hearing.expert == "audio"
    assert set(seen.hearing.sounds) == set(seen.hearing.errors) == {"target", "prediction"}
    assert (model.run.path / "view/decoder-audio.safetensors").is_file()
    said: list[str] = []
    kept = hear.decoder_of(model, "audio", say=said.append)
    assert said == []
    assert kept.fit.clips == 16  # the text-only rows have no sound
    assert kept.fit.seconds == pytest.approx(sum(0.1 + 0.025 * i for i in range(16)), abs=0.2)
    calls = []
    monkeypatch.setattr(hear, "fit", lambda *a: calls.append(1) or kept)
    hear.decoder_of(model, "audio", 500.0, say=said.append)
    assert (len(calls), len(said)) == (1, 1)
    hear.decoder_of(model, "audio", 500.0, say=said.append)
    (model.run.path / "view/decoder-audio.safetensors").write_bytes(b"damaged")
    hear.decoder_of(model, "audio", 500.0, say=said.append)
    assert len(calls) == 2


def test_a_limit_of_sound_is_kept_to(model: AudioThinker) -> None:
    found = list(hear._clips(model, "audio", 2.0))
    assert 1.0 < sum(len(mel) - 1 for _, mel, _ in found) * hear.HOP / hear.RATE <= 2.0
    assert len({key for *_, key in found}) == len(found)
    for features, mel, _ in found:
        assert abs(len(features) / 25 - len(mel) / 100) < 0.1


def test_a_sound_of_two_rows_is_taken_once_and_bad_rows_are_passed_over(thinking_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(thinking_run.run.folder, folder, ignore=shutil.ignore_patterns("view"))
    rows = (thinking_run.folder / "train.jsonl").read_text()
    (thinking_run.folder / "clips/empty.wav").write_bytes(b"")
    again = rows.replace('"id": "', '"id": "again ')
    (thinking_run.folder / "twice.jsonl").write_text(
        rows + again + '{"id": "bad"}\n' + rows.replace("r01.flac", "empty.wav", 1)
    )
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("train.jsonl", "twice.jsonl"))
    model = coatkit.load(folder, device="cpu")
    assert len(list(hear._refs(model))) == 17
    assert len(list(hear._clips(model, "audio", 600.0))) == 16
    data = yaml.safe_load(spec.read_text())
    data["data"]["train"]["filter"] = {"min_seconds": 0.29}
    spec.write_text(yaml.safe_dump(data))
    assert len(list(hear._refs(model))) == 8


def test_a_sound_that_was_fitted_on_is_named() -> None:
    about = hear.Fit(0.5, 20, 2, 30.0, 1.0, ("this",))
    assert view._about(about, "this")[1:] == ["This very sound is among those it was fitted on."]
    (only,) = view._about(about, "other")
    assert "on 2 others it explains 50%" in only
    assert "fitted on 18 training clips" in only


def test_without_the_data_nothing_is_decoded_and_the_rest_is_shown(
    thinking_run: Any, clip: AudioRef, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(thinking_run.run.folder, folder, ignore=shutil.ignore_patterns("view"))
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("train.jsonl", "gone.jsonl"))
    found = view.look(coatkit.load(folder, device="cpu"), clip)
    assert found.hearing is None
    assert "gone.jsonl" in found.silent
    assert set(found.scores) == {"audio", "level"}
    made = view.write(found, tmp_path / "out").read_text()
    assert "Not decoded: " in made
    assert "gone.jsonl" in made
    assert made.count("<audio") == 1
    assert any("not decoded" in line for line in view.lines(found))
    assert "gone.jsonl" in json.loads((tmp_path / "out/results.json").read_text())["not_decoded"]


OWN = """
import torch
def decode(features, rate):
    return torch.full((round(len(features) * 100 / rate), 80), -1.0)
def tone(features, rate):
    return torch.sin(torch.arange(8000) * 0.3), 8000
def wrong(features, rate):
    return torch.zeros(3, 7)
def breaks(features, rate):
    raise KeyError("codebook")
"""


def test_a_decoder_of_the_users_own(seen: view.View, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    features = seen.heard.predicted["audio"]
    mel, samples = hear.decoded(hear.own_decoder(str(file)), features, 25.0, 8000)
    assert mel.shape == (4 * len(features), 80)
    assert samples.shape == (8000,)
    mel, samples = hear.decoded(hear.own_decoder(f"{file}:tone"), features, 25.0, 20_000)
    assert mel.shape == (126, 80)
    assert np.abs(samples[:16_000]).max() > 0.9
    assert not samples[16_000:].any()
    with pytest.raises(PluginError, match=r"it gave \(3, 7\); wanted are finite log-mel frames \[T, 80\]"):
        hear.decoded(hear.own_decoder(f"{file}:wrong"), features, 25.0, 8000)
    with pytest.raises(PluginError, match="it failed: KeyError: 'codebook'"):
        hear.decoded(hear.own_decoder(f"{file}:breaks"), features, 25.0, 8000)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("model.pt", r"a decoder is given as FILE\.py.*docs/analysis\.md says how to wrap one, Sim-Whisper's too"),
        ("gone.py", r"there is no file .*gone\.py"),
        ("own.py:dekode", "has no function 'dekode'"),
        ("bad.py", "importing it failed: ModuleNotFoundError: No module named 'sim_whisper'"),
    ],
)
def test_a_decoder_that_cannot_be_taken_is_named(use: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "bad.py").write_text("import sim_whisper\n")
    with pytest.raises(PluginError, match=said):
        hear.own_decoder(str(tmp_path / use))


def test_the_users_decoder_takes_the_linear_ones_place(model: AudioThinker, clip: AudioRef, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    found = view.look(model, clip, decoder=str(tmp_path / "own.py"), decoder_seconds=0)
    assert found.hearing is not None
    assert found.hearing.how == ["Decoded by own.py, the decoder it was given."]
    assert found.hearing.mels["target"].shape == found.hearing.mels["prediction"].shape
    assert view.look(model, clip, decoder_seconds=0).hearing is None


# What is seen


def test_numbers_are_those_of_what_is_thought(model: AudioThinker, seen: view.View, clip: AudioRef) -> None:
    (thought,) = model.think([asked(clip, "What is heard?")], targets=True)
    (heard,) = thought.sounds
    for name in ("audio", "level"):
        cosine = torch.nn.functional.cosine_similarity(heard.predicted[name], heard.target[name], dim=-1).mean()
        assert seen.scores[name]["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert "frame F1" in seen.scores["level"]
    assert "frame F1" not in seen.scores["audio"]
    assert seen.answer == model.ask(clip, "What is heard?", max_new_tokens=4)
    assert seen.seconds == pytest.approx(0.475)
    assert seen.random == ("backbone",)


def test_everything_is_written(seen: view.View, tmp_path: Path) -> None:
    path = view.write(seen, tmp_path / "deep/out")
    files = {one.name for one in path.parent.iterdir()}
    assert files == {
        "view.html",
        "results.json",
        "expert-audio.png",
        "expert-level.png",
        "decoded.png",
        "decoded-target.wav",
        "decoded-prediction.wav",
    }
    for name in ("target", "prediction"):
        samples, rate = soundfile.read(path.parent / f"decoded-{name}.wav")
        assert (len(samples), rate) == (round(0.475 * hear.RATE), hear.RATE)
    found = json.loads((path.parent / "results.json").read_text())
    assert found["experts"]["audio"]["cosine"] == seen.scores["audio"]["cosine"]
    assert found["random_weights"] == ["backbone"]
    assert found["decoded"]["error_db"]["target"] > 0
    before = {one.name: one.read_bytes() for one in path.parent.iterdir()}
    view.write(seen, path.parent)
    assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == before


def test_what_is_not_defined_is_null_in_the_numbers(seen: view.View) -> None:
    odd = replace(seen, scores={"level": {"frame F1": math.nan, "cosine": 0.5}})
    assert view.results(odd)["experts"]["level"] == {"frame F1": None, "cosine": 0.5}
    assert any("frame F1 - (nothing present)" in line for line in view.lines(odd))


def test_a_folder_that_cannot_be_written_is_named(seen: view.View, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/out: cannot be written .*--out"):
        view.write(seen, tmp_path / "file/out")


def test_an_expert_that_did_not_run_is_shown_by_its_prediction_alone(seen: view.View) -> None:
    heard = replace(seen.heard, target={}, target_readout={})
    lone = replace(seen, heard=heard, scores={}, unheard={"level": "no weights; coatkit fetch SPEC"})
    drawn = dict.fromkeys(DRAWN, b"")
    assert "the expert did not run here: no weights; coatkit fetch SPEC" in view.page_of(lone, drawn)
    figure = view_plots.expert("level", heard, seen.seconds)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["prediction: level", "prediction: features"]


def test_target_and_prediction_share_scale_order_and_time(seen: view.View) -> None:
    figure = view_plots.expert("level", seen.heard, seen.seconds)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[:4] == ["target: level", "prediction: level", "target: features", "prediction: features"]
    assert titles[4] == "cosine of prediction and target"
    figure.draw_without_rendering()
    for one, other in ((0, 1), (2, 3)):
        images = [figure.axes[i].images[0] for i in (one, other)]
        assert images[0].get_clim() == images[1].get_clim()
        assert images[0].get_extent() == images[1].get_extent()
        names = [[label.get_text() for label in figure.axes[i].get_yticklabels()] for i in (one, other)]
        assert names[0] == names[1]
    for axis in figure.axes:
        box = axis.get_position()
        assert (box.x0, box.x1) == pytest.approx(view_plots.SPAN)
        assert axis.get_xlim() == pytest.approx((0, seen.seconds))


def test_features_that_change_together_stand_together() -> None:
    time = torch.linspace(0, 6.28, 40)[:, None]
    target = torch.cat([time.sin(), time.cos(), -time.sin(), -time.cos()] * 8, 1)
    dims = view_plots.order(target)
    assert sorted(dims.tolist()) == list(range(32))
    kinds = (dims % 4).tolist()
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes <= 4  # the circle may be cut within a kind
    assert view_plots.gathered(target[:, dims]).shape == (40, 32)
    wide = view_plots.gathered(torch.arange(2000.0).expand(3, -1))
    assert wide.shape == (3, view_plots.ROWS)
    assert (wide[0].diff() > 0).all()
    for positions in (1, 2):
        assert len(view_plots.order(torch.randn(positions, 5))) == 5
    for width in (1, 2):
        assert sorted(view_plots.order(torch.randn(40, width)).tolist()) == list(range(width))


def _pitches(note: int, values: torch.Tensor | None = None) -> Readout:
    hertz = tuple(27.5 * 2 ** ((b - 1) / 36) for b in range(264))
    made = torch.zeros(10, 264)
    made[:, (note - 21) * 3 + 1] = 0.9
    return Readout("pitch", made if values is None else values, ("",) * 264, hertz=hertz, threshold=0.3)


@pytest.mark.parametrize("note", [21, 60, 69, 108])
def test_a_note_stands_at_its_name(note: int) -> None:
    shown, ticks, axis, _ = view_plots._frequencies([_pitches(note)])
    assert axis == "note"
    at = int(shown[0][0].argmax())
    named = {name: place for place, name in ticks}
    below = max(n for n in range(note, note - 12, -1) if n % 12 == 0)
    if f"C{below // 12 - 1}" in named:
        assert at - named[f"C{below // 12 - 1}"] == pytest.approx(3 * (note - below), abs=0.01)
    else:
        assert note == 21  # A0 has no C below it on this axis
        assert named["C1"] - at == pytest.approx(9, abs=0.01)


def test_silence_has_a_pitch_plot_too() -> None:
    heard = Heard(25.0, torch.zeros(10, 4), {"p": torch.zeros(10, 6)}, {"p": torch.zeros(10, 6)})
    quiet = _pitches(60, torch.zeros(10, 264))
    heard.readout["p"], heard.target_readout["p"] = quiet, quiet
    assert len(plots.png(view_plots.expert("p", heard, 0.4))) > 1000


def test_the_strongest_classes_of_either_are_named() -> None:
    labels = tuple(f"class {i}" for i in range(50))
    target = Readout("sound events", torch.zeros(5, 50), labels)
    predicted = replace(target, values=torch.zeros(5, 50))
    target.values[2, 7], target.values[3, 9], predicted.values[0, 41] = 0.9, 0.7, 0.8
    shown, ticks, _, _ = view_plots._classes([target, predicted])
    names = [name for _, name in ticks]
    assert names[-2:] == ["class 9", "class 7"]  # the target's strongest stands above
    assert "class 41" in names
    assert float(shown[1][0, names.index("class 41")]) == pytest.approx(0.8)
    long = replace(target, labels=("x" * 80,) * 50)
    assert len(view_plots._classes([long, long])[1][0][1]) == 28


# The page


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _tags(text: str) -> _Tags:
    found = _Tags()
    found.feed(text)
    return found


DRAWN = ("expert-audio", "expert-level", "decoded")
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&\u202e'


def test_nothing_from_the_data_becomes_markup(seen: view.View) -> None:
    readouts = {n: replace(r, name=EVIL, labels=(EVIL,) * 2) for n, r in seen.heard.readout.items()}
    heard = Heard(
        25.0,
        seen.heard.states,
        {EVIL: seen.heard.predicted["level"], "lone": seen.heard.predicted["level"]},
        {EVIL: seen.heard.target["level"]},
        {EVIL: readouts["level"]},
        {EVIL: readouts["level"]},
    )
    assert seen.hearing is not None
    bad = replace(
        seen,
        run=EVIL,
        title=EVIL,
        question=EVIL,
        answer=EVIL,
        heard=heard,
        scores={EVIL: seen.scores["level"]},
        hearing=replace(seen.hearing, how=[EVIL]),
        silent=EVIL,
        unheard={"lone": EVIL},
        random=(EVIL, f"experts.{EVIL}"),
    )
    for one in (bad, replace(bad, hearing=None)):
        made = view.page_of(one, {f"expert-{EVIL}": b"x", "expert-lone": b"x", "decoded": b"x"})
        tags = _tags(made)
        assert [t for t, _ in tags.found].count("script") == 2  # the data and the page's own
        assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
        assert all(a["src"].startswith("data:image/png;base64,") for t, a in tags.found if t == "img")
        assert "\u202e" not in made  # it would turn the words after it around
        inside = re.search(r'<script type="application/json" id="results">(.*?)</script>', made, re.DOTALL)
        assert inside is not None
        assert json.loads(inside[1])["sound"] == EVIL
        assert "onerror" in "".join(tags.words)  # it stands there, as words


def test_the_page_stands_alone_and_says_what_its_pictures_show(seen: view.View, tmp_path: Path) -> None:
    made = view.write(seen, tmp_path).read_text()
    tags = _tags(made)
    sources = [a[k] for _, a in tags.found for k in ("src", "href") if k in a]
    assert len(sources) == 3 + 3  # players and pictures
    assert all(source.startswith("data:") for source in sources)
    alternatives = [a.get("alt") for t, a in tags.found if t == "img"]
    assert all(alternative and len(alternative) > 40 for alternative in alternatives)
    assert "strongest level of the target" in alternatives[-1]
    assert all(a.get("aria-label") for t, a in tags.found if t == "audio")
    lines = [a for _, a in tags.found if "data-seconds" in a]
    assert len(lines) == 3
    assert all(float(a["data-seconds"]) == pytest.approx(0.475, abs=1e-3) for a in lines)
    text = "".join(tags.words)
    assert "Random weights in backbone" in text
    assert "Question: What is heard?" in text
    answered = "".join(_tags(view.page_of(replace(seen, answer="a dog"), dict.fromkeys(DRAWN, b""))).words)
    assert "\na dog\n" in answered


def test_only_the_pages_own_script_may_run(seen: view.View) -> None:
    import base64
    import hashlib

    made = page.page("t", [page.paragraph("<i>")])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)
    script = re.search(r"<script>(.*?)</script>", made, re.DOTALL)
    assert policy is not None
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1]
    assert "&lt;i&gt;" in made
    assert "<" not in page.data("d", "</script x").split(">", 1)[1].rpartition("</script>")[0]


def test_what_cannot_be_seen_is_shown_and_joined_letters_stay_joined() -> None:
    assert page.text("a\x00b\u202e\nc") == "a\\u0000b\\u202e\nc"
    assert (
        page.text("\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c")
        == "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c"
    )


# The command


def test_the_command_shows_a_sound(
    thinking_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    sound = thinking_run.folder / "clips/r15.flac"
    options = ["--question", "What?", "--start", "0.1", "--end", "0.4", "--max-new-tokens", "2", "--device", "cpu"]
    assert run(monkeypatch, "view", str(thinking_run.run.folder), str(sound), *options) == 0
    out, err = capsys.readouterr()
    assert out.startswith("RANDOM WEIGHTS in backbone")
    assert "\naudio: cosine " in out
    assert "frame F1" in out
    assert "\nanswer: " in out
    assert "Traceback" not in err
    path = Path(out.splitlines()[-1].removeprefix("page: "))
    assert path.parent.parent == thinking_run.run.folder / "view"
    assert path.parent.name.startswith("r15-0.1-0.4-")
    assert "r15.flac, 0.1 s to 0.4 s" in path.read_text()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--end", "0.1", "--start", "0.2"], 2, "--end 0.1 is not after --start 0.2"),
        (["--untrained", "--step", "3"], 2, "there is no step before training"),
        (["--step", "4"], 3, "has no checkpoint of step 4; there: 3, 6"),
        (["--start", "9"], 3, "lies outside its 0.47 s"),
        (["--decoder", "x.ckpt"], 2, "a decoder is given as FILE.py"),
    ],
)
def test_what_is_wrong_with_the_call_is_told_before_the_model_is_loaded(
    thinking_run: Any,
    options: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("coatkit.infer.load", lambda *a, **k: pytest.fail("the model was loaded"))
    sound = thinking_run.folder / "clips/r15.flac"
    assert run(monkeypatch, "view", str(thinking_run.run.folder), str(sound), *options) == code
    assert said in capsys.readouterr().err


def test_a_run_without_a_block_has_nothing_to_see(new_project: Callable[[], Any], clip: AudioRef) -> None:
    project = new_project()
    project.spec["thinking"] = "off"
    made = project.train("stages.0.steps=1", "stages.1.steps=1")
    with pytest.raises(RunError, match=r"thinking: off.*nothing to see"):
        view.look(coatkit.load(made.folder, device="cpu"), clip)


def test_before_training_there_is_something_to_see(thinking_run: Any, clip: AudioRef) -> None:
    found = view.look(coatkit.load(thinking_run.run.folder, trained=False, device="cpu"), clip, decoder_seconds=0)
    assert found.step == 0
    drawn = dict.fromkeys(DRAWN, b"")
    assert "before training" in view.page_of(found, drawn)


def test_a_file_and_stretch_have_one_folder() -> None:
    names = {
        view.folder_name(AudioRef(Path("a/x y<.wav")), 3),
        view.folder_name(AudioRef(Path("b/x y<.wav")), 3),
        view.folder_name(AudioRef(Path("a/x y<.wav"), 1.0), 3),
        view.folder_name(AudioRef(Path("a/x y<.wav"), 1.0, 2.5), 3),
        view.folder_name(AudioRef(Path("a/x y<.wav")), 4),
    }
    assert len(names) == 5
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
