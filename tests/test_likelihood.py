"""The metric `likelihood`: the option whose first token is likeliest to begin the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import coatkit
from coatkit.cli import cli
from coatkit.data.rows import JsonlRows
from coatkit.errors import CoatkitError, DataError, PluginError, RunError
from coatkit.evaluation.items import tasks_of_suite
from coatkit.evaluation.likelihood import first_tokens, likeliest
from coatkit.evaluation.suite import read_suite

OPTIONS = ["hum", "drum", "bell", "voice"]
SUITE = """\
name: closed
tasks:
  - name: words
    data: test.jsonl
    metric: choice
    choices: [hum, drum, bell, voice]
    max_new_tokens: 4
  - name: likely
    data: test.jsonl
    metric: likelihood
    choices: [hum, drum, bell, voice]
"""


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Any:
    """A run that knows four clips by heart; test.jsonl has them and two more."""
    project = new_project()
    rows = [
        {
            **row,
            "messages": [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": OPTIONS[i % 4]}],
        }
        for i, row in enumerate(project.rows[:6])
    ]
    project.rows = rows[:4]
    project.spec["backbone"]["train"] = {"lm": "full"}
    project.spec["stages"] = [
        {"name": "one", "steps": 120, "lr": 5e-3, "batch": {"rows": 4}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    (project.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project.folder / "suite.yaml").write_text(SUITE)
    return project


def call(*arguments: Any) -> str:
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    if isinstance(result.exception, CoatkitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def items_of(trained: Any) -> list[Any]:
    return tasks_of_suite(read_suite(trained.folder / "suite.yaml"))[1].items


@pytest.mark.parametrize("known", [True, False])
def test_the_option_is_the_one_that_decoding_among_the_first_tokens_takes(trained: Any, known: bool) -> None:
    model = coatkit.load(trained.run.folder, trained=known, device="cpu")
    items = items_of(trained)
    allowed = first_tokens(model, items[0])
    tokenizer = model.backbone.preparer.tokenizer
    rows = list(JsonlRows(trained.folder / "test.jsonl"))
    told = model.answer(rows, max_new_tokens=1, prefix_allowed_tokens_fn=lambda batch, ids: allowed)
    firsts = [tokenizer.decode([token]).strip() for token in allowed]
    found = likeliest(model, items)
    assert [firsts[OPTIONS.index(option)] for option in found] == told
    if known:
        assert found[:4] == OPTIONS
        assert [likeliest(model, [item])[0] for item in items] == found  # a row alone, and among longer ones


def test_an_evaluation_by_likelihood(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    said = call("eval", trained.run.folder, "--data", trained.folder / "suite.yaml", "--out", out)
    assert "likely  likelihood" in said
    results = json.loads((out / "results.json").read_text())["tasks"]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    likely = [line for line in lines if line["task"] == "likely"]
    right = [line["answer"] == line["references"][0] for line in likely]
    assert results["likely"]["rows"] == 6
    assert results["likely"]["score"] == pytest.approx(100 * sum(right) / 6)
    assert all(right[:4])
    assert {line["answer"] for line in likely} <= set(OPTIONS)
    assert results["likely"]["details"]["most_frequent_reference"] == pytest.approx(100 / 3)


def test_other_options_are_asked_anew(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE.replace("test.jsonl", str(trained.folder / "test.jsonl")))
    out = tmp_path / "eval"
    words = ["eval", trained.run.folder, "--data", tmp_path / "suite.yaml", "--out", out]
    call(*words)
    (tmp_path / "suite.yaml").write_text(
        SUITE.replace("test.jsonl", str(trained.folder / "test.jsonl")).replace("metric: choice", "metric: likelihood")
    )
    with pytest.raises(RunError, match="words"):  # in words it was something else that was asked
        call(*words)


def test_a_thought_in_words_leaves_it_out(trained: Any, tmp_path: Path) -> None:
    words = ["eval", trained.run.folder, "--cot", "--max-thought-tokens", 4, "--data"]
    call(*words, trained.folder / "suite.yaml", "--out", tmp_path / "eval")
    assert list(json.loads((tmp_path / "eval/results.json").read_text())["tasks"]) == ["words"]
    rows = ["--metric", "likelihood", "--choices", ",".join(OPTIONS), "--out", tmp_path / "other"]
    with pytest.raises(RunError, match="leave out --cot"):
        call(*words, trained.folder / "test.jsonl", *rows)


def test_options_that_begin_alike_are_refused_with_the_row(trained: Any, tmp_path: Path) -> None:
    rows = ["--metric", "likelihood", "--choices", "hum,drum,bell,voice,voice of a man", "--out", tmp_path / "eval"]
    with pytest.raises(DataError, match=r"test\.jsonl.*'voice' and 'voice of a man' begin with one token.*choice"):
        call("eval", trained.run.folder, "--data", trained.folder / "test.jsonl", *rows)


def test_no_options(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the metric likelihood needs options"):
        call("eval", trained.run.folder, "--data", trained.folder / "test.jsonl", "--metric", "likelihood")


def test_a_backbone_that_gives_no_probabilities_is_named(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = coatkit.load(trained.run.folder, device="cpu")
    forward = model.backbone.forward

    def silent(inputs: Any) -> Any:
        output = forward(inputs)
        output.last = None
        return output

    monkeypatch.setattr(model.backbone, "forward", silent)
    with pytest.raises(PluginError, match="use the metric choice"):
        likeliest(model, items_of(trained))
