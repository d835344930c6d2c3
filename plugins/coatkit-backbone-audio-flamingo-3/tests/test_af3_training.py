"""Two stages through coatkit's trainer, and what comes out of it in transformers' own model without any hook."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from torch import Tensor, nn
from transformers import AudioFlamingo3ForConditionalGeneration

import coatkit
from coatkit import AudioBatch, Inputs, Row
from coatkit.spec_file import load_spec
from coatkit.thinking import IGNORE
from coatkit.trainer import train

RATE = 16_000
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]

LEVEL = '''
import torch
from coatkit import Expert, Features


class Level(Expert):
    """Mean power of each 1/50 s, as two features."""

    sample_rate, frame_rate, dim = 8_000, 50.0, 2

    def encode(self, audio):
        hop = 160
        frames = -(-audio.lengths // hop)
        samples = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * hop - audio.samples.shape[1]))
        power = samples.unflatten(1, (-1, hop)).square().mean(-1, keepdim=True)
        return Features(torch.cat([power, -power], -1), frames, self.frame_rate)
'''


@pytest.fixture(scope="module")
def spec(folder: Path, sound: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: twelve clips (one of 31 s), two rows of text alone, two experts and two stages."""
    place = tmp_path_factory.mktemp("project")
    (place / "level.py").write_text(LEVEL)
    rows = []
    for i in range(12):
        soundfile.write(place / f"{i}.wav", sound(31.0 if i == 5 else 0.2 + 0.05 * i, i), RATE)
        talk = [("user", "<audio>Which clip?"), ("assistant", f"Clip {i % 3}.")]
        rows.append({"id": f"r{i}", "audio": f"{i}.wav", "messages": [{"role": r, "content": c} for r, c in talk]})
    for i in range(2):
        talk = [("user", f"What is {i} plus 1?"), ("assistant", str(i + 1))]
        rows.append({"id": f"t{i}", "messages": [{"role": r, "content": c} for r, c in talk]})
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"steps": 8, "lr": 1e-2, "batch": {"rows": 5}}
    path = place / "spec.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "af3",
                "seed": 3,
                "backbone": {"use": "audio-flamingo-3", "weights": str(folder), "lora": {"rank": 4, "alpha": 8}},
                "experts": {"audio": {}, "level": {"use": "./level.py:Level"}},
                "head": {"use": "transformer", "heads": 4, "feedforward": 1.0},
                "data": {"train": "train.jsonl"},
                "stages": [
                    {"name": "one", **stage, "weights": {"audio": 1.0}},
                    {"name": "two", **stage, "weights": {"audio": 0.5, "level": 2.0}},
                ],
                "output": "run",
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def run(spec: Path) -> Path:
    loaded = load_spec(spec)
    train(loaded)
    return Path(loaded.output)


def test_two_stages_learn(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 16
    numbers = [value for line in steps for value in line.values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)
    for stage in (steps[:8], steps[8:]):
        losses = [line["loss"] for line in stage]
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


@pytest.fixture(scope="module")
def trained(run: Path) -> Any:
    backbone = coatkit.load(run, device="cpu").backbone
    backbone.model.eval()
    return backbone


def test_adapters_are_on_the_language_model_only(trained: Any) -> None:
    adapted = [n.removesuffix(".lora_A") for n, _ in trained.model.named_modules() if n.endswith(".lora_A")]
    assert sorted(adapted) == sorted(f"model.language_model.layers.{i}.{name}" for i in (0, 1) for name in LINEARS)
    # Names that the tower has too, were they not anchored.
    assert {n.rpartition(".")[2] for n, _ in trained.tower.named_modules()} & {"q_proj", "k_proj", "v_proj"}


def stock_forward(stock: Any, inputs: Inputs) -> Tensor:
    """Logits of transformers' own model, which takes windows of 3000 frames only."""
    tokens = dict(inputs.tokens)
    if "input_features" in tokens:
        mel, mask = tokens["input_features"], tokens["input_features_mask"]
        rest = 3000 - mel.shape[-1]
        tokens["input_features"] = torch.cat([mel, mel.amin((1, 2), keepdim=True).expand(-1, 128, rest)], -1)
        tokens["input_features_mask"] = nn.functional.pad(mask, (0, rest))
    with torch.no_grad():
        logits: Tensor = stock(**tokens, use_cache=False).logits
    return logits


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trained model as plain transformers: adapters merged, thinking rows in the matrix, saved and read again."""
    backbone: Any = coatkit.load(run, device="cpu").backbone
    rows, start = backbone.thinking_rows.rows.detach().clone(), backbone.preparer.tokens.start
    plain = backbone.peft.merge_and_unload()
    del plain.thinking_rows
    with torch.no_grad():
        plain.get_input_embeddings().weight[start : start + 3] = rows
    place = tmp_path_factory.mktemp("merged")
    plain.save_pretrained(place)
    model, report = AudioFlamingo3ForConditionalGeneration.from_pretrained(place, output_loading_info=True)
    assert not any(report.values())
    return model


def test_saved_loaded_and_merged_is_the_stock_model(
    trained: Any, merged: Any, folder: Path, rows: list[Row], audio: AudioBatch
) -> None:
    inputs = trained.preparer.prepare(rows, audio, train=True)
    with torch.no_grad():
        out = trained.forward(inputs)
    logits = stock_forward(merged, inputs)[:, :-1]
    wanted = inputs.labels[:, 1:] != IGNORE
    expected = nn.functional.cross_entropy(logits[wanted], inputs.labels[:, 1:][wanted], reduction="sum")
    torch.testing.assert_close(out.ce_sum, expected, rtol=1e-4, atol=1e-4)
    # It is another model than the one training began with.
    start = coatkit.load_backbone("audio-flamingo-3", weights=str(folder), device="cpu")
    with torch.no_grad():
        assert start.forward(inputs).ce_sum > out.ce_sum + 1


@pytest.mark.parametrize("seconds", [0.4, 31.0])
def test_answers_are_the_stock_models_greedy_decoding(
    trained: Any, merged: Any, row: Any, sound: Any, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prefill with the block, a cache, one run of the tower; against all 3000 frames and no cache at each token."""
    batch = AudioBatch.from_arrays([sound(seconds, 4)], RATE)
    inputs = trained.preparer.prepare([row("<audio>Which clip?", "Any.")], batch, train=False)
    tower, ids = [0], []
    count = trained.tower.register_forward_pre_hook(lambda *_: tower.append(1))
    generate = trained.stock.generate
    monkeypatch.setattr(trained.stock, "generate", lambda **options: ids.append(generate(**options)) or ids[-1])
    trained.generate(inputs, max_new_tokens=6, min_new_tokens=6)
    count.remove()
    assert sum(tower) == 1
    prompt = inputs.tokens["input_ids"].shape[1]
    answer = ids[0][0, prompt:].tolist()
    assert len(answer) == 6
    forbidden = [*trained.preparer.tokens.ids, trained.preparer.audio_token, 0, 2]
    tokens = dict(inputs.tokens)
    for token in answer:
        logits = stock_forward(merged, Inputs(**{**vars(inputs), "tokens": tokens}))[0, -1]
        logits[forbidden] = -torch.inf
        assert int(logits.argmax()) == token
        tokens["input_ids"] = torch.cat([tokens["input_ids"], torch.tensor([[token]])], 1)
        tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
