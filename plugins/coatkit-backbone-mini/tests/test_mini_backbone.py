"""The plugin's adapter: what it offers, and the real weights hearing and answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatkit import AssetError, AudioBatch, CoatkitError, HFBackbone, load_backbone
from coatkit.data.rows import AudioRef, JsonlRows, Message, Row
from coatkit.data.steps import load_batch
from coatkit.infer import AudioThinker

RATE = 16_000
QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


def melody(seconds: float) -> np.ndarray:
    """Four notes to the second, [N] float32."""
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 220 * 2 ** (np.floor(time * 4) % 12 / 12)
    return (0.2 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)).astype(np.float32)


def ask(*questions: str, audio: list[np.ndarray], backbone: Any, answer: str = "") -> Any:
    """Rows of one question each; those with an <audio> tag take the sounds in order."""
    rows = []
    for question in questions:
        refs = (AudioRef(Path("melody.wav")),) * question.count("<audio>")
        messages = (Message("user", question), *((Message("assistant", answer),) if answer else ()))
        rows.append(Row(question, messages, refs))
    batch = AudioBatch.from_arrays(audio, RATE) if audio else None
    return backbone.preparer.prepare(rows, batch, train=bool(answer))


def test_default_weights_that_were_not_fetched_name_the_command(cache: Path) -> None:
    with pytest.raises(AssetError, match="coatkit fetch mini"):
        load_backbone("mini", device="cpu")


def test_random_weights_need_nothing(cache: Path) -> None:
    backbone: Any = load_backbone("mini", weights="random", device="cpu")
    assert isinstance(backbone, HFBackbone)
    assert backbone.audio_dims == {"consumed": 64, "tower": 32}
    assert set(backbone.parts()) == {"lora", "projector", "tokens"}
    assert (backbone.preparer.sample_rate, backbone.preparer.frame_rate) == (RATE, 25.0)
    assert [p.name.partition("-")[0] for p in (cache / "mini").iterdir() if p.is_dir()] == ["random"]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"is no model folder \(it has no config\.json\)"):
        load_backbone("mini", weights=str(tmp_path), device="cpu")


def test_the_longest_sound_fits_the_context(cache: Path) -> None:
    backbone: Any = load_backbone("mini", weights="random", device="cpu")
    limit = round(backbone.preparer.max_seconds * RATE)
    context = backbone.stock.config.text_config.max_position_embeddings
    tokens = backbone.preparer.audio_tokens(limit)
    assert context - 2 * tokens >= 500
    with pytest.raises(CoatkitError, match="more than the 150 s this backbone hears"):
        AudioThinker(backbone, "test").ask((np.zeros(limit + RATE, np.float32), RATE), "What?")


# The real weights


@pytest.fixture(scope="module")
def real(real_folder: Path) -> Any:
    return load_backbone("mini", device="cpu")


@pytest.mark.weights
def test_what_is_heard_has_the_shapes_of_the_real_model(real: Any) -> None:
    inputs = ask("<audio>What?", "<audio>Why?", audio=[melody(1.0), melody(3.337)], backbone=real, answer="A tune.")
    out = real.forward(inputs)
    assert out.audio.lengths.tolist() == [25, 83]
    assert out.audio.consumed.shape == (2, 83, 576)
    assert out.audio.tower.shape == (2, 83, 384)
    assert out.thinking.shape == (2, 83, 576)
    assert real.audio_dims == {"consumed": 576, "tower": 384}
    assert real.hidden_size == 576
    assert torch.isfinite(out.ce_sum)
    # The tower tells notes apart: frames of one note are alike, frames of two are not.
    frames = torch.nn.functional.normalize(out.audio.tower[1, :80] - out.audio.tower[1, :80].mean(0), dim=-1)
    alike = frames @ frames.T
    note = torch.arange(80) * 4 // 25
    same = note[:, None] == note
    assert alike[same].mean() > alike[~same].mean() + 0.2


@pytest.mark.weights
def test_a_sentence_with_a_sound_generates_text(real: Any) -> None:
    """Which text is another matter, for the projector is untrained; but it is text, and the sound has a part in it."""
    real.model.eval()
    question = "<audio>Tell me a story about this sound."
    (answer,) = real.generate(ask(question, audio=[melody(1.5)], backbone=real), max_new_tokens=12, min_new_tokens=12)
    assert len(answer) >= 12
    assert answer.isprintable()
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    with torch.no_grad():
        costs = [
            real.forward(ask(question, audio=[audio], backbone=real, answer="A tune is played.")).ce_sum.item()
            for audio in (melody(1.5), noise)
        ]
    assert abs(costs[0] - costs[1]) > 0.01


@pytest.mark.weights
def test_a_question_in_text_is_answered_beside_one_with_sound(real: Any) -> None:
    real.model.eval()
    questions = ("What is the capital of France?", "<audio>What is heard?")
    first, _ = real.generate(ask(*questions, audio=[melody(1.0)], backbone=real), max_new_tokens=10)
    assert "Paris" in first


@pytest.mark.weights
def test_the_shipped_projector_tells_kinds_of_sound_apart(real: Any) -> None:
    """On clips the quickstart holds out, no part of its training: the words nearest to the mean over the frames."""
    rows = [row for row in JsonlRows(QUICKSTART / "heldout.jsonl") if row.labels["task"] == "kind"]
    tokenizer, table = real.preparer.tokenizer, real.stock.get_input_embeddings().weight.detach()
    kinds = ("speech", "music", "noise")
    words = torch.stack([table[tokenizer.encode(f" {kind}", add_special_tokens=False)].mean(0) for kind in kinds])
    right = 0
    for row in rows:
        inputs = load_batch([row], real.preparer, (), 30.0, train=False).inputs
        with torch.no_grad():
            mean = real.forward(inputs).audio.consumed[0].mean(0)
        scores = words @ mean - 0.5 * words.square().sum(1)
        right += kinds[int(scores.argmax())] == row.messages[-1].content
    assert right / len(rows) > 0.8, f"{right} of {len(rows)}"
