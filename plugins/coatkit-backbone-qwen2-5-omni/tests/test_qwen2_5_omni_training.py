"""A run of two stages through coatkit's own trainer, and what comes out of it in the stock model without any hook."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from coatkit import Inputs, infer
from coatkit.backbones.folder import transformers_quiet
from coatkit.spec_file import load_spec
from coatkit.testing.backbone_bench import a_row
from coatkit.testing.sounds import tone
from coatkit.trainer import train

RATE = 16_000
Load = Callable[..., Any]
Prepared = Callable[..., Inputs]
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
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: rows of one sound, of two, of 31 s, and of text alone; both audio targets."""
    place = tmp_path_factory.mktemp("project")
    (place / "loudness.py").write_text(LOUDNESS)
    rows: list[dict[str, Any]] = []
    for i, seconds in enumerate([0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 31.0]):
        soundfile.write(place / f"{i}.wav", tone(seconds, RATE, i), RATE)
        rows.append({"id": f"one {i}", "messages": talk("<audio>What?", f"clip {i}"), "audio": f"{i}.wav"})
    rows.append({"id": "two", "messages": talk("<audio>or <audio>?", "The first."), "audios": ["0.wav", "1.wav"]})
    rows += [{"id": f"text {i}", "messages": talk(f"What is {i} plus 1?", str(i + 1))} for i in range(2)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"steps": 8, "lr": 5e-3, "batch": {"rows": 5}}
    spec = {
        "name": "tiny",
        "seed": 3,
        "backbone": {"use": "qwen2.5-omni", "weights": str(folder), "lora": {"rank": 4}},
        "experts": {
            "audio": {},
            "tower": {"use": "audio", "target": "tower"},
            "loudness": {"use": "./loudness.py:Loudness"},
        },
        "head": {"use": "transformer", "heads": 4, "feedforward": 1.0},
        "data": {"train": "train.jsonl"},
        "stages": [
            {"name": "reconstruction", **stage, "weights": {"audio": 1.0, "tower": 1.0}},
            {"name": "all", **stage, "weights": {"audio": 0.5, "loudness": 1.0}},
        ],
        "output": "run",
    }
    path = place / "spec.yaml"
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
    terms = ((first, "ce", 1.0), (first, "audio.mse", 0.9), (first, "tower.mse", 0.9), (second, "loudness.mse", 0.5))
    for stage, term, share in terms:
        values = [step[term] for step in stage]
        assert sum(values[-2:]) < share * sum(values[:2]), (term, values)


def test_the_trained_model_expects_its_answers(run: Path, prepared: Prepared) -> None:
    """After short sounds and a long one; and it can be asked."""
    trained, before = (infer.load(run, trained=trained, device="cpu") for trained in (True, False))
    fallen = []
    for seconds, answer in ((0.3, "clip 2"), (0.6, "clip 4"), (30.7, "clip 6")):
        sound, losses = tone(seconds, RATE, 9), []
        for thinker in (trained, before):
            inputs = prepared(thinker.backbone, [a_row("a", "<audio>What?", answer)], [sound])
            with torch.no_grad():
                losses.append(float(thinker.backbone.forward(inputs).ce_sum))
            assert isinstance(thinker.ask((sound, RATE), "What?", max_new_tokens=4), str)
        fallen.append(losses[1] - losses[0])
    assert min(fallen) > 0, fallen
    assert sum(fallen) > 1.0, fallen  # nats


def test_merged_it_is_the_stock_model(run: Path, prepared: Prepared, stock: Any, folder: Path) -> None:
    """Adapters merged into the stock weights, the three rows in the embedding: transformers alone says the same."""
    backbone: Any = infer.load(run, device="cpu").backbone
    inputs = prepared(backbone, [a_row("a", "<audio>What?", "clip 3")], [tone(0.5, RATE, 9)])
    with torch.no_grad():
        expected = backbone.forward(inputs)
        merged = backbone.peft.merge_and_unload()
        state = {n: p.detach().clone() for n, p in merged.state_dict().items() if "thinking_rows" not in n}
        start = backbone.preparer.tokens.start
        state["model.language_model.embed_tokens.weight"][start : start + 3] = backbone.thinking_rows.rows
        with transformers_quiet():
            plain = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        untrained = plain(**inputs.tokens, labels=inputs.labels, use_cache=False).loss
        missing, unexpected = plain.load_state_dict(state, strict=False)
        found = plain(**inputs.tokens, labels=inputs.labels, output_hidden_states=True, use_cache=False)
    assert not unexpected
    assert all(name.startswith("model.visual.") for name in missing)
    torch.testing.assert_close(found.loss, expected.ce_sum / expected.ce_count, rtol=1e-4, atol=1e-5)
    states = found.hidden_states[-1][0, inputs.think_index[0]]
    torch.testing.assert_close(states, expected.thinking[0], rtol=1e-4, atol=1e-4)
    assert abs(float(untrained - found.loss)) > 0.1
