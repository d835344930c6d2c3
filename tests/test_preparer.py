"""Rows to tokens with the tiny mini backbone: the exact text a model sees, what is learnt, and the audio front end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AudioFlamingo3Processor

from coatkit import AudioBatch, DataError, load_backbone
from coatkit.backbones.preparer import HFPreparer
from coatkit.backbones.whisper import audio_tokens, windowed_features
from coatkit.data.rows import Row
from coatkit.errors import PluginError
from coatkit.protocols import Inputs
from coatkit.spec import ThinkingSpec
from coatkit.thinking import IGNORE

RATE = 16_000
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
MakeRow = Callable[..., Row]


def block(count: int) -> str:
    return "<|audio_think_start|>" + "<|audio_think|>" * count + "<|audio_think_end|>"


def heard(count: int) -> str:
    return "<sound>" * count


Preparers = dict[tuple[str, float], HFPreparer]


@pytest.fixture(scope="module")
def preparers() -> Preparers:
    """By placement (or `off`) and thinking positions per audio token."""
    found: Preparers = {}
    for placement, ratio in [
        ("response_prefix", 1.0),
        ("before_header", 1.0),
        ("response_prefix", 0.5),
        ("response_prefix", 2.0),
        ("off", 1.0),
    ]:
        thinking = None
        if placement != "off":
            thinking = ThinkingSpec.model_validate({"placement": placement, "tokens_per_audio_token": ratio})
        backbone = load_backbone("mini", weights="random", thinking=thinking, device="cpu")
        assert isinstance(backbone.preparer, HFPreparer)
        found[placement, ratio] = backbone.preparer
    return found


@pytest.fixture(scope="module")
def preparer(preparers: Preparers) -> HFPreparer:
    return preparers["response_prefix", 1.0]


def sounds(*tokens: int) -> AudioBatch | None:
    """Noise of these many audio tokens (40 ms each)."""
    random = np.random.default_rng(0)
    arrays = [0.1 * random.normal(size=640 * n).astype(np.float32) for n in tokens]
    return AudioBatch.from_arrays(arrays, RATE) if arrays else None


def texts(preparer: HFPreparer, inputs: Inputs) -> list[str]:
    """Every row as text, without padding."""
    ids, mask = inputs.tokens["input_ids"], inputs.tokens["attention_mask"].bool()
    return [preparer.tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]


def answers(preparer: HFPreparer, inputs: Inputs) -> list[str]:
    assert inputs.labels is not None
    return [preparer.tokenizer.decode(row[row != IGNORE]) for row in inputs.labels]


def marked(preparer: HFPreparer, inputs: Inputs, what: str) -> list[str]:
    """The tokens that `audio_index` or `think_index` points at, for each sound."""
    index, lengths = getattr(inputs, f"{what}_index"), getattr(inputs, f"{what}_lengths")
    ids = inputs.tokens["input_ids"]
    found = [ids[row][at[:n]] for row, at, n in zip(inputs.audio_row, index, lengths, strict=True)]
    return [preparer.tokenizer.decode(one) for one in found]


@pytest.mark.parametrize(
    ("placement", "ratio", "middle"),
    [
        ("response_prefix", 1.0, ASSISTANT + block(4)),
        ("before_header", 1.0, block(4) + ASSISTANT),
        ("response_prefix", 0.5, ASSISTANT + block(2)),
        ("response_prefix", 2.0, ASSISTANT + block(8)),
        ("off", 1.0, ASSISTANT),
    ],
)
def test_a_training_row_as_text(preparers: Preparers, row: MakeRow, placement: str, ratio: float, middle: str) -> None:
    preparer = preparers[placement, ratio]
    inputs = preparer.prepare([row("<audio>Which animal?", "A dog.", sounds=1)], sounds(4), train=True)
    assert texts(preparer, inputs) == [SYSTEM + USER + heard(4) + "Which animal?" + END + middle + "A dog." + END]
    assert answers(preparer, inputs) == ["A dog.<|im_end|>"]
    assert marked(preparer, inputs, "audio") == [heard(4)]
    thought = 0 if placement == "off" else round(4 * ratio)
    assert inputs.think_lengths.tolist() == [thought]
    assert marked(preparer, inputs, "think") == ["<|audio_think|>" * thought]
    assert preparer.thinking_rate == 25.0 * ratio


def test_a_system_turn_of_the_rows_own(preparer: HFPreparer, row: MakeRow) -> None:
    inputs = preparer.prepare([row("system:Be brief.", "<audio>What?", "Rain.", sounds=1)], sounds(2), train=True)
    expected = "<|im_start|>system\nBe brief." + END + USER + heard(2) + "What?" + END + ASSISTANT + block(2) + "Rain."
    assert texts(preparer, inputs) == [expected + END]


def test_every_assistant_turn_is_learnt_and_thinks_once_about_each_sound(preparer: HFPreparer, row: MakeRow) -> None:
    turns = ["Hello.", "Hi.", "<audio>What?", "Rain.", "Sure?", "Yes.", "And <audio>?", "A dog."]
    inputs = preparer.prepare([row(*turns, sounds=2)], sounds(2, 3), train=True)
    expected = [
        SYSTEM + USER + "Hello." + END + ASSISTANT + "Hi." + END,
        USER + heard(2) + "What?" + END + ASSISTANT + block(2) + "Rain." + END,
        USER + "Sure?" + END + ASSISTANT + "Yes." + END,
        USER + "And " + heard(3) + "?" + END + ASSISTANT + block(3) + "A dog." + END,
    ]
    assert texts(preparer, inputs) == ["".join(expected)]
    assert answers(preparer, inputs) == ["Hi.<|im_end|>Rain.<|im_end|>Yes.<|im_end|>A dog.<|im_end|>"]
    assert marked(preparer, inputs, "think") == ["<|audio_think|>" * 2, "<|audio_think|>" * 3]


def test_several_sounds_in_one_turn_share_a_block(preparer: HFPreparer, row: MakeRow) -> None:
    inputs = preparer.prepare([row("<audio> or <audio>?", "The second.", sounds=2)], sounds(5, 2), train=True)
    expected = USER + heard(5) + " or " + heard(2) + "?" + END + ASSISTANT + block(7) + "The second." + END
    assert texts(preparer, inputs) == [SYSTEM + expected]
    assert inputs.audio_lengths.tolist() == inputs.think_lengths.tolist() == [5, 2]
    first, second = inputs.think_index
    assert int(second[0]) == int(first[4]) + 1


def test_text_only_rows_in_a_batch_with_sounds(preparer: HFPreparer, row: MakeRow) -> None:
    rows = [row("One?", "1."), row("<audio>Two?", "2.", sounds=1), row("Three?", "3."), row("<audio>4?", "4", sounds=1)]
    inputs = preparer.prepare(rows, sounds(6, 1), train=True)
    assert inputs.audio_row.tolist() == [1, 3]
    assert texts(preparer, inputs)[0] == SYSTEM + USER + "One?" + END + ASSISTANT + "1." + END
    assert texts(preparer, inputs)[3] == SYSTEM + USER + heard(1) + "4?" + END + ASSISTANT + block(1) + "4" + END
    assert answers(preparer, inputs) == ["1.<|im_end|>", "2.<|im_end|>", "3.<|im_end|>", "4<|im_end|>"]
    assert inputs.think_mask.tolist() == [[True] * 6, [True] + [False] * 5]
    assert inputs.tokens["input_features"].shape[0] == 2


def test_text_alone_needs_no_audio(preparer: HFPreparer, row: MakeRow) -> None:
    inputs = preparer.prepare([row("One?", "1.")], None, train=True)
    assert set(inputs.tokens) == {"input_ids", "attention_mask"}
    assert inputs.audio_row.numel() == 0
    assert texts(preparer, inputs) == [SYSTEM + USER + "One?" + END + ASSISTANT + "1." + END]


def test_training_pads_right_and_generating_pads_left(preparer: HFPreparer, row: MakeRow) -> None:
    rows = [row("<audio>A long question?", "Yes.", sounds=1), row("<audio>Why?", "No.", sounds=1)]
    train, ask = (preparer.prepare(rows, sounds(6, 2), train=train) for train in (True, False))
    pad = preparer.tokenizer.pad_token_id
    for inputs, side in ((train, -1), (ask, 0)):
        short, mask = inputs.tokens["input_ids"][1], inputs.tokens["attention_mask"][1]
        assert mask[side] == 0
        assert (short[mask == 0] == pad).all()
        assert marked(preparer, inputs, "audio") == [heard(6), heard(2)]
        assert marked(preparer, inputs, "think") == ["<|audio_think|>" * 6, "<|audio_think|>" * 2]
    assert ask.labels is None
    assert ask.tokens["attention_mask"][:, -1].tolist() == [1, 1]


CONVERSATIONS = [
    (("What?", "Nothing."), ()),
    (("<audio>What?", "Rain."), (3,)),
    (("<audio>What?", "Rain.", "Sure?", "Yes."), (3,)),
    (("Hello.", "Hi.", "<audio><audio>Same?", "No.", "<audio>This?", "A dog."), (2, 1, 4)),
]


@pytest.mark.parametrize("placement", ["response_prefix", "before_header", "off"])
@pytest.mark.parametrize(("turns", "tokens"), CONVERSATIONS)
def test_a_prompt_is_the_beginning_of_its_training_row(
    preparers: Preparers, row: MakeRow, placement: str, turns: Sequence[str], tokens: Sequence[int]
) -> None:
    """The final assistant turn is left out when generating, and what is left is exactly what was trained on."""
    preparer, one = preparers[placement, 1.0], row(*turns, sounds=len(tokens))
    trained = preparer.prepare([one], sounds(*tokens), train=True)
    asked = preparer.prepare([one], sounds(*tokens), train=False)
    unanswered = preparer.prepare([row(*turns[:-1], sounds=len(tokens))], sounds(*tokens), train=False)
    prompt, whole = asked.tokens["input_ids"][0], trained.tokens["input_ids"][0]
    assert torch.equal(prompt, whole[: len(prompt)])
    assert torch.equal(prompt, unanswered.tokens["input_ids"][0])
    assert preparer.tokenizer.decode(whole[len(prompt) :]) == turns[-1] + END
    assert torch.equal(asked.think_index, trained.think_index)
    assert trained.labels is not None
    assert trained.labels[0, len(prompt)] == whole[len(prompt)]


def test_odd_text_keeps_its_characters(preparer: HFPreparer, row: MakeRow) -> None:
    question = "  Wie heißt\n\ndas?  "
    inputs = preparer.prepare([row("<audio>" + question, " Grüße 🎵 ", sounds=1)], sounds(1), train=True)
    expected = USER + heard(1) + question + END + ASSISTANT + block(1) + " Grüße 🎵 " + END
    assert texts(preparer, inputs) == [SYSTEM + expected]


@pytest.mark.parametrize("token", ["<|audio_think|>", "<|audio_think_start|>", "<sound>"])
@pytest.mark.parametrize("turn", [0, 1])
def test_our_tokens_in_a_rows_text_are_refused(preparer: HFPreparer, row: MakeRow, token: str, turn: int) -> None:
    turns = ["What?", "Rain."]
    turns[turn] += token
    with pytest.raises(DataError, match=r"data\.jsonl:odd \(row odd\)"):
        preparer.prepare([row(*turns, name="odd")], None, train=True)


def test_a_sound_too_short_to_hear_is_refused_by_name(preparer: HFPreparer, row: MakeRow) -> None:
    audio = AudioBatch.from_arrays([np.ones(640, np.float32), np.ones(320, np.float32)], RATE)
    rows = [row("<audio>a", "b", sounds=1, name="fine"), row("<audio>a", "b", sounds=1, name="short")]
    with pytest.raises(DataError, match=r"\(row short\): 20 ms is too short to give one audio token"):
        preparer.prepare(rows, audio, train=True)


def test_a_sound_too_long_to_hear_is_refused_and_not_cut(preparer: HFPreparer, row: MakeRow) -> None:
    preparer.max_seconds = 1.0
    with pytest.raises(DataError, match=r"\(row long\): 2.0 s is more than the 1 s this backbone hears"):
        preparer.prepare([row("<audio>a", "b", sounds=1, name="long")], sounds(50), train=True)


def test_sounds_must_match_the_rows(preparer: HFPreparer, row: MakeRow) -> None:
    with pytest.raises(DataError, match="2 sounds for rows that name 1"):
        preparer.prepare([row("<audio>a", "b", sounds=1)], sounds(1, 1), train=True)


def test_a_row_without_an_answer_cannot_be_learnt(preparer: HFPreparer, row: MakeRow) -> None:
    with pytest.raises(DataError, match=r"\(row mute\): there is no answer to learn"):
        preparer.prepare([row("What?", name="mute")], None, train=True)


def test_a_tokenizer_without_the_thinking_tokens_is_refused(preparer: HFPreparer) -> None:
    class Lacking:
        def get_vocab(self) -> dict[str, int]:
            return {"<sound>": 1, "<|audio_think_start|>": 2, "<|audio_think_end|>": 3}

    with pytest.raises(PluginError, match=r"has no '<\|audio_think\|>' token"):
        type(preparer)(Lacking(), preparer.extractor, ThinkingSpec())  # type: ignore[call-arg, attr-defined]


SECONDS = [0.05, 0.5, 1.0, 3.337, 29.99, 30.0, 30.005, 31.0]


@pytest.fixture(scope="module")
def processor(preparer: Any) -> AudioFlamingo3Processor:
    return AudioFlamingo3Processor(preparer.extractor, preparer.tokenizer)


@pytest.mark.parametrize("seconds", SECONDS)
def test_front_end_equals_the_stock_processors(
    preparer: Any, processor: AudioFlamingo3Processor, sound: Callable[..., np.ndarray], seconds: float
) -> None:
    samples = sound(seconds)
    stock = processor(text=["<sound>"], audio=[samples])
    ours, counts = windowed_features(preparer.extractor, AudioBatch.from_arrays([samples], RATE))
    expected = int((stock["input_ids"] == preparer.audio_token).sum())
    assert counts == [expected]
    assert audio_tokens(samples.size) == expected
    frames = ours["input_features"].shape[-1]
    assert frames <= 3000
    assert (seconds > 29) or frames < 1.1 * 100 * seconds + 4
    # A product of another shape may round otherwise: by 1.2e-7 on an AMD EPYC, for windows of 8 frames.
    torch.testing.assert_close(ours["input_features"], stock["input_features"][..., :frames], rtol=0, atol=1e-6)
    assert torch.equal(ours["input_features_mask"], stock["input_features_mask"][:, :frames])
    assert (stock["input_features_mask"][:, frames:] == 0).all()


@pytest.mark.parametrize(
    ("samples", "tokens"),
    [(1, 0), (160, 0), (320, 0), (321, 1), (16_000, 25), (53_392, 83), (480_000, 750), (480_320, 750), (480_321, 751)],
)
def test_token_counts(samples: int, tokens: int) -> None:
    assert audio_tokens(samples) == tokens


@pytest.mark.parametrize(("answer", "message"), [("a<|im_end|>b", "which ends it"), ("", "an answer is empty")])
def test_answers_that_cannot_be_learnt_as_written(preparer: Any, row: Any, answer: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        preparer.prepare([row("Hello?", answer)], None, train=True)


def test_a_row_longer_than_the_context_is_refused(preparer: Any, row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparer, "max_tokens", 60)
    with pytest.raises(DataError, match="tokens are more than the 60 this backbone reads"):
        preparer.prepare([row("Hello? " * 20, "yes")], None, train=True)
