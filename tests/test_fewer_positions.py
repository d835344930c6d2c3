"""Fewer thinking positions than audio tokens (`tokens_per_audio_token` 0.5, 0.25): one length everywhere.

Targets against numbers worked out by hand, a run that is trained, asked, timed and exported, and what is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import coatkit
from coatkit.align import align
from coatkit.analysis.latency_local import Candidate, Limits, ask, load_arms
from coatkit.backbones.chat import thinking_template
from coatkit.backbones.whisper import audio_tokens
from coatkit.build import build
from coatkit.cli import cli
from coatkit.data.rows import AudioRef, JsonlRows, Message, Row
from coatkit.data.steps import load_batch
from coatkit.errors import RunError, SpecError
from coatkit.export.write import export
from coatkit.infer import AudioThinker
from coatkit.protocols import Features
from coatkit.thinking import thinking_length

QUESTION = "What is heard?"


# How many positions, and what they cover


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.0, {1: 1, 2: 2, 25: 25, 83: 83}),
        (0.5, {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3, 7: 4, 25: 12, 27: 14, 83: 42}),  # halves go to the even number
        (0.25, {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 9: 2, 10: 2, 11: 3, 14: 4, 25: 6, 83: 21}),
    ],
)
def test_positions_of_a_sound(ratio: float, expected: dict[int, int]) -> None:
    assert {tokens: thinking_length(tokens, ratio) for tokens in expected} == expected


# Frames 0, 1, 4, 9, 16, ... of an expert, the audio tokens heard, and what each position must hold.
BY_HAND: dict[str, tuple[float, float, str, int, int, list[float]]] = {
    # ratio, the expert's rate, upsampling, its frames, audio tokens, targets
    "half, 25 Hz, even": (0.5, 25.0, "linear", 6, 6, [0.5, 6.5, 20.5]),
    "half, 25 Hz, odd, rounded down": (0.5, 25.0, "linear", 5, 5, [0.5, 6.5]),  # the last frame is in no position
    "half, 25 Hz, odd, rounded up": (0.5, 25.0, "linear", 7, 7, [0.5, 6.5, 20.5, 36.0]),  # half the last is sound
    "half, 25 Hz, one token": (0.5, 25.0, "linear", 1, 1, [0.0]),
    "quarter, 25 Hz, whole": (0.25, 25.0, "linear", 8, 8, [3.5, 31.5]),
    "quarter, 25 Hz, rounded down": (0.25, 25.0, "linear", 9, 9, [3.5, 31.5]),
    "quarter, 25 Hz, rounded up": (0.25, 25.0, "linear", 6, 6, [3.5, 20.5]),  # the mean of 16 and 25 alone
    "quarter, 25 Hz, one token": (0.25, 25.0, "linear", 1, 1, [0.0]),
    "quarter, 50 Hz": (0.25, 50.0, "linear", 16, 8, [17.5, 137.5]),
    "quarter, 10 Hz": (0.25, 10.0, "linear", 4, 10, [0.375, 3.875]),  # 0.6 of 1; 0.4 of 1, all of 4, 0.2 of 9; over 1.6
    "half, 3.125 Hz": (0.5, 3.125, "linear", 2, 12, [0.0, 0.0, 0.125, 0.375, 0.625, 0.875]),
    "quarter, 3.125 Hz": (0.25, 3.125, "linear", 3, 24, [0.0, 0.25, 0.75, 1.75, 3.25, 4.0]),
    "quarter, 3.125 Hz, repeated": (0.25, 3.125, "repeat", 3, 24, [0.0, 0.0, 1.0, 1.0, 4.0, 4.0]),
    "quarter, the same rate": (0.25, 6.25, "linear", 3, 12, [0.0, 1.0, 4.0]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_targets_worked_out_by_hand(case: str) -> None:
    ratio, rate, upsampling, frames, tokens, expected = BY_HAND[case]
    features = Features((torch.arange(float(frames)) ** 2)[None, :, None], torch.tensor([frames]), rate)
    lengths = torch.tensor([thinking_length(tokens, ratio)])
    found = align(features, lengths, 25.0 * ratio, upsampling)  # type: ignore[arg-type]
    assert found.flatten().tolist() == pytest.approx(expected)


def test_sounds_of_a_padded_batch_worked_out_by_hand() -> None:
    """Three sounds of 25 Hz at a quarter; the padding of the shorter ones is NaN."""
    values = torch.full((3, 10, 1), torch.nan)
    for sound, frames in enumerate((10, 3, 6)):
        values[sound, :frames, 0] = 10.0**sound * torch.arange(float(frames))
    lengths = torch.tensor([thinking_length(n, 0.25) for n in (10, 3, 6)])
    found = align(Features(values, torch.tensor([10, 3, 6]), 25.0), lengths, 6.25)
    assert found[..., 0].tolist() == [[1.5, 5.5], [10.0, 0.0], [150.0, 450.0]]


# In the model


def clips(sound: Callable[..., Any], *seconds: float) -> tuple[AudioRef, ...]:
    return tuple(AudioRef(Path(f"clip{i}"), samples=(sound(s, i), 16_000)) for i, s in enumerate(seconds))


def talk(*turns: str, sounds: tuple[AudioRef, ...] = ()) -> Row:
    return Row("row", tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(turns)), sounds)


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_the_backbones_own_features_are_taught_as_means(project: Any, sound: Any, ratio: float) -> None:
    """Reconstruction: each position is taught the mean of the audio tokens it covers; a short last one of what is left.

    A row with two sounds, one of text, one of two turns: sounds of 10, 3, 1, 7 and 5 audio tokens.
    """
    project.spec["thinking"] = {"tokens_per_audio_token": ratio}
    model = build(project.load(), "cpu").eval()
    heard = clips(sound, 0.4, 0.12, 0.04, 0.28, 0.2)
    rows = [
        talk("<audio>One, <audio>two?", "yes", sounds=heard[:2]),
        talk("What is 1 plus 1?", "2"),
        talk("<audio>And?", "a", "<audio><audio>Same?", "b", sounds=heard[2:]),
    ]
    batch = load_batch(rows, model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
    tokens = batch.inputs.audio_lengths.tolist()
    assert tokens == [10, 3, 1, 7, 5]
    assert batch.inputs.audio_row.tolist() == [0, 0, 2, 2, 2]
    assert batch.inputs.think_lengths.tolist() == ([5, 2, 1, 4, 2] if ratio == 0.5 else [2, 1, 1, 2, 1])
    # Every index stands on a thinking token, and none on another's.
    ids = batch.inputs.tokens["input_ids"]
    places = {
        (row, int(at))
        for row, index, mask in zip(
            batch.inputs.audio_row.tolist(), batch.inputs.think_index, batch.inputs.think_mask, strict=True
        )
        for at in index[mask]
    }
    think = model.backbone.preparer.tokens.think  # type: ignore[attr-defined]
    assert places == {tuple(at) for at in (ids == think).nonzero().tolist()}
    with torch.no_grad():
        out = model.backbone.forward(batch.inputs)
        assert out.audio is not None
        target = model.target("audio", batch, out.audio, batch.inputs.think_lengths)
    together = round(1 / ratio)
    for number, count in enumerate(tokens):
        for position in range(int(batch.inputs.think_lengths[number])):
            covered = out.audio.consumed[number, position * together : min((position + 1) * together, count)]
            torch.testing.assert_close(target[number, position], covered.float().mean(0), rtol=1e-5, atol=1e-6)
        assert (target[number, int(batch.inputs.think_lengths[number]) :] == 0).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 3.5])
def test_the_store_holds_the_same_targets(project: Any, ratio: float) -> None:
    """At 3.5 a sound just long enough to be heard has more positions than its seconds alone would give."""
    project.rows = []
    for number, samples in enumerate((321, 961, 6_400, 11_200)):
        project.add_clip(f"s{number}", torch.linspace(-0.5, 0.5, samples).numpy())
    project.spec["thinking"] = {"tokens_per_audio_token": ratio}
    project.spec["cache"] = {"names": ["level"], "dtype": "float32", "folder": "store"}
    project.spec["stages"] = [{"name": "one", "steps": 2, "lr": 1e-3, "batch": {"rows": 4}, "weights": {"level": 1.0}}]
    online = project.train("cache=[]", "output=online")
    done = CliRunner().invoke(cli, ["cache", str(project.write()), "--yes"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    stored = project.train("output=stored")
    assert [line["level.mse"] for line in stored.metrics] == [line["level.mse"] for line in online.metrics]


# A run


@pytest.fixture(scope="module")
def quarter(new_project: Callable[[], Any], sound: Callable[..., Any]) -> Any:
    """A run at a quarter that answers two sounds by heart, of 15 and 32 audio tokens."""
    project = new_project()
    project.rows = project.rows[-1:]
    for number, seconds in enumerate((0.6, 1.3)):
        project.add_clip(f"long{number}", sound(seconds, number), answer=f"it is number {number}")
    project.spec["thinking"] = {"tokens_per_audio_token": 0.25}
    project.spec["stages"] = [
        {"name": "one", "steps": 90, "lr": 1e-2, "batch": {"rows": 3}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    return project


@pytest.fixture(scope="module")
def model(quarter: Any) -> AudioThinker:
    return coatkit.load(quarter.run.folder, device="cpu")


def files(quarter: Any) -> list[Path]:
    return [quarter.folder / f"clips/long{i}.wav" for i in range(2)]


def test_it_learns_and_answers(quarter: Any, model: AudioThinker) -> None:
    for name in ("ce", "audio.mse", "level.mse"):
        seen = [line[name] for line in quarter.run.metrics]
        assert seen[-1] < 0.8 * seen[0], name
    assert [model.ask(file, QUESTION) for file in files(quarter)] == ["it is number 0", "it is number 1"]
    assert model.ask(None, "What is 3 plus 1?") == "4"


def test_what_is_thought_has_that_many_positions(quarter: Any, model: AudioThinker) -> None:
    for file, tokens in zip(files(quarter), (15, 32), strict=True):
        _, thought = model.ask(file, QUESTION, return_thinking=True, max_new_tokens=1)
        (heard,) = thought.sounds
        assert (heard.rate, len(heard.states)) == (6.25, thinking_length(tokens, 0.25))
        assert {name: len(values) for name, values in heard.predicted.items()} == dict.fromkeys(
            ("audio", "level"), len(heard.states)
        )


def test_the_block_that_is_timed_is_that_long(quarter: Any) -> None:
    models = load_arms(quarter.run.folder, ["vanilla", "coat"], device="cpu")
    rows = JsonlRows(quarter.folder / "train.jsonl")
    for row, positions in ((rows[1], 4), (rows[2], 8)):
        one = Candidate(row, 1.0)
        vanilla, coat = (ask(models[arm], arm, one, Limits(2, 2)) for arm in ("vanilla", "coat"))
        assert coat.forced_prefix == positions + 2
        assert coat.prompt_tokens == vanilla.prompt_tokens + positions + 2


BY_HAND_CODE = """
import sys
sys.modules["coatkit"] = None  # importing it fails
for folder, sound in zip(sys.argv[1::2], sys.argv[2::2]):
    code = open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0]
    code = code.replace('folder, sound = ".", "sound.wav"', f"folder, sound = {folder!r}, {sound!r}")
    exec(compile(code, folder, "exec"), {})
