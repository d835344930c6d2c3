"""Several thinking blocks in a conversation: rows of several turns with sound, trained and asked, on every backbone.

Token ids, labels and thinking positions are compared with sequences put together by hand here, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import coatkit
from coatkit import DataError
from coatkit.build import build
from coatkit.cli import cli
from coatkit.data.rows import AudioRef, JsonlRows, Message, Row, learning
from coatkit.data.steps import load_batch
from coatkit.infer import AudioThinker, asked
from coatkit.packing import packed
from coatkit.thinking import IGNORE

# What stands before the conversation, and around the sound number N, in the published chat templates.
BACKBONES: dict[str, tuple[str, str, str]] = {
    "mini": ("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "", ""),
    "audio-flamingo-3": ("You are a helpful assistant.", "", ""),
    "qwen2-audio": ("You are a helpful assistant.", "Audio {n}: <|audio_bos|>", "<|audio_eos|>\n"),
    "qwen2.5-omni": ("You are a helpful assistant.", "<|audio_bos|>", "<|audio_eos|>"),
}
TURNS = ("<audio>What?", "Rain.", "Sure?", "Yes.", "A <audio> or <audio>?", "Two dogs.", "<audio>", "None.")
TOKENS = (5, 3, 4, 6)
"""Audio tokens of the sounds of TURNS, 40 ms each."""


@pytest.fixture(scope="module")
def heard(sound: Callable[..., Any]) -> tuple[AudioRef, ...]:
    return tuple(AudioRef(Path(f"clip{i}"), samples=(sound(0.04 * n, i), 16_000)) for i, n in enumerate(TOKENS))


@pytest.fixture(scope="module")
def talk(heard: tuple[AudioRef, ...]) -> Row:
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(TURNS)]
    return Row("talk", tuple(messages), heard, "data.jsonl:1")


class ByHand:
    """A row put together piece by piece, in the order of the figure in docs/data.md."""

    def __init__(self, preparer: Any, use: str) -> None:
        self.preparer, self.use = preparer, use
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.audio: list[list[int]] = []
        self.think: list[list[int]] = []

    def text(self, text: str, learn: bool = False) -> None:
        ids = self.preparer.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.labels += ids if learn else [IGNORE] * len(ids)
        self.ids += ids

    def special(self, token: int, count: int = 1) -> list[int]:
        places = list(range(len(self.ids), len(self.ids) + count))
        self.ids += [token] * count
        self.labels += [IGNORE] * count
        return places

    def user(self, *parts: str | int) -> None:
        """Parts of a question: texts, and sounds by their audio tokens. What is between two sounds is one text."""
        waiting = "<|im_start|>user\n"
        for part in (*parts, "<|im_end|>\n"):
            if isinstance(part, str):
                waiting += part
                continue
            _, before, after = BACKBONES[self.use]
            self.text(waiting + before.format(n=len(self.audio) + 1))
            self.audio.append(self.special(self.preparer.audio_token, part))
            waiting = after
        self.text(waiting)

    def assistant(self, answer: str, block: tuple[int, ...] = (), learn: bool = True, placement: str = "") -> None:
        tokens = self.preparer.tokens
        for header in (placement != "before_header", placement == "before_header"):
            if header:
                self.text("<|im_start|>assistant\n")
            elif block:
                self.special(tokens.start)
                self.think += [self.special(tokens.think, count) for count in block]
                self.special(tokens.end)
        self.text(answer + "<|im_end|>", learn)
        self.text("\n")


def by_hand(preparer: Any, use: str, placement: str, counts: tuple[int, ...], learnt: tuple[bool, ...]) -> ByHand:
    """TURNS; `counts` are the thinking positions of its four sounds, none for no block."""
    row = ByHand(preparer, use)
    row.text(f"<|im_start|>system\n{BACKBONES[use][0]}<|im_end|>\n")
    row.user(5, "What?")
    row.assistant("Rain.", counts[:1], learnt[0], placement)
    row.user("Sure?")
    row.assistant("Yes.", (), learnt[1], placement)
    row.user("A ", 3, " or ", 4, "?")
    row.assistant("Two dogs.", counts[1:3], learnt[2], placement)
    row.user(6)
    row.assistant("None.", counts[3:], learnt[3], placement)
    return row


def places(index: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    return [at[:n].tolist() for at, n in zip(index, lengths.tolist(), strict=True)]


ALL, LAST = (True, True, True, True), (False, False, False, True)


@pytest.mark.parametrize(
    ("thinking", "counts", "learn"),
    [
        ({"placement": "response_prefix"}, (5, 3, 4, 6), ALL),
        ({"placement": "before_header"}, (5, 3, 4, 6), ALL),
        ({"tokens_per_audio_token": 0.5}, (2, 2, 2, 3), LAST),  # 2.5 and 1.5 go to the even number
        ({"tokens_per_audio_token": 0.25}, (1, 1, 1, 2), (True, False, True, False)),
        ("off", (), ALL),
    ],
)
@pytest.mark.parametrize("use", BACKBONES)
def test_a_conversation_is_laid_out_as_by_hand(
    use: str, thinking: Any, counts: tuple[int, ...], learn: tuple[bool, ...], talk: Row
) -> None:
    preparer: Any = coatkit.load_backbone(use, weights="random", device="cpu", thinking=thinking).preparer
    placement = thinking.get("placement", "") if isinstance(thinking, dict) else ""
    expected = by_hand(preparer, use, placement, counts, learn)
    marked = list(talk.messages)
    for at, wanted in zip((1, 3, 5, 7), learn, strict=True):
        marked[at] = replace(marked[at], learn=wanted)
    row = learning(talk, "last") if learn == LAST else replace(talk, messages=tuple(marked))
    # Beside a short row, so that one of the two is padded: on the right in training, on the left when asked.
    short = Row("short", (Message("user", "Hm?"), Message("assistant", "Hm.")))
    inputs = load_batch([short, row], preparer, (), 120.0, train=True).inputs
    assert inputs.tokens["input_ids"][1].tolist() == expected.ids
    assert inputs.labels is not None
    assert inputs.labels[1].tolist() == expected.labels
    assert inputs.audio_row.tolist() == [1, 1, 1, 1]
    assert places(inputs.audio_index, inputs.audio_lengths) == expected.audio
    assert places(inputs.think_index, inputs.think_lengths) == (expected.think or [[]] * 4)
    # Asked: the same, up to each answer in turn.
    tokenizer, start = preparer.tokenizer, 0
    for turn in (1, 3, 5, 7):
        sounds = sum(m.content.count("<audio>") for m in talk.messages[:turn])
        until = Row("asked", talk.messages[:turn], talk.audios[:sounds])
        prompt = load_batch([until], preparer, (), 120.0, train=False).inputs.tokens["input_ids"][0].tolist()
        assert prompt == expected.ids[: len(prompt)]
        answer = tokenizer(talk.messages[turn].content + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert expected.ids[len(prompt) : len(prompt) + len(answer)] == answer
        assert len(prompt) > start
        start = len(prompt)


# In the model


@pytest.fixture
def model(project: Any, stir: Any) -> Any:
    return stir(build(project.load(), "cpu").eval())


def test_a_block_knows_what_stands_before_it_alone(model: Any, talk: Row, sound: Any) -> None:
    """Another third sound changes the states about it and about the fourth, and none about the first two."""
    other = AudioRef(Path("other"), samples=(sound(0.16, 9), 16_000))
    changed = replace(talk, audios=(*talk.audios[:2], other, talk.audios[3]))
    states = []
    for row in (talk, changed):
        batch = load_batch([row], model.backbone.preparer, (), 120.0, train=True)
        with torch.no_grad():
            states.append(model.backbone.forward(batch.inputs).thinking)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(*states, strict=True)]
    # The second shares its block with the third, but the third sound stands before that block.
    assert same == [True, False, False, False]


def test_every_block_is_taught_what_its_own_sound_is(project: Any, model: Any, talk: Row) -> None:
    rates = {8_000, 16_000}

    def targets(row: Row) -> tuple[torch.Tensor, list[int]]:
        batch = load_batch([row], model.backbone.preparer, rates, 120.0, train=True)
        return model.targets(batch, ["level"])["level"], batch.inputs.think_lengths.tolist()

    together, lengths = targets(talk)
    assert lengths == list(TOKENS)
    for number, ref in enumerate(talk.audios):
        alone, (length,) = targets(Row("one", (Message("user", "<audio>?"), Message("assistant", "a")), (ref,)))
        torch.testing.assert_close(together[number, :length], alone[0])
    assert len({round(float(t[0, 0]), 6) for t in together}) == len(TOKENS)


def test_every_block_is_learnt_from_even_when_the_last_answer_alone_is(model: Any, talk: Row) -> None:
    """`data.learn: last` takes the cross-entropy off earlier answers; the experts teach at every block all the same."""
    batch = load_batch([learning(talk, "last")], model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
    seen: dict[str, torch.Tensor] = {}
    model.heads["level"].register_forward_pre_hook(
        lambda module, args: seen.update(states=args[0]) or args[0].retain_grad()
    )
    model(batch, ["level"]).sums["level.mse"].backward()
    gradient = seen["states"].grad
    assert gradient is not None
    for number, count in enumerate(TOKENS):
        assert (gradient[number, :count].abs().sum(-1) > 0).all()
        assert (gradient[number, count:] == 0).all()


def test_packed_conversations_give_the_losses_of_padded_ones(model: Any, talk: Row) -> None:
    short = replace(talk, id="short", messages=talk.messages[:2], audios=talk.audios[:1])
    batch = load_batch([talk, short, talk], model.backbone.preparer, {8_000, 16_000}, 120.0, train=True)
    with torch.no_grad():
        padded = model(batch, ["audio", "level"]).sums
        batch.inputs = packed(batch.inputs)
        for name, value in model(batch, ["audio", "level"]).sums.items():
            torch.testing.assert_close(value, padded[name], rtol=1e-5, atol=1e-5)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(model: Any, talk: Row) -> None:
    """Some templates drop the thoughts of earlier answers: what was learnt would not be what is read later."""
    preparer: Any = model.backbone.preparer
    kept, rewriting = preparer.tokenizer.chat_template, "{% set messages = messages[-1:] %}"
    preparer.tokenizer.chat_template = rewriting + kept
    try:
        with pytest.raises(DataError, match=r"data\.jsonl:1 \(row talk\): the chat template rewrites earlier turns"):
            load_batch([talk], preparer, (), 120.0, train=True)
    finally:
        preparer.tokenizer.chat_template = kept


# Learnt and asked


WHICH, BEFORE = "What is heard?", "<audio>What was heard before this?"


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any], sound: Callable[..., Any]) -> Any:
    """A run whose second answers are about the sound of the first turn, which no first answer names."""
    project = new_project()
    project.rows = []
    for number in range(3):
        project.add_clip(f"s{number}", sound(0.3 + 0.2 * number, number))
    project.rows = [
        {
            "id": f"{first}-{second}",
            "audios": [f"clips/s{first}.wav", f"clips/s{second}.wav"],
            "messages": [
                {"role": "user", "content": "<audio>Listen."},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": BEFORE},
                {"role": "assistant", "content": f"it was {first}"},
            ],
        }
        for first, second in ((0, 1), (1, 0), (2, 1), (0, 2))
    ]
    project.spec["stages"] = [
        {"name": "one", "steps": 90, "lr": 1e-2, "batch": {"rows": 4}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    return project


@pytest.fixture(scope="module")
def thinker(trained: Any) -> AudioThinker:
    return coatkit.load(trained.run.folder, device="cpu")


def clip(trained: Any, number: int) -> Path:
    path: Path = trained.folder / f"clips/s{number}.wav"
    return path


def test_a_conversation_is_gone_on_with(trained: Any, thinker: AudioThinker) -> None:
    rows = JsonlRows(trained.folder / "train.jsonl")[:]
    expected = thinker.answer(rows)
    assert expected == ["it was 0", "it was 1", "it was 2", "it was 0"]
    for (first, second), answer in zip(((0, 1), (1, 0), (2, 1), (0, 2)), expected, strict=True):
        history = [(clip(trained, first), "Listen.", "Yes.")]
        assert thinker.ask(clip(trained, second), BEFORE, history=history) == answer
        assert "".join(thinker.stream(clip(trained, second), BEFORE, history=history)) == answer
    assert thinker.ask(clip(trained, 0), "Listen.") == "Yes."
    # The sound of the first turn is what counts: no answer before says which it was.
    assert len(set(expected)) == 3


def test_an_earlier_sound_may_be_of_any_kind_and_is_thought_about(trained: Any, thinker: AudioThinker) -> None:
    samples = (torch.from_numpy(coatkit.data.audio.read(AudioRef(clip(trained, 2)), 9.0)[0]).numpy(), 16_000)
    for first in (clip(trained, 2), str(clip(trained, 2)), AudioRef(clip(trained, 2)), samples):
        answer, thought = thinker.ask(
            clip(trained, 1),
            BEFORE,
            history=[(None, "Hello.", "Hi."), (first, "Listen.", "Yes.")],
            return_thinking=True,
        )
        lengths = [len(one.states) for one in thought.sounds]
        assert (
            lengths
            == thinker.prepare([asked(clip(trained, 2), "x"), asked(clip(trained, 1), "x")]).think_lengths.tolist()
        )
        assert answer


def test_the_command_goes_on_with_a_conversation(trained: Any) -> None:
    run, (first, second) = str(trained.run.folder), (str(clip(trained, n)) for n in (1, 0))
    turn = ["--turn", first, "Listen.", "Yes."]
    done = CliRunner().invoke(cli, ["ask", run, second, BEFORE, *turn], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, "it was 1\n")
    done = CliRunner().invoke(cli, ["ask", run, second, BEFORE, *turn, "--stream"], catch_exceptions=False)
    assert done.stdout == "it was 1\n"
    # Without a new sound, and after two turns.
    more = [*turn, "--turn", second, BEFORE, "it was 1"]
    model = coatkit.load(trained.run.folder, device="cpu")
    expected = model.ask(None, "Sure?", history=[(first, "Listen.", "Yes."), (second, BEFORE, "it was 1")])
    done = CliRunner().invoke(cli, ["ask", run, "-", "Sure?", *more], catch_exceptions=False)
    assert done.stdout.rstrip("\n") == expected


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([("gone.wav", "Listen.", "Yes.")], r"gone\.wav: .*there is no such file"),
        ([(None, " ", "Yes.")], r"question 1, turn 1 .*the question is empty"),
        ([(None, "Hm?", "a"), (None, "Hm?", " ")], r"question 1, turn 2 .*its answer is empty; give what was answered"),
        ([(None, "Hm?", "a <audio>")], r"turn 1 .*its answer holds <audio>"),
        ([(None, "<audio>Hm?", "a")], r"turn 1 .*has 1 <audio> tags for 0 sound"),
        ([(None, "Hm?", "a <|audio_think|>")], "holds one of the thinking tokens"),
        ([(None, "Hm?", "a<|im_end|>b")], "an answer holds <|im_end|>, which ends it".replace("|", r"\|")),
    ],
)
def test_a_turn_that_cannot_be_is_named(thinker: AudioThinker, history: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        thinker.ask(None, "And?", history=history)
