"""Looking at what a run thinks: states, predictions, targets and readouts of rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import coatkit
from coatkit.data.rows import AudioRef, Message, Row
from coatkit.errors import RunError, SpecError
from coatkit.infer import AudioThinker, asked


@pytest.fixture(scope="module")
def model(thinking_run: Any) -> AudioThinker:
    return coatkit.load(thinking_run.run.folder, device="cpu")


@pytest.fixture(scope="module")
def rows(thinking_run: Any) -> list[Row]:
    clips = thinking_run.folder / "clips"
    two = (AudioRef(clips / "r02.wav"), AudioRef(clips / "r15.flac"))
    return [
        Row("one", (Message("user", "<audio>What?"), Message("assistant", "clip 1")), (AudioRef(clips / "r01.flac"),)),
        Row("none", (Message("user", "What is 3 plus 1?"),)),
        Row("two", (Message("user", "<audio><audio>Same?"),), two),
    ]


def test_each_sound_has_its_own_thinking(model: AudioThinker, rows: list[Row]) -> None:
    thoughts = model.think(rows, targets=True)
    assert [thought.row_id for thought in thoughts] == ["one", "none", "two"]
    assert [len(thought.sounds) for thought in thoughts] == [1, 0, 2]
    expected = model.prepare(rows).think_lengths.tolist()
    sounds = [sound for thought in thoughts for sound in thought.sounds]
    assert [len(sound.states) for sound in sounds] == expected
    for sound, positions in zip(sounds, expected, strict=True):
        assert sound.rate == 25
        assert sound.states.shape == (positions, model.backbone.hidden_size)
        assert set(sound.predicted) == set(sound.target) == {"audio", "level"}
        assert sound.predicted["level"].shape == sound.target["level"].shape == (positions, 2)
        assert set(sound.readout) == set(sound.target_readout) == {"level"}
        torch.testing.assert_close(sound.readout["level"].values, sound.predicted["level"].sigmoid())
        torch.testing.assert_close(sound.target_readout["level"].values, sound.target["level"].sigmoid())


def test_together_is_as_one_by_one(model: AudioThinker, rows: list[Row]) -> None:
    together = model.think(rows, targets=True)
    for row, thought in zip(rows, together, strict=True):
        (alone,) = model.think([row], targets=True)
        assert thought.last is not None
        assert alone.last is not None
        torch.testing.assert_close(thought.last, alone.last, atol=1e-4, rtol=1e-4)
        for one, other in zip(thought.sounds, alone.sounds, strict=True):
            torch.testing.assert_close(one.states, other.states, atol=1e-4, rtol=1e-4)
            for name in one.predicted:
                torch.testing.assert_close(one.predicted[name], other.predicted[name], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(one.target[name], other.target[name], atol=1e-4, rtol=1e-4)


def test_the_last_state_is_where_the_answer_begins(model: AudioThinker, rows: list[Row]) -> None:
    """The output matrix makes the first answer token of it."""
    logits = model.backbone.model.get_output_embeddings()(model.think(rows)[1].last[None])[0]
    logits[[*model.backbone.preparer.tokens.ids, model.backbone.preparer.audio_token]] = -torch.inf
    first = model.backbone.preparer.tokenizer.decode([int(logits.argmax())], skip_special_tokens=True).strip()
    assert model.answer(rows[1:2], max_new_tokens=1) == [first]


def test_states_and_predictions_are_those_of_training(thinking_run: Any, model: AudioThinker) -> None:
    """The heads' losses on a row, made by hand of what `think` gives, are those the training forward gives."""
    from coatkit.data.steps import load_batch

    row = Row(
        "r03",
        (Message("user", "<audio>What is heard?"), Message("assistant", "clip 3")),
        (AudioRef(thinking_run.folder / "clips/r03.flac"),),
    )
    (thought,) = model.think([row], targets=True)
    batch = load_batch([row], model.backbone.preparer, {8_000, 16_000}, 60, train=True)
    with torch.no_grad():
        losses = model.mind.model(batch, ["audio", "level"])
    count = int(batch.inputs.think_lengths.sum())
    (heard,) = thought.sounds
    for name in ("audio", "level"):
        by_hand = (heard.predicted[name] - heard.target[name]).square().mean() * count
        torch.testing.assert_close(by_hand, losses.sums[f"{name}.mse"], rtol=1e-4, atol=1e-5)