"""


def test_exported_it_answers_without_coatkit(quarter: Any, model: AudioThinker, tmp_path: Path) -> None:
    """The card's own code, which works out the length and gives it to the chat template."""
    folder = export(quarter.run.folder, tmp_path / "merged", merge=True).folder
    assert json.loads((folder / "coatkit.json").read_text())["thinking"]["tokens_per_audio_token"] == 0.25
    assert "every 4 audio tokens" in " ".join((folder / "README.md").read_text().split())
    words = [str(one) for file in files(quarter) for one in (folder, file)]
    done = subprocess.run([sys.executable, "-c", BY_HAND_CODE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [model.ask(file, QUESTION) for file in files(quarter)]


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_the_template_and_the_preparer_agree_on_every_length(ratio: float, sound: Any) -> None:
    backbone: Any = coatkit.load_backbone(
        "mini", weights="random", device="cpu", thinking={"tokens_per_audio_token": ratio}
    )
    preparer = backbone.preparer
    for samples in (321, 1_600, 1_900, 4_480, 16_000, 53_392):
        inputs = load_batch(
            [talk("<audio>What?", sounds=clips(sound, samples / 16_000))], preparer, (), 120.0, train=False
        ).inputs
        length = thinking_length(audio_tokens(samples), ratio)
        text = preparer.tokenizer.apply_chat_template(
            [{"role": "user", "content": "<sound>What?"}],
            chat_template=thinking_template(preparer),
            tokenize=False,
            add_generation_prompt=True,
            audio_think_len=length,
        )
        ids = preparer.tokenizer(text, add_special_tokens=False)["input_ids"]
        at = ids.index(preparer.audio_token)
        ids[at : at + 1] = [preparer.audio_token] * audio_tokens(samples)  # as a processor does
        assert ids == inputs.tokens["input_ids"][0].tolist()


# What is refused


@pytest.mark.parametrize("ratio", [0, -0.5, 4.5, ".nan", ".inf", "half", "[0.5, 0.25]"])
def test_no_ratio(project: Any, ratio: Any) -> None:
    path = project.write()
    path.write_text(path.read_text() + f"thinking: {{tokens_per_audio_token: {ratio}}}\n")
    with pytest.raises(SpecError, match=r"spec\.yaml:\d+: thinking\.tokens_per_audio_token: "):
        coatkit.spec_file.load_spec(path)


def test_a_run_keeps_its_ratio(project: Any) -> None:
    project.spec["checkpoint"]["every"] = 1
    run = project.train()
    (run.checkpoints[-1] / "state.json").unlink()
    with pytest.raises(RunError, match=r"changed since: .*thinking\.tokens_per_audio_token"):
        project.train("thinking.tokens_per_audio_token=0.5", resume=True)
