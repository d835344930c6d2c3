"""The study in examples/mini-study: its rows share nothing between splits, and its arms are what the protocol says."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from coatkit.analysis.ablate_arms import arms_of
from coatkit.analysis.ablate_job import is_trained
from coatkit.analysis.ablate_study import read_study
from coatkit.checkpoint import FORMAT
from coatkit.data.rows import JsonlRows

STUDY = Path(__file__).parents[1] / "examples/mini-study"


def clip(number: int, split: str, **known: Any) -> dict[str, Any]:
    return {"audio": f"audio/{number:04d}.flac", "seconds": 0.5, "split": split, "license": "none claimed", **known}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study beside 200 clips of silence that are labelled as make_data.py labels its own."""
    place = tmp_path_factory.mktemp("examples") / "mini-study"
    shutil.copytree(STUDY, place)
    shutil.copytree(STUDY.parent / "mini-backbone", place.parent / "mini-backbone")
    (place / "data/audio").mkdir(parents=True)
    draw, clips = random.Random(0), []
    for split, count in (("train", 160), ("heldout", 40)):
        for i in range(count):
            number = len(clips)
            voice = f"espeak:{split}{i % 3}"
            said = {"kind": "speech", "text": draw.choice(["red", "a red door", "one two three four"])}
            clips.append([
                clip(number, split, **said, voice=voice, gender=draw.choice(["man", "woman"])),
                clip(number, split, kind="music", instrument=draw.choice(["piano", "flute"]), key=draw.randint(40, 80)),
                clip(number, split, kind="noise", sound=draw.choice(["clap", "bird"])),
                clip(number, split, kind="noise", sound="bird") | {"seconds": 3.5},
            ][i % 4])  # fmt: skip
            soundfile.write(place / "data" / clips[-1]["audio"], np.zeros(8000, "float32"), 16_000)
    (place / "data/clips.jsonl").write_text("".join(json.dumps(one) + "\n" for one in clips))
    (place / "data/Resemblyzer-0.1.4-py3-none-any.whl").touch()
    make_rows(place, 52)
    return place


def make_rows(place: Path, rows: int) -> None:
    before, path = sys.argv, list(sys.path)
    sys.argv = ["make_rows.py", "--data", str(place / "data"), "--rows", str(rows)]
    try:
        runpy.run_path(str(place / "make_rows.py"), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path
        for name in ("align", "music", "rows"):
            sys.modules.pop(name, None)


def test_nothing_held_out_is_trained_on(folder: Path) -> None:
    warm_up, train, heldout = (
        list(JsonlRows(folder / f"data/study-{name}.jsonl")) for name in ("warm-up", "train", "heldout")
    )
    assert {row.labels["task"] for row in warm_up} == {"speaker"}
    train += warm_up
    for key in (lambda row: row.audios[0].path.name, lambda row: row.labels.get("voice")):
        shared = {key(row) for row in train} & {key(row) for row in heldout}
        assert not shared - {None}
    assert {row.labels["voice"] for row in train if "voice" in row.labels} == {f"espeak:train{i}" for i in range(3)}
    asked = [(row.audios[0].path.name, row.labels["task"]) for row in heldout]
    assert len(asked) == len(set(asked))


def test_rows_ask_what_the_protocol_says(folder: Path) -> None:
    train = list(JsonlRows(folder / "data/study-train.jsonl"))
    shares = Counter(row.labels["task"] for row in train)
    assert shares == {"transcription": 12, "speaker": 16, "pitch": 6, "instrument": 10, "sound": 8}
    for row in train:
        answer, task = row.messages[-1].content, row.labels["task"]
        assert (row.audios[0].end or 0) <= 2.0
        if task == "pitch":
            key = row.labels["key"]
            assert answer == ("low" if key < 55 else "middle" if key < 67 else "high")
        if task == "transcription":
            assert answer in ("red", "a red door")


def test_rows_are_drawn_alike_each_time(folder: Path) -> None:
    before = (folder / "data/study-train.jsonl").read_bytes()
    make_rows(folder, 52)
    assert (folder / "data/study-train.jsonl").read_bytes() == before


def test_arms_are_comparable_but_for_what_they_are_about(folder: Path) -> None:
    study = read_study(folder / "study.yml")
    arms, notes = arms_of(study)
    assert not notes
    assert len(study.spec.seeds) >= 3
    by_name = {arm.name: arm for arm in arms}
    experts = {name: list(arm.spec.experts) for name, arm in by_name.items()}
    every = ["audio", "basic-pitch", "speaker"]
    assert experts == {
        "sft": [], "block-only": [], "reconstruction": ["audio"], "with-pitch": every[:2], "all": every,
        "linear-heads": every, "half": every, "quarter": every, "calibrated": every,
    }  # fmt: skip
    assert by_name["sft"].spec.thinking is None
    for arm in arms:
        assert arm.spec.total_steps == 140
        assert arm.rows == 1120
        assert not arm.parts_from(by_name["sft"])
        taught = {name: stage.weights.get("audio", 0) for stage in arm.spec.stages for name in (stage.name,)}
        assert all(bool(weight) == ("audio" in arm.spec.experts) for weight in taught.values())
    thinking = {name: arm.spec.thinking.tokens_per_audio_token for name, arm in by_name.items() if arm.spec.thinking}
    assert {name: rate for name, rate in thinking.items() if rate != 1} == {"half": 0.5, "quarter": 0.25}


def test_every_closed_question_is_asked_in_words_and_by_likelihood(folder: Path) -> None:
    tasks = {task.name: task for task in read_study(folder / "study.yml").suite.tasks}
    assert tasks["transcription"].metric == "wer"
    for name in ("speaker", "pitch", "instrument", "sound"):
        words, likely = tasks[name], tasks[f"{name} (likelihood)"]
        assert (words.metric, likely.metric) == ("choice", "likelihood")
        assert words.choices == likely.choices
        assert words.data == likely.data


def test_what_is_kept_of_a_run_is_done_elsewhere_and_holds_no_weights(tmp_path: Path) -> None:
    collect = runpy.run_path(str(STUDY / "collect.py"))
    study, run = tmp_path / "study", tmp_path / "study/arms/all/seed-0"
    for step, stage in ((35, 1), (140, 2)):
        position = {"format": FORMAT, "step": step, "stage": stage, "stage_step": 0}
        write(run / f"checkpoints/step-{step:08d}/state.json", json.dumps(position))
        write(run / f"checkpoints/step-{step:08d}/model.safetensors", "weights")
    heavy = ("tensorboard/events", "probe/probe/states/step-1.safetensors", "probe/probe/probe.png")
    light = ("run.json", "metrics.jsonl", "evaluations/study/predictions.jsonl", "probe/probe/results.json")
    for name in (*light, *heavy):
        write(run / name, name)
    write(study / "results.json", "{}")
    collect["keep"](study, ["all/seed-0"], tmp_path / "kept.tar.xz")
    with tarfile.open(tmp_path / "kept.tar.xz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there/arms/all/seed-0"
    assert {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} == {
        "checkpoints/step-00000140/state.json", "run.json", "metrics.jsonl", "evaluations/study/predictions.jsonl",
        "probe/probe/results.json",
    }  # fmt: skip
    assert is_trained(there, stages=2)
    assert not is_trained(there, stages=3)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
