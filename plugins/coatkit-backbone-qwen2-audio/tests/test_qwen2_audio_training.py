"""A run of two stages through coatkit's own trainer, and the trained model answering."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml

from coatkit import infer
from coatkit.spec_file import load_spec
from coatkit.testing.sounds import tone
from coatkit.trainer import train

RATE = 16_000
LOUDNESS = '''
import torch
from coatkit import Expert, Features


class Loudness(Expert):
    """Root mean square of each 1/50 s; hears 8 kHz."""

    sample_rate, frame_rate, dim = 8_000, 50.0, 1

    def encode(self, audio):
        frames = -(-audio.lengths // 160)
        samples = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * 160 - audio.samples.shape[1]))
        return Features(samples.unflatten(1, (-1, 160)).square().mean(-1, keepdim=True).sqrt(), frames, self.frame_rate)
'''


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: rows of one sound, of two, of 31 s in segments, and of text alone."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "loudness.py").write_text(LOUDNESS)
    rows: list[dict[str, Any]] = []
    for i, seconds in enumerate([0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 31.0]):
        soundfile.write(folder / f"{i}.wav", tone(seconds, RATE, i), RATE)
        rows.append({"id": f"one {i}", "messages": talk("<audio>What?", f"clip {i}"), "audio": f"{i}.wav"})
    rows.append({"id": "two", "messages": talk("<audio>or <audio>?", "The first."), "audios": ["0.wav", "1.wav"]})
    rows += [{"id": f"text {i}", "messages": talk(f"What is {i} plus 1?", str(i + 1))} for i in range(2)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"steps": 8, "lr": 5e-3, "batch": {"rows": 5}}
    spec = {
        "name": "tiny",
        "seed": 3,
        "backbone": {"use": "qwen2-audio", "weights": "random", "long_audio": "segments", "lora": {"rank": 4}},
        "experts": {"audio": {}, "loudness": {"use": "./loudness.py:Loudness"}},
        "head": {"use": "transformer", "heads": 4, "feedforward": 1.0},
        "data": {"train": "train.jsonl"},
        "stages": [
            {"name": "reconstruction", **stage, "weights": {"audio": 1.0}},
            {"name": "all", **stage, "weights": {"audio": 0.5, "loudness": 1.0}},
        ],
        "output": "run",
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    torch.set_num_threads(1)
    loaded = load_spec(path)
    train(loaded)
    return Path(loaded.output)


def test_losses_are_finite_and_fall(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 16
    assert all(math.isfinite(value) for step in steps for value in step.values() if isinstance(value, float))
    first, second = steps[:8], steps[8:]
    for stage, term, share in ((first, "ce", 1.0), (first, "audio.mse", 0.5), (second, "loudness.mse", 0.5)):
        values = [step[term] for step in stage]
        assert sum(values[-2:]) < share * sum(values[:2]), term


def test_the_trained_model_answers_long_sounds_too(run: Path) -> None:
    thinker = infer.load(run, device="cpu")
    before = infer.load(run, trained=False, device="cpu")
    sounds = [(tone(seconds, RATE, 9), RATE) for seconds in (0.5, 30.7)]
    for one in sounds:
        trained, fresh = (model.ask(one, "What?", max_new_tokens=8) for model in (thinker, before))
        assert trained != fresh
