"""Log-mel, audio tokens and prompts beside those of the stock front end, and what becomes of short and long sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5OmniProcessor

from coatkit import AudioBatch, DataError, Inputs
from coatkit.data.audio import Samples
from coatkit.testing.backbone_bench import a_row
from coatkit.testing.sounds import tone
from coatkit_backbone_qwen2_5_omni.preparer import AUDIO, Qwen25OmniPreparer
from coatkit_backbone_qwen2_5_omni.tiny import tiny_parts

RATE = 16_000
BLOCK = 32_000  # samples of one of the tower's blocks, 2 s
LENGTHS = [321, 480, 481, 641, 961, 16_000, 31_999, BLOCK, BLOCK + 1, BLOCK + 320, BLOCK + 321, 53_392, 480_001]
Load = Callable[..., Any]
Prepared = Callable[..., Inputs]


def sound(seconds: float, seed: int = 0) -> Samples:
    return tone(seconds, RATE, seed)


@pytest.fixture(scope="module")
def expanded() -> Callable[..., Any]:
    """The stock processor's log-mel, padded to 300 s, and what it puts in for each placeholder.

    It cannot be made without its image part, which needs torchvision: only what it does to sound is called.
    """
    processor = Qwen2_5OmniProcessor.__new__(Qwen2_5OmniProcessor)
    processor.feature_extractor, processor.audio_token = tiny_parts(torch.float32)[2], AUDIO

    def run(sounds: list[Samples], **options: Any) -> Any:
        return processor._process_audio(
            sounds, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt", **options
        )

    return run


@pytest.mark.parametrize("lengths", [[16_000], [LENGTHS[0], 53_392, 16_159], [BLOCK + 1, 200, BLOCK]])
def test_log_mel_is_the_stock_processors_bit_for_bit(
    backbone: Any, expanded: Callable[..., Any], lengths: list[int]
) -> None:
    sounds = [sound(n / RATE, n) for n in lengths]
    theirs, _ = expanded(sounds)
    ours, _ = backbone.preparer.audio_features(AudioBatch.from_arrays(sounds, RATE))
    frames = -(-max(lengths) // 160)
    assert theirs["input_features"].shape == (len(lengths), 128, 30_000)
    assert ours["input_features"].shape == (len(lengths), 128, frames)
    assert torch.equal(ours["feature_attention_mask"], theirs["feature_attention_mask"][:, :frames])
    assert not theirs["feature_attention_mask"][:, frames:].any()
    torch.testing.assert_close(ours["input_features"], theirs["input_features"][..., :frames], rtol=0, atol=1e-6)


def test_a_sound_as_loud_at_its_very_end_keeps_the_stock_scale(backbone: Any, expanded: Callable[..., Any]) -> None:
    """Log-mel is scaled by its loudest frame, and that may be one past the end, which still hears the end."""
    click = np.zeros(16_000, np.float32)
    click[-1] = 1.0
    theirs, _ = expanded([click])
    ours, _ = backbone.preparer.audio_features(AudioBatch.from_arrays([click], RATE))
    inside = theirs["input_features"][..., :100]
    assert inside.max() < theirs["input_features"][..., 100:].max()
    torch.testing.assert_close(ours["input_features"], inside, rtol=0, atol=1e-6)


def test_audio_tokens_are_the_stock_ones(backbone: Any, stock: Any, expanded: Callable[..., Any]) -> None:
    """Those the processor writes, those the tower's own formula gives, and the frames the tower makes."""
    sounds = [sound(n / RATE, n) for n in LENGTHS]
    assert [s.size for s in sounds] == LENGTHS
    counts = [backbone.preparer.audio_tokens(n) for n in LENGTHS]
    theirs, replacements = expanded(sounds, max_length=31 * RATE)
    assert [text.count(AUDIO) for text in replacements] == counts
    frames = theirs["feature_attention_mask"].sum(-1)
    assert stock.model.audio_tower._get_feat_extract_output_lengths(frames)[1].tolist() == counts
    for samples, count in zip(sounds, counts, strict=True):
        mel, (given,) = backbone.preparer.audio_features(AudioBatch.from_arrays([samples], RATE))
        with torch.no_grad():
            assert len(stock.get_audio_features(**mel).last_hidden_state) == count == given
    assert [backbone.preparer.audio_tokens(round(s * RATE)) for s in (1, 3.337, 30, 300)] == [25, 83, 750, 7500]


