"""Conversations with several sounds, from a file to the loss, on tiny backbones with real classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from coatkit import AudioBatch, load_backbone
from coatkit.data.rows import Message, Row, learning
from coatkit.protocols import Inputs
from coatkit.thinking import IGNORE

RATE = 16_000
TURNS = ["Hello.", "Hi.", "<audio>What?", "Rain.", "Sure?", "Yes.", "<audio> or <audio>?", "A dog."]
ANSWERS = [TURNS[i] for i in (1, 3, 5, 7)]
Make = Callable[..., Row]
Sound = Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=["mini", "qwen2-audio"])
def backbone(request: pytest.FixtureRequest) -> Any:
    return load_backbone(request.param, weights="random", device="cpu")


@pytest.fixture
def prepared(backbone: Any, row: Make, sound: Sound) -> Callable[..., Inputs]:
    """A conversation of four answers and three sounds, and a row of text; `learn` by answer."""

    def make(*learn: bool, switch: str = "all") -> Inputs:
        talk = row(*TURNS, sounds=3, name="talk")
        flags = iter(learn or (True,) * 4)
        messages = [Message(m.role, m.content, next(flags) if m.role == "assistant" else True) for m in talk.messages]
        talk = Row(talk.id, tuple(messages), talk.audios, talk.where)
        audio = AudioBatch.from_arrays([sound(0.2), sound(0.32), sound(0.12)], RATE)
        rows = [learning(talk, switch), row("1 plus 1?", "2", name="text")]
        inputs: Inputs = backbone.preparer.prepare(rows, audio, train=True)
        return inputs

    return make


def learnt(backbone: Any, inputs: Inputs) -> list[str]:
    """What each row's loss is taken on, turns parted by the end-of-turn token."""
    assert inputs.labels is not None
    return [backbone.preparer.tokenizer.decode(labels[labels != IGNORE]) for labels in inputs.labels]


def test_blocks_stand_before_the_first_answer_after_their_sounds(
    backbone: Any, prepared: Callable[..., Inputs]
) -> None:
    inputs = prepared()
    assert inputs.labels is not None
    assert inputs.audio_row.tolist() == [0, 0, 0]  # the row of text has no sound and no block
    assert inputs.think_lengths.tolist() == inputs.audio_lengths.tolist() == [5, 8, 3]
    labels = inputs.labels[0]
    starts = [i for i in range(1, len(labels)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
    assert len(starts) == 4  # of the answers
    heard = [(int(at[0]), int(at[n - 1])) for at, n in zip(inputs.audio_index, inputs.audio_lengths, strict=True)]
    thought = [(int(at[0]), int(at[n - 1])) for at, n in zip(inputs.think_index, inputs.think_lengths, strict=True)]
    assert starts[0] < heard[0][0] < heard[0][1] < thought[0][0] < thought[0][1] == starts[1] - 2
    assert starts[2] < heard[1][0] < heard[1][1] < heard[2][0] < heard[2][1] < thought[1][0]
    assert thought[1][1] == thought[2][0] - 1  # two sounds of one turn share a block
    assert thought[2][1] == starts[3] - 2  # the block's end, then the answer
    ids = inputs.tokens["input_ids"][0]
    think, marks = backbone.preparer.tokens, ids.tolist()
    assert marks.count(think.start) == marks.count(think.end) == 2
    assert marks.count(think.think) == 16


@pytest.mark.parametrize(
    ("learn", "switch", "turns"),
    [
        ((), "all", [0, 1, 2, 3]),
        ((), "last", [3]),
        ((True, False, False, True), "all", [0, 3]),
        ((True, False, True, True), "last", [3]),
    ],
)
def test_labels_are_the_answers_that_are_learnt(
    backbone: Any, prepared: Callable[..., Inputs], learn: tuple[bool, ...], switch: str, turns: list[int]
) -> None:
    end = backbone.preparer.tokenizer.eos_token
    inputs = prepared(*learn, switch=switch)
    assert learnt(backbone, inputs) == ["".join(ANSWERS[i] + end for i in turns), "2" + end]
    assert torch.equal(inputs.tokens["input_ids"], prepared().tokens["input_ids"])  # what is read does not change


def test_the_loss_is_the_sum_over_the_learnt_answers(backbone: Any, prepared: Callable[..., Inputs]) -> None:
    def loss(*learn: bool) -> tuple[float, int]:
        with torch.no_grad():
            out = backbone.forward(prepared(*learn))
        return float(out.ce_sum), out.ce_count

    whole = loss()
    parts = [loss(*(i == turn for i in range(4))) for turn in range(4)]
    text = prepared()  # the row of text is in each part
    assert text.labels is not None
    text.labels[0] = IGNORE
    with torch.no_grad():
        again = backbone.forward(text)
    assert sum(count for _, count in parts) - whole[1] == 3 * again.ce_count == 3 * 2
    assert sum(ce for ce, _ in parts) - whole[0] == pytest.approx(3 * float(again.ce_sum), rel=1e-4)


FORMATS: dict[str, Callable[[list[str], list[str]], dict[str, Any]]] = {
    "coatkit": lambda turns, sounds: {
        "messages": _talk(turns, "role", "content", "user", "assistant"),
        "audios": sounds,
    },
    "ms-swift": lambda turns, sounds: {
        "query": turns[-2],
        "response": turns[-1],
        "history": [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 2, 2)],
        "audios": sounds,
    },
    "sharegpt": lambda turns, sounds: {
        "conversations": _talk(turns, "from", "value", "human", "gpt"),
        "audios": sounds,
    },
}


def _talk(turns: list[str], role: str, text: str, user: str, assistant: str) -> list[dict[str, str]]:
    return [{role: assistant if i % 2 else user, text: turn} for i, turn in enumerate(turns)]


def test_training_is_the_same_from_every_format_and_differs_by_what_is_learnt(new_project: Callable[[], Any]) -> None:
    """Two sounds and turns, one sound, none, in one batch; the numbers of the metrics are those of our own format."""
    talks = [
        (["<audio>First?", "Low.", "And <audio>?", "High."], [0, 1]),
        (["<audio>What?", "Rain.", "Sure?", "Yes."], [2]),
        (["1 plus 1?", "2", "And 1?", "3"], []),
        (["<audio> or <audio>?", "The second."], [3, 4]),
    ]

    def losses(format: str, learn: str) -> list[float]:
        project = new_project()
        clips = sorted(path.name for path in (project.folder / "clips").iterdir())
        rows = [FORMATS[format](turns, [f"clips/{clips[i]}" for i in sounds]) for turns, sounds in talks]
        project.spec["data"] = {"train": {"path": "talks.jsonl", "format": format}, "learn": learn}
        (project.folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        project.spec["stages"] = [{**project.spec["stages"][1], "steps": 2, "batch": {"rows": 4}}]
        found = [one["loss"] for one in project.train().metrics if "loss" in one]
        assert len(found) == 2
        assert np.isfinite(found).all()
        return found

    wanted = losses("coatkit", "all")
    assert losses("ms-swift", "all") == losses("sharegpt", "all") == wanted
    assert losses("coatkit", "last") == losses("sharegpt", "last") != wanted
