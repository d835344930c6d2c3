"""Text chain-of-thought: asked for in the prompt, read after the last `Answer:`, kept apart in evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import coatkit
from coatkit.cli import cli
from coatkit.data.rows import AudioRef, JsonlRows, Message, Row
from coatkit.errors import CoatkitError, PluginError, RunError
from coatkit.evaluation.cot import INSTRUCTION, Reasoned, asked_to_think, read_answer, reason, without_block
from coatkit.infer import AudioThinker

QUESTION = "What is heard?"


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Any:
    """A run that knows by heart to think about two clips, and to answer the first of them in a word."""
    project = new_project()
    first, second = project.rows[:2]
    project.rows = [
        {**first, "id": "cot0", "messages": talk(f"<audio>{QUESTION}\n{INSTRUCTION}", "A tone. Answer: x")},
        {**second, "id": "cot1", "messages": talk(f"<audio>{QUESTION}\n{INSTRUCTION}", "It hums.")},
        {**first, "messages": talk(f"<audio>{QUESTION}", "a tone")},
    ]
    project.spec["backbone"]["train"] = {"lm": "full"}  # a few adapters cannot learn a whole sentence by heart
    project.spec["stages"] = [
        {"name": "one", "steps": 100, "lr": 5e-3, "batch": {"rows": 3}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    test = [{**first, "messages": talk(f"<audio>{QUESTION}", "x")}]
    test += [{**second, "messages": talk(f"<audio>{QUESTION}", "clip 1")}]
    (project.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return project


@pytest.fixture(scope="module")
def model(trained: Any) -> AudioThinker:
    return coatkit.load(trained.run.folder, device="cpu")


def invoke(*arguments: Any) -> Result:
    """What a command did; an error it foresaw is raised."""
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    if isinstance(result.exception, CoatkitError):
        raise result.exception
    return result


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# Reading and asking

SAID = {
    "plain": ("It barks. Answer: dog", Reasoned("dog", "It barks.")),
    "the last": ("Answer: cat? No.\nAnswer: dog", Reasoned("dog", "Answer: cat? No.")),
    "several lines": ("Hm.\nAnswer:\nA dog.\nTruly.", Reasoned("A dog.\nTruly.", "Hm.")),
    "bold": ("Hm. **Answer:** dog", Reasoned("dog", "Hm.")),
    "bold word": ("Hm. **Answer**: dog", Reasoned("dog", "Hm.")),
    "lower case": ("hm, so the answer : dog", Reasoned("dog", "hm, so the")),
    "at once": ("Answer: dog", Reasoned("dog", "")),
    "none": (" It barks and barks", Reasoned("It barks and barks", "", finished=False)),
    "cut off": ("It barks. Answer: ", Reasoned("It barks. Answer:", "", finished=False)),
    "another word": ("Nonanswer: dog", Reasoned("Nonanswer: dog", "", finished=False)),
    "no colon": ("The answer is dog", Reasoned("The answer is dog", "", finished=False)),
    "nothing": ("", Reasoned("", "", finished=False)),
}


@pytest.mark.parametrize(("text", "read"), SAID.values(), ids=SAID)
def test_the_answer_is_what_follows_the_last_word_answer(text: str, read: Reasoned) -> None:
    assert read_answer(text) == read


def test_the_instruction_follows_the_last_question() -> None:
    turns = (
        Message("system", "Be brief."),
        Message("user", "<audio>What?"),
        Message("assistant", "A dog."),
        Message("user", "<audio>And this? "),
        Message("assistant", "A cat."),
    )
    row = Row("r", turns, (AudioRef(Path("a.wav")), AudioRef(Path("b.wav"))))
    asked = asked_to_think(row)
    assert asked.messages == (*turns[:3], Message("user", f"<audio>And this?\n{INSTRUCTION}"))
    assert asked.audios == row.audios
    assert row.messages == turns
    assert "Answer:" in INSTRUCTION


def test_a_thought_and_an_answer(trained: Any, model: AudioThinker) -> None:
    rows = JsonlRows(trained.folder / "test.jsonl")[:]
    assert reason(model, rows) == [Reasoned("x", "A tone."), Reasoned("It hums.", finished=False)]
    assert model.answer(rows[:1]) == ["a tone"]
    (short,) = reason(model, rows[:1], max_new_tokens=1, max_thought_tokens=2)
    (shorter,) = reason(model, rows[:1], max_new_tokens=1, max_thought_tokens=1)
    assert short.answer.startswith(shorter.answer)
    assert len(short.answer) > len(shorter.answer)
    assert not short.finished


def test_asking_with_a_thought(trained: Any) -> None:
    arguments = ["ask", trained.run.folder, trained.folder / "clips/r00.wav", QUESTION]
    result = invoke(*arguments, "--cot")
    assert (result.stdout, result.stderr) == ("x\n", "A tone.\n\n")
    assert invoke(*arguments).stdout == "a tone\n"
    result = invoke(*arguments, "--cot", "--max-thought-tokens", 1, "--max-new-tokens", 1)
    assert result.stderr == "no 'Answer:' within 2 tokens; all that was said:\n"
    assert "A tone. Answer: x".startswith(result.stdout.strip())
    result = invoke(*arguments, "--max-thought-tokens", 9)
    assert result.exit_code == 2
    assert "without --cot" in result.stderr


# Without the block


def test_without_its_block_an_untrained_run_is_the_stock_model(trained: Any, model: AudioThinker) -> None:
    stock = without_block(coatkit.load(trained.run.folder, trained=False, device="cpu"))
    other = coatkit.load_backbone(
        "mini",
        thinking=None,
        weights="random",
        seed=11,
        lora={"rank": 4, "alpha": 8},
        train={"lm": "full"},
        device="cpu",
    )
    rows = JsonlRows(trained.folder / "test.jsonl")[:1]
    mine, blocked = stock.prepare(rows), model.prepare(rows)
    theirs = AudioThinker(other, "stock").prepare(rows)
    assert torch.equal(mine.tokens["input_ids"], theirs.tokens["input_ids"])
    assert not mine.think_lengths.any()
    assert blocked.tokens["input_ids"].shape[1] == mine.tokens["input_ids"].shape[1] + int(blocked.think_lengths) + 2
    assert stock.answer(rows, max_new_tokens=8) == AudioThinker(other, "stock").answer(rows, max_new_tokens=8)
    said = invoke("ask", trained.run.folder, trained.folder / "clips/r00.wav", QUESTION, "--vanilla",
                  "--max-new-tokens", 8).stdout  # fmt: skip
    assert [said.strip()] == stock.answer(rows, max_new_tokens=8)
    assert without_block(stock) is stock


def test_a_preparer_that_cannot_leave_it_out_is_named(model: AudioThinker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stiff:
        pass

    monkeypatch.setattr(model.backbone, "preparer", Stiff())
    with pytest.raises(PluginError, match="Stiff has no `thinking`"):
        without_block(model)


# Evaluations


def test_thoughts_are_kept_and_answers_scored(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run.folder, run)
    arguments = ["eval", run, "--data", trained.folder / "test.jsonl", "--metric", "exact", "--max-new-tokens", 16]
    said = invoke(*arguments, "--cot").stdout
    assert "text chain-of-thought of up to 256 tokens" in said
    assert "all: 1 rows came to no 'Answer:'; all they said counts" in said
    folder = run / "eval/test-cot"
    first, second = lines_of(folder)
    assert (first["question"], first["thought"], first["answer"], first["score"]) == (
        QUESTION,
        "A tone.",
        "x",
        100,
    )
    assert "cot_unfinished" not in first
    assert (second["thought"], second["answer"], second["score"]) == ("", "It hums.", 0)
    assert second["cot_unfinished"] is True
    results = json.loads((folder / "results.json").read_text())
    assert (results["cot"], results["block"], results["trained"]) == (256, True, True)
    assert (results["tasks"]["all"]["score"], results["tasks"]["all"]["cot_unfinished"]) == (50, 1)

    plain = invoke(*arguments).stdout  # another folder
    assert "chain-of-thought" not in plain
    assert "thought" not in lines_of(run / "eval/test")[0]
    assert "cot_unfinished" not in json.loads((run / "eval/test/results.json").read_text())["tasks"]["all"]
    assert invoke("compare", run / "eval/test", folder).exit_code == 0

    for words, named in ((["--cot", "--max-thought-tokens", 9], r"cot\.max_thought_tokens"), ([], "cot")):
        with pytest.raises(RunError, match=f"changed since: {named}"):
            invoke(*arguments, *words, "--out", folder)
    monkeypatch.setattr(AudioThinker, "answer", lambda *a, **k: pytest.fail("asked again"))
    assert invoke(*arguments, "--cot").stdout == said


def test_the_vanilla_models_evaluation_is_its_own(trained: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run.folder, run)
    arguments = ["eval", run, "--data", trained.folder / "test.jsonl", "--metric", "exact", "--max-new-tokens", 4]
    said = invoke(*arguments, "--vanilla", "--cot", "--max-thought-tokens", 4).stdout
    assert "untrained; without the thinking block; text chain-of-thought of up to 4 tokens" in said
    results = json.loads((run / "eval/test-vanilla-cot/results.json").read_text())
    assert (results["trained"], results["block"], results["cot"]) == (False, False, 4)
    invoke(*arguments, "--untrained")
    with pytest.raises(RunError, match="changed since: without_block"):
        invoke(*arguments, "--vanilla", "--out", run / "eval/test-untrained")
    assert invoke(*arguments, "--max-thought-tokens", 4).exit_code == 2


def test_an_evaluation_from_before_there_was_a_thought_goes_on(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["eval", trained.run.folder, "--data", trained.folder / "test.jsonl", "--metric", "exact", "--out",
                 tmp_path / "out"]  # fmt: skip
    invoke(*arguments)
    record = json.loads((tmp_path / "out/eval.json").read_text())
    del record["identity"]["cot"], record["identity"]["without_block"]
    (tmp_path / "out/eval.json").write_text(json.dumps(record))
    monkeypatch.setattr(AudioThinker, "answer", lambda *a, **k: pytest.fail("asked again"))
    assert invoke(*arguments).exit_code == 0


def test_a_sound_that_cannot_be_decoded_is_left_out(trained: Any, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(trained.folder / "clips", here / "clips")
    shutil.copy(trained.folder / "test.jsonl", here)
    flac = (here / "clips/r01.flac").read_bytes()
    (here / "clips/r01.flac").write_bytes(flac[: len(flac) // 2])
    out = tmp_path / "out"
    invoke("eval", trained.run.folder, "--data", here / "test.jsonl", "--metric", "exact", "--out", out, "--cot",
           "--skip-bad")  # fmt: skip
    first, second = lines_of(out)
    assert (first["answer"], first["thought"]) == ("x", "A tone.")
    assert "bad" in second
    assert "thought" not in second
