"""The preparer beside transformers' own `AudioFlamingo3Processor`, built offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AudioFlamingo3Processor

from coatkit import AudioBatch, DataError, Row
from coatkit.backbones.whisper import audio_tokens, valid_frames
from coatkit.thinking import IGNORE

RATE = 16_000
WINDOW = 30 * RATE


@pytest.fixture(scope="module")
def processor(load: Any) -> Any:
    preparer = load().preparer
    return AudioFlamingo3Processor(preparer.extractor, preparer.tokenizer)


def stock_counts(processor: Any, sounds: list[np.ndarray]) -> list[int]:
    ids = processor(text=["<sound>"] * len(sounds), audio=sounds)["input_ids"]
    return (ids == processor.audio_token_id).sum(-1).tolist()


# Token counts

NEAR_WINDOW = [WINDOW + n for n in (-161, -1, 0, 1, 160, 161, 319, 320, 321, 480, 640, 641)]
LENGTHS = [1, 160, 161, 320, 321, 480, 640, 641, 800, 961, 1600, 16_000, 53_392, *NEAR_WINDOW, 2 * WINDOW + 80_000]


def test_counts_are_the_stock_processors(processor: Any) -> None:
    """From 1 sample to 65 s, and around every edge of window, mel frame, convolution and pooling."""
    sounds = [np.full(n, 0.1, np.float32) for n in LENGTHS]
    assert stock_counts(processor, sounds) == [audio_tokens(n) for n in LENGTHS]


@pytest.mark.parametrize(("samples", "tokens"), [(320, 0), (321, 1), (WINDOW + 320, 750), (WINDOW + 321, 751)])
def test_a_window_of_20_ms_or_less_gives_nothing(processor: Any, samples: int, tokens: int) -> None:
    """Stock and ours: a whole sound that short has no token and is refused, a remainder that short adds none."""
    assert audio_tokens(samples) == tokens
    assert stock_counts(processor, [np.full(samples, 0.1, np.float32)]) == [tokens]


def test_a_sound_without_a_token_is_refused(backbone: Any, row: Any) -> None:
    assert "too short to give one audio token" in backbone.preparer.cannot_hear(0.02)
    assert backbone.preparer.cannot_hear(0.0201) == ""
    batch = AudioBatch.from_arrays([np.full(320, 0.1, np.float32)], RATE)
    with pytest.raises(DataError, match="too short to give one audio token"):
        backbone.preparer.prepare([row("<audio>What?", "A click.")], batch, train=True)


# Windows

SETS = [
    [0.0201],
    [0.1],
    [0.333, 0.7],
    [3.337, 0.1],
    [12.3],
    [29.97],
    [29.99],
    [30.0],
    [31.0, 2.0],
    [30.01, 0.5],
    [65.0],
]


@pytest.mark.parametrize("seconds", SETS, ids=str)
def test_trimmed_windows_are_the_stock_ones(
    backbone: Any, stock: Any, processor: Any, sound: Any, seconds: list[float]
) -> None:
    """Log-mel window by window and the tower's output over 3000 frames to rounding, and the mask itself."""
    sounds = [sound(s, i) for i, s in enumerate(seconds)]
    ours, counts = backbone.preparer.audio_features(AudioBatch.from_arrays(sounds, RATE))
    theirs = processor(text=["<sound>"] * len(sounds), audio=sounds)
    mel, mask = ours["input_features"], ours["input_features_mask"]
    full, full_mask = theirs["input_features"], theirs["input_features_mask"]
    frames = mel.shape[-1]
    # The windows of the first sound, then those of the second: in this order the model takes their frames.
    assert full.shape == (sum(-(-s.size // WINDOW) for s in sounds), 128, 3000)
    torch.testing.assert_close(mel, full[..., :frames], rtol=0, atol=1e-6)
    assert torch.equal(mask, full_mask[..., :frames])
    assert not full_mask[..., frames:].any()
    assert frames - int(full_mask.sum(-1).max()) <= 3
    with torch.no_grad():
        heard = valid_frames(backbone.tower(mel, input_features_mask=mask).last_hidden_state, mask)
        expected = stock.model.audio_tower(full, input_features_mask=full_mask).last_hidden_state
    expected = valid_frames(expected, full_mask)
    assert expected.shape[0] == sum(counts)
    torch.testing.assert_close(heard, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_published_extractor_asks_for_a_mask_by_default(backbone: Any, sound: Any) -> None:
    """transformers' conversion script set it so; the mask must stay one of mel frames, not of samples."""
    batch = AudioBatch.from_arrays([sound(0.5)], RATE)
    expected, _ = backbone.preparer.audio_features(batch)
    backbone.preparer.extractor.return_attention_mask = True
    found, counts = backbone.preparer.audio_features(batch)
    assert torch.equal(found["input_features_mask"], expected["input_features_mask"])
    assert int(found["input_features_mask"].sum()) == 50
    assert counts == [12]


# Long sounds


def test_ten_minutes_are_heard_and_not_a_second_more(backbone: Any, processor: Any, row: Any) -> None:
    """The stock processor cuts what is beyond 600 s; here it is refused before, and nothing is ever cut."""
    preparer = backbone.preparer
    assert preparer.cannot_hear(600.0) == ""
    assert "605.0 s is more than the 600 s" in preparer.cannot_hear(605.0)
    assert preparer.audio_tokens(600 * RATE) == 15_000
    long = np.full(605 * RATE, 0.1, np.float32)
    assert stock_counts(processor, [long]) == [15_000]
    batch = AudioBatch.from_arrays([long[: 600 * RATE]], RATE)
    inputs = preparer.prepare([row("<audio>What?", "Wind.")], batch, train=True)
    assert inputs.tokens["input_features"].shape == (20, 128, 3000)
    assert inputs.audio_lengths.tolist() == inputs.think_lengths.tolist() == [15_000]
    # 2,768 of 32,768 positions are left for text beside ten minutes of sound and thinking.
    assert preparer.max_tokens == 32_768
    assert 30_000 < inputs.tokens["input_ids"].shape[1] < 30_200


def test_a_row_longer_than_the_context_is_refused(backbone: Any, row: Any) -> None:
    # Two sounds of 330 s: each is heard, but 4 x 8,250 positions are too many for one row.
    batch = AudioBatch.from_arrays([np.full(330 * RATE, 0.1, np.float32)] * 2, RATE)
    with pytest.raises(DataError, match="tokens are more than the 32768"):
        backbone.preparer.prepare([row("<audio><audio>Same?", "Yes.")], batch, train=True)


# Prompts


def test_the_prompt_is_the_published_one(backbone: Any) -> None:
    """The text transformers' own test of the published processor expects: `<sound>` first and no newline after it."""
    talk = [{"role": "user", "content": "<sound>What is it?"}]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user = "<|im_start|>user\n<sound>What is it?<|im_end|>\n"
    render = backbone.preparer.tokenizer.apply_chat_template
    assert render(talk, tokenize=False, add_generation_prompt=True) == system + user + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *talk, {"role": "assistant", "content": "A dog."}]
    expected = f"<|im_start|>system\nBe brief.<|im_end|>\n{user}<|im_start|>assistant\nA dog.<|im_end|>\n"
    assert render(own, tokenize=False) == expected


@pytest.mark.parametrize("placement", ["response_prefix", "before_header"])
def test_block_is_the_only_thing_added_to_the_stock_prompt(
    load: Any, processor: Any, sound: Any, row: Any, placement: str
) -> None:
    preparer = load(thinking={"placement": placement}).preparer
    asked = row("<audio>What is it?", "A dog.")
    samples = sound(0.4)
    inputs = preparer.prepare([asked], AudioBatch.from_arrays([samples], RATE), train=False)
    prompt = preparer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<sound>What is it?"}], tokenize=False, add_generation_prompt=True
    )
    stock = processor(text=prompt, audio=[samples])["input_ids"][0].tolist()
    start, think, end = preparer.tokens.ids
    block = [start, *[think] * 10, end]
    header = preparer.tokenizer("<|im_start|>assistant\n")["input_ids"]
    body = stock[: -len(header)]
    expected = stock + block if placement == "response_prefix" else body + block + header
    assert inputs.tokens["input_ids"][0].tolist() == expected


def test_labels_are_on_answers_and_the_stock_ones_are_not(
    backbone: Any, processor: Any, rows: list[Row], audio: AudioBatch
) -> None:
    preparer = backbone.preparer
    inputs = preparer.prepare(rows[:1], AudioBatch(audio.samples[:1], audio.lengths[:1], RATE), train=True)
    learnt = inputs.labels[0][inputs.labels[0] != IGNORE]
    assert preparer.tokenizer.decode(learnt) == "A dog.<|im_end|>"
    prompt = "<|im_start|>user\n<sound>Which animal is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>"
    stock = processor(text=prompt, audio=[audio.samples[0].numpy()], output_labels=True)["labels"][0]
    assert "Which animal is it?" in preparer.tokenizer.decode(stock[stock != IGNORE])


# Several sounds


def test_the_processor_takes_one_sound_and_the_class_takes_several(
    backbone: Any, stock: Any, processor: Any, row: Any, sound: Any
) -> None:
    """The class scatters frames over placeholders in order, whatever row they are in; so each sound keeps its own."""
    sounds = [sound(0.4, 1), sound(31.0, 2), sound(0.9, 3)]
    with pytest.raises(ValueError, match="must match 1:1"):
        processor(text="<sound><sound>", audio=sounds[:2])
    talk = row("<audio>First, and <audio>second?", "Rain.", "<audio>And now?", "A bell.")
    inputs = backbone.preparer.prepare([talk], AudioBatch.from_arrays(sounds, RATE), train=True)
    assert inputs.audio_lengths.tolist() == [10, 775, 22]
    assert inputs.tokens["input_features"].shape[0] == 4
    with torch.no_grad():
        together = backbone.forward(inputs).audio
        for i, samples in enumerate(sounds):
            alone = processor(text="<sound>", audio=[samples])
            alone.pop("num_audio_tokens", None)
            expected = stock.get_audio_features(alone["input_features"], alone["input_features_mask"])
            length = int(together.lengths[i])
            assert expected.pooler_output.shape[0] == length
            torch.testing.assert_close(together.consumed[i, :length], expected.pooler_output, rtol=0, atol=1e-5)
            frames = valid_frames(expected.last_hidden_state, alone["input_features_mask"])
            torch.testing.assert_close(together.tower[i, :length], frames, rtol=0, atol=1e-5)