def test_messages_in_parts_give_the_same_prompt(prepared: Prepared, load: Load) -> None:
    """The template's own way of writing sounds, and its default system prompt."""
    plain = load(thinking="off")
    parts = [{"type": "audio"}, {"type": "text", "text": "Which, or "}, {"type": "audio"}]
    tokenizer = plain.preparer.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|audio_bos|>"
    )
    sounds = [sound(0.4, 1), sound(0.2, 2)]
    inputs = prepared(plain, [a_row("a", "<audio>Which, or <audio>")], sounds, train=False)
    first, second = (AUDIO * plain.preparer.audio_tokens(s.size) for s in sounds)
    before, between, after = text.split(AUDIO)
    assert tokenizer.decode(inputs.tokens["input_ids"][0]) == f"{before}{first}{between}{second}{after}"


@pytest.mark.parametrize("samples", [1, 160, 320])
def test_sounds_without_a_token_are_refused(prepared: Prepared, backbone: Any, samples: int) -> None:
    assert backbone.preparer.audio_tokens(samples) == 0
    rows = [a_row("long", "<audio>?", "!"), a_row("click", "<audio>?", "!")]
    with pytest.raises(DataError, match=r"click.*too short to give one audio token"):
        prepared(backbone, rows, [sound(1), np.ones(samples, np.float32)])


def test_300_seconds_are_heard_and_no_more(prepared: Prepared, backbone: Any) -> None:
    """In one piece, with a block as long, within the context; what the stock processor would cut is refused."""
    preparer = backbone.preparer
    assert (preparer.max_seconds, preparer.cannot_hear(300.0)) == (300.0, "")
    assert "300.0 s is more than the 300 s this backbone hears" in preparer.cannot_hear(300.01)
    long = sound(300.01)
    with pytest.raises(DataError, match=r"talk.*more than the 300 s"):
        prepared(backbone, [a_row("talk", "<audio>?", "!")], [long])
    inputs = prepared(backbone, [a_row("talk", "<audio>?", "!")], [long[: 300 * RATE]])
    assert inputs.audio_lengths.tolist() == inputs.think_lengths.tolist() == [7500]
    assert inputs.tokens["input_ids"].shape[1] < preparer.max_tokens == 32_768


def test_blocks_of_two_seconds_are_heard_apart(prepared: Prepared, backbone: Any) -> None:
    """A change in the last block of 35 s changes the tokens of that block only: there is no window of 30 s."""
    inputs = prepared(backbone, [a_row("a", "<audio>?", "!")], [sound(35.0)])
    with torch.no_grad():
        before = backbone.forward(inputs).audio
        inputs.tokens["input_features"][..., 3400:] += 0.5
        after = backbone.forward(inputs).audio
    changed = (before.tower[0] != after.tower[0]).any(-1)
    assert before.lengths.tolist() == [875]
    assert not changed[:850].any()
    assert changed[850:].all()


def test_foreign_log_mel_is_refused(backbone: Any) -> None:
    """The count of the features is compared with that of the samples, before any model sees it."""
    preparer = Qwen25OmniPreparer(backbone.preparer.tokenizer, backbone.preparer.extractor, None, 8192)
    real = preparer.extractor

    def half(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        out["attention_mask"][:, 50:] = 0
        return out

    preparer.extractor = half
    with pytest.raises(DataError, match=r"log-mel for \[12\] audio tokens where the sounds have \[25\]"):
        preparer.audio_features(AudioBatch.from_arrays([sound(1.0)], RATE))
