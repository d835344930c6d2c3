"""Tokens and log-mel beside those of the stock processor, and what becomes of short and long sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from coatkit import AudioBatch, DataError, Inputs, ThinkingSpec
from coatkit.data.audio import Samples
from coatkit.testing.backbone_bench import a_row
from coatkit.testing.sounds import tone
from coatkit_backbone_qwen2_audio.preparer import AUDIO, Qwen2AudioPreparer

RATE = 16_000
Load = Callable[..., Any]
Prepared = Callable[..., Inputs]


def sound(seconds: float, seed: int = 0) -> Samples:
    return tone(seconds, 16_000, seed)


@pytest.fixture
def heard(prepared: Prepared) -> Callable[..., Any]:
    def run(backbone: Any, sounds: list[np.ndarray]) -> Any:
        """Audio features of rows of one sound each."""
        with torch.no_grad():
            rows = [a_row(str(i), "<audio>What?", "This.") for i in range(len(sounds))]
            return backbone.forward(prepared(backbone, rows, sounds)).audio

    return run


@pytest.mark.parametrize("samples", [961, 1120, 1121, 1281, 16_000, 53_392, 53_393, 479_839, 479_999, 480_000])
def test_audio_tokens_are_the_stock_processors(prepared: Prepared, backbone: Any, processor: Any, samples: int) -> None:
    audio = sound(samples / RATE)
    assert audio.size == samples
    expanded = processor(text=[AUDIO], audio=[audio], sampling_rate=RATE, return_tensors="pt")
    expected = int((expanded["input_ids"] == processor.audio_token_id).sum())
    assert backbone.preparer.audio_tokens(samples) == expected
    assert prepared(backbone, [a_row("a", "<audio>?", "!")], [audio]).audio_lengths.tolist() == [expected]


def test_known_lengths(backbone: Any) -> None:
    counts = {seconds: backbone.preparer.audio_tokens(round(seconds * RATE)) for seconds in (1, 3.337, 30)}
    assert counts == {1: 25, 3.337: 83, 30: 750}


def test_prompt_is_the_stock_processors(prepared: Prepared, load: Load, processor: Any) -> None:
    """Sounds are numbered through the conversation, as the model's own template does."""
    turns = ["<audio>Which, or <audio>?", "The first.", "And <audio> this?"]
    sounds = [sound(0.4, 1), sound(0.2, 2), sound(0.7, 3)]
    parts = [
        {"role": "user", "content": ["a", "Which, or ", "a", "?"]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": ["And ", "a", " this?"]},
    ]
    for message in parts:
        if isinstance(message["content"], list):
            message["content"] = [
                {"type": "audio"} if part == "a" else {"type": "text", "text": part} for part in message["content"]
            ]
    text = processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    assert [f"Audio {i}: <|audio_bos|><|AUDIO|><|audio_eos|>\n" in text for i in (1, 2, 3, 4)] == [True] * 3 + [False]
    theirs = processor(text=[text], audio=sounds, sampling_rate=RATE, return_tensors="pt")
    plain = load(thinking="off")
    ours = prepared(plain, [a_row("a", *turns)], sounds, train=False)
    assert torch.equal(ours.tokens["input_ids"], theirs["input_ids"])
    assert torch.equal(ours.tokens["attention_mask"], theirs["attention_mask"])
    frames = ours.tokens["input_features"].shape[-1]
    assert frames == 72  # 0.7 s and the two frames its convolutions still see
    expected = theirs["input_features"][..., :frames]
    torch.testing.assert_close(ours.tokens["input_features"], expected, rtol=0, atol=1e-6)
    assert torch.equal(ours.tokens["feature_attention_mask"], theirs["feature_attention_mask"][:, :frames])


def test_answers_end_with_the_turn(prepared: Prepared, backbone: Any) -> None:
    inputs = prepared(backbone, [a_row("a", "<audio>?", "A dog.")], [sound(0.3)])
    labels = inputs.labels[0][inputs.labels[0] != -100]
    assert backbone.preparer.tokenizer.decode(labels) == "A dog.<|im_end|>"


# Short sounds


@pytest.mark.parametrize("samples", [1, 320, 321, 960])
def test_sounds_under_two_tokens_are_refused(prepared: Prepared, backbone: Any, samples: int) -> None:
    preparer = backbone.preparer
    assert preparer.audio_tokens(samples) == 0
    assert "too short: it must be over 60 ms, to give 2 audio tokens" in preparer.cannot_hear(samples / RATE)
    with pytest.raises(DataError, match=r"click.*too short: it must be over 60 ms"):
        prepared(
            backbone,
            [a_row("long", "<audio>?", "!"), a_row("click", "<audio>?", "!")],
            [sound(1), np.ones(samples, np.float32)],
        )


def test_shortest_sound(heard: Callable[..., Any], backbone: Any) -> None:
    assert backbone.preparer.cannot_hear(961 / RATE) == ""
    features = heard(backbone, [sound(961 / RATE)])
    assert features.lengths.tolist() == [2]
    assert features.tower.isfinite().all()


# Long sounds


def test_long_sounds_are_refused_unless_asked_for(heard: Callable[..., Any], prepared: Prepared, backbone: Any) -> None:
    preparer = backbone.preparer
    assert preparer.cannot_hear(30.0) == ""
    reason = preparer.cannot_hear(30.01)
    assert "30.0 s is more than the 30 s this backbone hears" in reason
    assert "long_audio: segments" in reason
    with pytest.raises(DataError, match=r"talk.*more than the 30 s"):
        prepared(backbone, [a_row("talk", "<audio>?", "!")], [sound(30.01)])
    assert heard(backbone, [sound(30.0)]).lengths.tolist() == [750]


@pytest.fixture(scope="module")
def segments(load: Load) -> Any:
    found = load(long_audio="segments")
    found.model.eval()
    return found


@pytest.mark.parametrize(("seconds", "tokens"), [(30.02, 750), (30.03, 751), (30.5, 762), (61.0, 1525)])
def test_segments_are_heard_one_after_another(
    heard: Callable[..., Any], segments: Any, backbone: Any, seconds: float, tokens: int
) -> None:
    """Each piece of 30 s gives what it gives alone, and nothing of the sound is left out."""
    long, other = sound(seconds, 1), sound(0.5, 2)
    both = heard(segments, [long, other])
    assert both.lengths.tolist() == [tokens, 12]
    pieces = [long[i : i + 30 * RATE] for i in range(0, long.size, 30 * RATE)]
    at = 0
    for piece in pieces:
        if not backbone.preparer.audio_tokens(piece.size):
            continue  # a rest of under 60 ms gives one token at most, and none alone
        alone = heard(backbone, [piece])
        for name in ("consumed", "tower"):
            found = getattr(both, name)[0, at : at + int(alone.lengths[0])]
            torch.testing.assert_close(found, getattr(alone, name)[0], rtol=0, atol=1e-5)
        at += int(alone.lengths[0])
    assert tokens - at in (0, 1)
    torch.testing.assert_close(both.tower[1, :12], heard(backbone, [other]).tower[0], rtol=0, atol=1e-5)


def test_a_segmented_sound_has_one_run_of_placeholders(prepared: Prepared, segments: Any) -> None:
    inputs = prepared(segments, [a_row("a", "<audio>and <audio>?", "!")], [sound(31.0), sound(0.4)])
    assert inputs.audio_lengths.tolist() == [775, 10]
    assert inputs.think_lengths.tolist() == [775, 10]
    assert inputs.tokens["input_features"].shape == (3, 128, 3000)  # 30 s, 1 s, 0.4 s
    text = segments.preparer.tokenizer.decode(inputs.tokens["input_ids"][0])
    assert f"Audio 1: <|audio_bos|>{AUDIO * 775}<|audio_eos|>\nand Audio 2: <|audio_bos|>{AUDIO * 10}" in text
    first = inputs.audio_index[0]
    assert torch.equal(first, torch.arange(775) + first[0])


@pytest.mark.parametrize(
    ("thinking", "seconds"),
    [(ThinkingSpec(), 150.0), (ThinkingSpec(tokens_per_audio_token=0.5), 180.0), (None, 300.0)],
)
def test_segments_end_where_the_context_does(processor: Any, thinking: ThinkingSpec | None, seconds: float) -> None:
    preparer = Qwen2AudioPreparer(processor, thinking, 8192, "segments")
    assert preparer.max_seconds == seconds
    assert preparer.cannot_hear(seconds) == ""
    assert f"more than the {seconds:g} s this backbone hears" in preparer.cannot_hear(seconds + 1)
    row, audio = a_row("a", "<audio>What?", "This."), AudioBatch.from_arrays([sound(seconds)], RATE)
    assert preparer.prepare([row], audio, train=True).tokens["input_ids"].shape[1] <= 8192 - 400
    assert Qwen2AudioPreparer(processor, thinking, 100, "segments").max_seconds == 30.0


def test_foreign_log_mel_is_refused(processor: Any, backbone: Any) -> None:
    """The count of the features is compared with that of the samples, before any model sees it."""
    preparer = Qwen2AudioPreparer(processor, None, 8192, "refuse")
    real = preparer.extractor

    def half(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        out["attention_mask"][:, 50:] = 0
        return out

    preparer.extractor = half
    with pytest.raises(DataError, match="log-mel for 12 audio tokens where the sounds have 25"):
        preparer.audio_features(AudioBatch.from_arrays([sound(1.0)], RATE))