def test_experts_run_only_when_targets_are_asked_for(
    model: AudioThinker, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.mind.model.experts["level"]), "encode", lambda *a: pytest.fail("it was run"))
    assert model.think(rows)[0].sounds[0].target == {}
    assert model.think([]) == []


def test_samples_are_thought_about(model: AudioThinker, sound: Any) -> None:
    (thought,) = model.think([asked((sound(0.5), 16_000), "What?")])
    assert len(thought.sounds[0].states) == 12


def test_a_checkpoint_by_its_step(thinking_run: Any, rows: list[Row]) -> None:
    first = coatkit.load(thinking_run.run.folder, step=3, device="cpu")
    last = coatkit.load(thinking_run.run.folder, device="cpu")
    assert (first.step, last.step) == (3, 6)
    assert not torch.equal(first.think(rows)[0].sounds[0].states, last.think(rows)[0].sounds[0].states)
    assert not torch.equal(first.mind.model.heads["level"].state_dict()["out.weight"], torch.zeros(1))
    with pytest.raises(RunError, match="has no checkpoint of step 4; there: 3, 6"):
        coatkit.load(thinking_run.run.folder, step=4, device="cpu")


def test_before_training_heads_are_as_they_start(thinking_run: Any, rows: list[Row]) -> None:
    untrained = coatkit.load(thinking_run.run.folder, trained=False, device="cpu")
    again = coatkit.load(thinking_run.run.folder, trained=False, device="cpu")
    one, other = untrained.think(rows)[0].sounds[0], again.think(rows)[0].sounds[0]
    assert torch.equal(one.predicted["audio"], other.predicted["audio"])


def test_without_a_block_only_the_last_state_is_there(new_project: Callable[[], Any], rows: list[Row]) -> None:
    project = new_project()
    project.spec["thinking"] = "off"
    run = project.train("stages.0.steps=1", "stages.1.steps=1")
    (thought,) = coatkit.load(run.folder, device="cpu").think(rows[:1], targets=True)
    assert thought.last is not None
    assert thought.sounds[0].states.shape[0] == 0
    assert thought.sounds[0].predicted == {}


def test_an_expert_that_is_gone_is_named(thinking_run: Any, tmp_path: Path, rows: list[Row]) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(thinking_run.run.folder, folder)
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("level.py", "gone.py"))
    model = coatkit.load(folder, device="cpu")
    with pytest.raises(SpecError, match=r"experts\.level.*gone\.py"):
        model.think(rows)


def test_an_expert_without_weights_still_has_its_head(
    thinking_run: Any, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_ALLOW_CODE", "1")  # the expert's file is not the one that ran
    folder = tmp_path / "unfetched"
    shutil.copytree(thinking_run.run.folder, folder)
    source = (thinking_run.folder / "level.py").read_text()
    with_load = source + "\n    def load(self, device, dtype):\n        from coatkit import AssetError\n"
    (thinking_run.folder / "level.py").write_text(with_load + "        raise AssetError('no weights; fetch them')\n")
    try:
        model = coatkit.load(folder, device="cpu")
        sound = model.think(rows[:1], targets=True)[0].sounds[0]
    finally:
        (thinking_run.folder / "level.py").write_text(source)
    assert model.mind.unheard == {"level": "no weights; fetch them"}
    assert set(sound.predicted) == {"audio", "level"}
    assert set(sound.target) == {"audio"}
    assert sound.readout == {}


def test_a_model_of_no_run_has_no_heads() -> None:
    backbone = coatkit.load_backbone("mini", weights="random", device="cpu")
    with pytest.raises(RunError, match=r"heads and experts are a run's; load one with coatkit\.load"):
        AudioThinker(backbone, "mini").think([asked((np.zeros(8000, np.float32), 16_000), "What?")])
