"""Training with the feature store against training without it, and `coatkit cache`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from coatkit import trainer
from coatkit.build import build
from coatkit.cli import cli
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch
from coatkit.errors import CoatkitError, DataError, RunError, SpecError
from coatkit.features import about_expert, open_stores, root_of
from coatkit.store import Store


def cache(project: Any, *arguments: str) -> str:
    """Run `coatkit cache`; what it printed."""
    found = CliRunner().invoke(cli, ["cache", str(project.write()), *arguments], catch_exceptions=True)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def losses(run: Any) -> list[dict[str, float]]:
    """Every loss term of every step."""
    return [{k: v for k, v in line.items() if "." in k or k in ("ce", "loss")} for line in run.metrics]


@pytest.fixture
def stored(project: Any) -> Any:
    project.spec["experts"]["audio"] = {"target": "tower"}
    project.spec["backbone"]["train"] = {"projector": "none"}
    project.spec["cache"] = {"names": ["level", "tower"], "dtype": "float32", "folder": "store"}
    return project


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was to be read from the store")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_the_store_equals_training_online(
    stored: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    online = stored.train("cache=[]", "output=online")
    said = cache(stored, "--yes")
    assert "level: 16 sounds added, 0 known" in said
    assert "tower: 16 sounds added, 0 known" in said
    made = trainer.build

    def without_encoders(*arguments: Any) -> Any:
        model = made(*arguments)
        monkeypatch.setattr(model.experts["level"], "encode", never)
        model.backbone.tower.layers[0].register_forward_hook(never)
        return model

    monkeypatch.setattr(trainer, "build", without_encoders)
    offline = stored.train("output=offline", f"data.workers={workers}")
    first, last = losses(online), losses(offline)
    assert [set(line) for line in first] == [set(line) for line in last]
    for name in ("level.mse",):  # the targets are equal to the bit; the tower ran sound by sound
        wanted = [line[name] for line in first if name in line]
        assert [line[name] for line in last if name in line] == pytest.approx(wanted, rel=1e-5)
    for a, b in zip(first, last, strict=True):
        assert b == pytest.approx(a, rel=2e-5)
    assert any("level.mse" in line for line in last)


def test_targets_are_those_of_online_training_to_the_bit(stored: Any) -> None:
    cache(stored, "--yes", "--expert", "level")
    loaded = stored.load("cache.names=[level]")
    model = build(loaded, "cpu")
    rows = JsonlRows(stored.folder / "train.jsonl")[3:9]
    stores = open_stores(loaded, model)
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True, stores=stores)
    computed = model.target("level", batch, None, batch.inputs.think_lengths)  # type: ignore[arg-type]
    assert torch.equal(batch.stored["level"], computed)
    assert computed.abs().sum() > 0


@pytest.mark.parametrize("use", ["mini", "qwen2-audio", "qwen2.5-omni", "audio-flamingo-3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tower_that_is_told_what_it_would_hear(project: Any, use: str, dtype: str) -> None:
    """Sounds of unlike length; the frames put in give the same states as running the tower, which is not run."""
    project.spec["backbone"].update(use=use, dtype=dtype)
    model = build(project.load(), "cpu").eval()
    backbone: Any = model.backbone
    rows = JsonlRows(project.folder / "train.jsonl")
    chosen = [rows[i] for i in (15, 2, 17, 9)]
    inputs = load_batch(chosen, backbone.preparer, (), 120.0, train=True).inputs
    with torch.no_grad():
        run = backbone.forward(inputs)
        inputs.tower = backbone.hear(inputs)
        assert torch.equal(inputs.tower, run.audio.tower)
        hook = backbone.tower.register_forward_pre_hook(lambda *_: None)
        conv = next(module for module in backbone.tower.modules() if isinstance(module, torch.nn.Conv1d))
        conv.register_forward_hook(never)
        told = backbone.forward(inputs)
        hook.remove()
    assert torch.equal(told.thinking, run.thinking)
    assert torch.equal(told.audio.tower, run.audio.tower)
    assert torch.equal(told.audio.consumed, run.audio.consumed)
    assert float(told.ce_sum) == float(run.ce_sum)
    inputs.tower = None
    with pytest.raises(AssertionError, match="read from the store"):  # and the tower is itself again
        backbone.forward(inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("int8", 2e-2)])
def test_smaller_values_change_losses_little(stored: Any, dtype: str, tolerance: float) -> None:
    stored.spec["cache"]["dtype"] = dtype
    online = stored.train("cache=[]", "output=online")
    cache(stored, "--yes")
    for a, b in zip(losses(online), losses(stored.train("output=offline")), strict=True):
        assert b == pytest.approx(a, rel=tolerance)


def test_it_goes_on_where_it_stopped_and_meets_each_sound_once(stored: Any) -> None:
    copy = (stored.folder / "clips/r03.flac").read_bytes()
    (stored.folder / "clips/other-name.flac").write_bytes(copy)
    talk = [{"role": "user", "content": "<audio>Again?"}, {"role": "assistant", "content": "yes"}]
    stored.add_row(id="again", messages=talk, audio="clips/other-name.flac")
    stored.add_row(id="part", messages=talk, audio="clips/r15.flac", start=0.1, end=0.3)
    assert "level: 17 sounds added, 1 known" in cache(stored, "--yes", "--expert", "level")
    assert "level: 0 sounds added, 18 known" in cache(stored, "--yes", "--expert", "level")
    stored.add_clip("new", torch.linspace(-0.5, 0.5, 4000).numpy())
    assert "level: 1 sounds added, 18 known" in cache(stored, "--yes", "--expert", "level")


def test_size_is_told_and_asked_about(stored: Any) -> None:
    path = str(stored.write())
    found = CliRunner().invoke(cli, ["cache", path], input="n\n")
    assert found.exit_code == 1
    assert "level: 0.00 h of sound, about" in found.output
    assert "at most as float32" in found.output
    assert "that are free" in found.output
    assert not list((stored.folder / "store").glob("*/*.safetensors"))
    assert CliRunner().invoke(cli, ["cache", path], input="y\n").exit_code == 0
    assert len(list((stored.folder / "store").glob("*/*.safetensors"))) == 2


def test_rows_that_cannot_be_read_are_named_and_left_out(stored: Any) -> None:
    stored.rows[4]["audio"] = "clips/gone.wav"
    said = cache(stored, "--yes", "--expert", "level")
    assert "level: 15 sounds added" in said
    assert "left out:" in said
    assert "train.jsonl:5 (row r04): " in said


def test_verifying_removes_what_is_damaged(stored: Any) -> None:
    cache(stored, "--yes")
    assert "2 shards in 2 folders" in cache(stored, "--verify")
    shard = sorted((stored.folder / "store").glob("level*/*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 8
    shard.write_bytes(content)
    with pytest.raises(RunError, match="1 of 2 shards were damaged and are removed; add them again"):
        cache(stored, "--verify")
    assert "level: 16 sounds added" in cache(stored, "--yes")


def test_a_sound_that_is_missing_stops_training_and_names_it(stored: Any) -> None:
    with pytest.raises(RunError, match=r"no float32 features of 'level' .*coatkit cache SPEC"):
        stored.train()
    cache(stored, "--yes")
    stored.add_clip("late", torch.linspace(-0.5, 0.5, 4000).numpy())
    for policy in ("refuse", "quarantine"):  # it is no bad row, and is not set aside as one
        with pytest.raises(CoatkitError, match=r"late.*not among the 16 sounds of .*add what is missing with"):
            stored.train(f"data.on_bad_row={policy}", f"output={policy}", "stages.1.steps=12")


def test_features_of_another_expert_are_not_taken(stored: Any) -> None:
    cache(stored, "--yes")
    for change in ("experts.level.gain=2", "cache.dtype=float16", "thinking.tokens_per_audio_token=0.5"):
        with pytest.raises(RunError, match="there are no"):
            stored.train(change, "output=other")


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], type[CoatkitError], str]] = {
    "unknown name": (lambda spec: spec.update(cache=["lewel"]), SpecError, "no expert is called 'lewel'; did you mean"),
    "the backbone's own": (lambda spec: spec.update(cache=["audio"]), RunError, "store `tower` instead"),
    "a tower that learns": (
        lambda spec: (spec.update(cache=["tower"]), spec["backbone"].update(train={"tower": "full"})),
        RunError,
        "something in the audio tower learns",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_stored_is_refused(project: Any, case: str) -> None:
    change, error, said = WRONG[case]
    change(project.spec)
    with pytest.raises(error, match=said):
        cache(project, "--yes")
    with pytest.raises(error, match=said):
        project.train()


def test_nothing_named_is_said(project: Any) -> None:
    with pytest.raises(RunError, match="names nothing to store; write `cache:"):
        cache(project)
    with pytest.raises(RunError, match="has no expert 'mine'; there are: audio, level, tower"):
        cache(project, "--expert", "mine")
    with pytest.raises(RunError, match="--python runs one expert"):
        cache(project, "--expert", "tower", "--python", "python3")


def test_encoders_that_fail_are_named(stored: Any) -> None:
    code = (stored.folder / "level.py").read_text()
    (stored.folder / "level.py").write_text(code.replace("hop = 160", "hop = 160 // 0"))
    with pytest.raises(CoatkitError, match="expert 'level': encode failed"):
        cache(stored, "--yes", "--expert", "level")


def test_a_run_of_text_alone_needs_no_sound_in_the_store(stored: Any) -> None:
    cache(stored, "--yes")
    loaded = stored.load()
    model = build(loaded, "cpu")
    rows = JsonlRows(stored.folder / "train.jsonl")[16:20]
    stores = open_stores(loaded, model)
    batch = load_batch(rows, model.backbone.preparer, (), 120.0, train=True, stores=stores)
    assert batch.stored == {}
    assert batch.inputs.tower is None
    assert "ce" in model(batch, ["level"]).sums


def test_the_store_is_found_by_what_the_features_are(stored: Any) -> None:
    cache(stored, "--yes", "--expert", "level")
    loaded = stored.load()
    expert = build(loaded, "cpu").experts["level"]
    folder = about_expert("level", expert, 25.0, "float32").folder(root_of(loaded))
    assert len(Store(folder)) == 16
    said = json.loads((folder / "about.json").read_text())
    assert said["identity"]["fingerprint"] == expert.fingerprint()
    assert Path(folder).parent == stored.folder / "store"


def test_a_bad_row_is_still_a_bad_row(stored: Any) -> None:
    cache(stored, "--yes")
    (stored.folder / "clips/r02.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"r02\.wav"):
        stored.train()


ELSEWHERE = '''
import os
import torch
from coatkit import Expert, Features


class Elsewhere(Expert):
    """Loads only where OTHER is set, as an expert does whose packages are in another environment."""

    sample_rate, frame_rate, dim = 8_000, 50.0, 2

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def load(self, device, dtype):
        if "OTHER" not in os.environ:
            raise ImportError("no module named 'conflicting'")

    def encode(self, audio):
        frames = -(-audio.lengths // 160)
        padded = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * 160 - audio.samples.shape[1]))
        power = self.gain * padded.unflatten(1, (-1, 160)).square().mean(-1, keepdim=True)
        return Features(torch.cat([power, -power], -1), frames, self.frame_rate)
'''


def test_an_expert_of_another_interpreter_teaches_here(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.folder / "elsewhere.py").write_text(ELSEWHERE)
    project.spec["experts"]["level"] = {"use": "./elsewhere.py:Elsewhere", "gain": 2.0}
    project.spec["cache"] = {"names": ["level"], "dtype": "float32", "folder": "store"}
    with pytest.raises(CoatkitError, match="no module named 'conflicting'"):
        project.train()
    monkeypatch.setenv("OTHER", "1")
    said = cache(project, "--yes", "--expert", "level", "--python", sys.executable)
    assert "level: 16 sounds added" in said
    online = project.train("cache=[]", "output=online")
    monkeypatch.delenv("OTHER")
    offline = project.train("output=offline")
    assert losses(offline) == losses(online)
    with pytest.raises(CoatkitError, match="no module named 'conflicting'"):  # other options are other features
        project.train("experts.level.gain=3", "output=other")
