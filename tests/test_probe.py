"""Probes: what they find and do not find, what stays together, and the command over a run's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import coatkit
from coatkit.analysis import probe_report
from coatkit.analysis.probe import OutOfFold, Settings, accuracy, check, exchanged, probe, rank_correlation, shuffled
from coatkit.analysis.probe_states import LAST, THINKING, Source, collect, states_of
from coatkit.cli import cli
from coatkit.errors import DataError, RunError
from coatkit.evaluation.items import tasks_of_rows
from coatkit.evaluation.predictions import read_lines

SETTINGS = Settings(folds=4)


@pytest.fixture(scope="module")
def made() -> tuple[np.ndarray, list[str], list[str]]:
    """States [120, 8] of 40 groups; the class is in one direction of them, behind noise."""
    random = np.random.default_rng(0)
    classes = np.repeat(np.arange(40) % 2, 3)
    states = random.standard_normal((120, 8))
    states[:, 3] += 3 * classes
    return states, [f"class {c}" for c in classes], [f"group {g}" for g in np.repeat(np.arange(40), 3)]


# Statistics


def test_what_is_there_is_found_and_what_is_not_is_not(made: Any) -> None:
    states, labels, groups = made
    found = accuracy(probe(states, labels, groups, SETTINGS), groups, 0)
    assert found["accuracy"] > 85
    assert found["low"] < found["accuracy"] < found["high"]
    assert 35 < shuffled(states, labels, groups, SETTINGS)["mean"] < 65
    noise = np.random.default_rng(1).standard_normal(states.shape)
    assert probe(noise, labels, groups, SETTINGS).right.mean() < 0.7


def test_what_a_group_has_in_common_it_keeps_when_labels_are_shuffled() -> None:
    random = np.random.default_rng(0)
    groups = [f"speaker {i // 4}" for i in range(40)]
    labels = [f"voice {i // 4 % 2}" for i in range(40)]
    mixed = exchanged(labels, groups, random)
    assert all(len(set(mixed[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert sorted(mixed) == sorted(labels)
    assert mixed != labels
    labels[0] = "voice 2"  # a group of two labels: rows are exchanged
    mixed = exchanged(labels, groups, random)
    assert sorted(mixed) == sorted(labels)
    assert any(len(set(mixed[i : i + 4])) > 1 for i in range(0, 40, 4))


def test_a_group_is_never_on_both_sides(made: Any) -> None:
    """States that tell the group and nothing else: grouped folds cannot use them, others would."""
    _, _, groups = made
    random = np.random.default_rng(2)
    names = sorted(set(groups))
    of_group = {name: random.standard_normal(80) for name in names}
    states = np.stack([10 * of_group[group] for group in groups])
    labels = [f"class {names.index(group) % 2}" for group in groups]
    assert probe(states, labels, groups, SETTINGS).right.mean() < 0.75
    alone = [f"row {i}" for i in range(len(groups))]
    assert probe(states, labels, alone, SETTINGS).right.mean() > 0.9


def test_confidences_are_those_of_the_classes(made: Any) -> None:
    found = probe(*made, SETTINGS)
    assert (found.sure >= 0.5).all()
    np.testing.assert_allclose(np.where(found.right, found.of_true, 1 - found.of_true), found.sure)


def test_a_class_that_a_fold_never_saw_is_held_impossible() -> None:
    states = np.random.default_rng(0).standard_normal((12, 3))
    labels = ["a", "b"] * 5 + ["c", "c"]
    groups = [f"g{i}" for i in range(10)] + ["g10", "g10"]
    found = probe(states, labels, groups, Settings(folds=2))
    assert not found.right[-2:].any()
    assert (found.of_true[-2:] == 0).all()


def test_folds_that_see_one_class_say_it() -> None:
    """Shuffling may bring a rare class into a single group."""
    states = np.random.default_rng(0).standard_normal((12, 3))
    groups = [f"g{i}" for i in range(10)] + ["g10", "g10"]
    found = probe(states, ["a"] * 10 + ["b", "b"], groups, Settings(folds=2))
    assert not found.right[-2:].any()
    assert (found.sure[-2:] == 1).all()
    assert found.right.sum() >= 5


def test_rank_correlation_is_scipys_with_an_interval_around_it() -> None:
    random = np.random.default_rng(3)
    correct = (random.random(200) > 0.5).astype(float)
    sure = 0.3 * correct + random.random(200)
    groups = [f"g{i // 2}" for i in range(200)]
    found = rank_correlation(sure, correct, groups, 0)
    assert found is not None
    ranks = np.argsort(np.argsort(sure))
    ties = np.where(correct == 1, (correct == 0).sum() + (correct.sum() - 1) / 2, ((correct == 0).sum() - 1) / 2)
    assert found["rho"] == pytest.approx(np.corrcoef(ranks, ties)[0, 1], abs=1e-9)
    assert found["low"] < found["rho"] < found["high"]
    assert rank_correlation(sure, np.ones(200), groups, 0) is None
    # The same rows ten times over, in one group each, say no more than they do once.
    many = rank_correlation(np.tile(sure, 10), np.tile(correct, 10), groups * 10, 0)
    assert many is not None
    assert many["high"] - many["low"] > 0.7 * (found["high"] - found["low"])


def test_intervals_draw_whole_groups() -> None:
    right = np.repeat(np.arange(10) % 2 == 0, 50)
    found = OutOfFold(right, right, right)
    grouped = accuracy(found, [f"g{i // 50}" for i in range(500)], 0)
    alone = accuracy(found, [f"r{i}" for i in range(500)], 0)
    assert grouped["high"] - grouped["low"] > 3 * (alone["high"] - alone["low"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a"] * 6, "a probe needs two classes, and all 6 rows are 'a'"),
        (["a", "a", "a", "a", "b", "b"], "4 folds need 4; use --folds 2, or give more rows"),
        (["a", "a", "a", "a", "a", "b"], "class .b. is in 1 .* give more rows, or leave these out"),
    ],
)
def test_too_little_to_probe_is_told(labels: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        check(labels, [f"g{i}" for i in range(6)], 4, "t")


# States of a run


@pytest.fixture(scope="module")
def rows(thinking_run: Any) -> Path:
    """Twelve rows with sounds, in two classes, under the name of a task."""
    path: Path = thinking_run.folder / "probe.jsonl"
    with path.open("w") as file:
        for number, row in enumerate(thinking_run.rows[:12]):
            said = "ab"[number % 2]
            talk = [row["messages"][0], {"role": "assistant", "content": said}]
            more = {"speaker": f"s{number % 6}", "mood": "glad" if number < 6 else "sad"}
            file.write(json.dumps({**row, "messages": talk, **more}) + "\n")
    return path


def test_states_are_means_over_the_thinking_positions(thinking_run: Any, rows: Path) -> None:
    model = coatkit.load(thinking_run.run.folder, device="cpu")
    (task,) = tasks_of_rows(rows, metric="exact")
    found = states_of(model, task.items, 5)
    for number, item in enumerate(task.items):
        (thought,) = model.think([item.row])
        mean = torch.cat([sound.states for sound in thought.sounds]).mean(0)
        torch.testing.assert_close(found[THINKING][number], mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[LAST][number], thought.last, atol=1e-4, rtol=1e-4)


def invoke(run: Any, rows: Path, *more: str) -> Any:
    arguments = ["probe", str(run.run.folder), "--data", str(rows), "--folds", "2", *more]
    return CliRunner().invoke(cli, arguments)


def test_the_command_probes_every_checkpoint(
    thinking_run: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = invoke(thinking_run, rows, "--out", str(tmp_path / "out"), "--group", "speaker")
    assert done.exit_code == 0, done.output
    written = (tmp_path / "out/results.json").read_text()
    results = json.loads(written)
    (task,) = results["tasks"].values()
    assert [(cell["kind"], cell["source"]) for cell in task["probes"]] == [
        (LAST, "vanilla"),
        *((kind, f"step-{step:08d}") for step in (0, 3, 6) for kind in (THINKING, LAST)),
    ]
    assert {cell["source"] for cell in task["probes"] if "foretells" in cell} == {"vanilla", "step-00000006"}
    assert task["groups"] == 6
    assert results["settings"]["C"] == 1.0
    assert "C = 1" in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/probe.png").read_bytes().startswith(b"\x89PNG")
    # Again: nothing is loaded to collect states, and the result is the same.
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/states").iterdir()}
    assert len(before) == 4
    again = invoke(thinking_run, rows, "--out", str(tmp_path / "out"), "--group", "speaker")
    assert (tmp_path / "out/results.json").read_text() == written
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/states").iterdir()} == before
    assert "step-00000003:" not in again.output


def test_states_are_of_the_model_they_are_named_after(thinking_run: Any, rows: Path, tmp_path: Path) -> None:
    run = thinking_run.run.folder
    tasks = tasks_of_rows(rows, metric="exact")
    found = {}
    for source in (Source(0, vanilla=True), Source(0), Source(3), Source(6)):
        (found[source.name],) = collect(
            run, source, tasks, tmp_path, batch=8, device="cpu", say=lambda line: None
        ).values()
    for name, model in {
        "step-00000000": coatkit.load(run, trained=False, device="cpu"),
        "step-00000003": coatkit.load(run, step=3, device="cpu"),
        "step-00000006": coatkit.load(run, device="cpu"),
    }.items():
        for kind, states in states_of(model, tasks[0].items, 8).items():
            np.testing.assert_allclose(found[name][kind], states.numpy(), atol=1e-5)
    assert list(found["vanilla"]) == [LAST]  # no block, and so no thinking positions
    lasts = [states[LAST] for states in found.values()]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(lasts) for b in lasts[:i])


def test_other_rows_are_collected_anew_and_damaged_states_too(thinking_run: Any, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(thinking_run, rows, "--out", str(out), "--steps", "6").exit_code == 0
    file = out / "states/step-00000006.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.write_bytes(file.read_bytes()[:100])
    assert invoke(thinking_run, rows, "--out", str(out), "--steps", "6").exit_code == 0
    for name, tensor in load_file(file).items():
        torch.testing.assert_close(tensor, whole[name])
    answers = read_lines(next((out / "answers").glob("*/predictions.jsonl")))
    assert len(answers) == 12
    fewer = rows.with_name("fewer.jsonl")
    fewer.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
    evaluation = str(tmp_path / "eval")
    asked = ["eval", str(thinking_run.run.folder), "--data", str(fewer), "--metric", "exact", "--out", evaluation]
    assert CliRunner().invoke(cli, asked).exit_code == 0
    done = invoke(thinking_run, fewer, "--out", str(out), "--steps", "6", "--correct", evaluation)
    assert done.exit_code == 0, done.output
    assert {tensor.shape[0] for tensor in load_file(file).values()} == {8}


def test_an_evaluation_that_is_there_is_taken(thinking_run: Any, rows: Path, tmp_path: Path) -> None:
    run = thinking_run.run.folder
    said = CliRunner().invoke(
        cli, ["eval", str(run), "--data", str(rows), "--metric", "exact", "--out", str(tmp_path / "eval")]
    )
    assert said.exit_code == 0, said.output
    answers = tmp_path / "eval/predictions.jsonl"
    scored = [{**line, "score": 100.0 if i < 9 else 0.0} for i, line in enumerate(read_lines(answers))]
    answers.write_text("".join(json.dumps(line) + "\n" for line in scored))
    more = ("--out", str(tmp_path / "out"), "--steps", "3,6", "--label", "mood", "--correct", str(tmp_path / "eval"))
    done = invoke(thinking_run, rows, *more)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out/answers").exists()
    (task,) = json.loads((tmp_path / "out/results.json").read_text())["tasks"].values()
    assert task["classes"] == {"glad": 6, "sad": 6}
    assert [cell["foretells"]["answers_right"] for cell in task["probes"] if "foretells" in cell] == [75, 75, 75]
    # Answers of a model that is not probed foretell nothing.
    alone = invoke(thinking_run, rows, *("3" if word == "3,6" else word for word in more))
    assert isinstance(alone.exception, RunError)
    assert "its answers are not of this run at step 3; add the step that answered" in str(alone.exception)
    other = rows.with_name("other.jsonl")
    other.write_text(rows.read_text() + rows.read_text().splitlines()[0].replace('"r00"', '"r99"') + "\n")
    wrong = invoke(thinking_run, other, *more)
    assert isinstance(wrong.exception, RunError)
    assert "has not for every row" in str(wrong.exception)


def test_correctness_stands_at_the_step_that_answered(thinking_run: Any, rows: Path, tmp_path: Path) -> None:
    run, evaluation = thinking_run.run.folder, tmp_path / "eval"
    asked = ["eval", str(run), "--data", str(rows), "--metric", "exact", "--out", str(evaluation)]
    assert CliRunner().invoke(cli, [*asked, "--untrained"]).exit_code == 0
    more = ("--out", str(tmp_path / "out"), "--steps", "0,6", "--correct", str(evaluation))
    done = invoke(thinking_run, rows, *more)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["answered"] == 0
    (task,) = results["tasks"].values()
    assert {cell["source"] for cell in task["probes"] if "foretells" in cell} == {"vanilla", "step-00000000"}
    assert "(step 0) was right" in (tmp_path / "out/table.md").read_text()
    assert CliRunner().invoke(cli, [*asked, "--vanilla", "--restart"]).exit_code == 0
    other = invoke(thinking_run, rows, *more)
    assert isinstance(other.exception, RunError)
    assert "its answers were given without the thinking block" in str(other.exception)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "4"], "has no checkpoint of step 4; there: 3, 6"),
        (["--steps", "few"], "--steps few: write numbers of steps"),
        (["--steps", "0"], "has no checkpoint to probe"),
        (["--steps", "3"], "answers are of its newest checkpoint; probe that too, or name --correct FOLDER"),
        (["--label", "colour"], "'colour' must be a text or a number to probe for; found None"),
        (["--metric", "wer"], "answers must be right or wrong here: exact or choice"),
    ],
)
def test_what_is_wrong_is_told(thinking_run: Any, rows: Path, tmp_path: Path, more: list[str], said: str) -> None:
    done = invoke(thinking_run, rows, "--out", str(tmp_path / "out"), *more)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_the_page_of_a_run_shows_its_probes(thinking_run: Any, rows: Path) -> None:
    assert invoke(thinking_run, rows, "--steps", "6").exit_code == 0
    page = thinking_run.run.folder / "report.html"
    assert CliRunner().invoke(cli, ["report", str(thinking_run.run.folder)]).exit_code == 0
    text = page.read_text()
    assert "probe/probe/probe" in text
    assert "<td>mean thinking state</td><td>6</td>" in text
    assert "<th>labels shuffled (highest)</th>" in text
    assert "---" not in text.partition("<h2>Probes</h2>")[2].partition("</section>")[0]


def test_titles_are_in_the_order_of_the_table() -> None:
    cells: list[dict[str, Any]] = [
        {"kind": LAST, "source": "step-00000003", "step": 3},
        {"kind": THINKING, "source": "step-00000006", "step": 6},
        {"kind": LAST, "source": "vanilla", "step": 0},
        {"kind": THINKING, "source": "step-00000003", "step": 3},
    ]
    order = [(cell["source"], cell["kind"]) for cell in probe_report._ordered(cells)]
    assert order == [
        ("vanilla", LAST),
        ("step-00000003", THINKING),
        ("step-00000006", THINKING),
        ("step-00000003", LAST),
    ]
