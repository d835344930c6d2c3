"""`coatkit eval` and `coatkit compare`: from a run and rows to scores on disk, stopped and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from click.testing import CliRunner

from coatkit.cli import cli
from coatkit.errors import CoatkitError, DataError, RunError, SpecError
from coatkit.evaluation.compare import compare
from coatkit.evaluation.evaluate import evaluate
from coatkit.evaluation.items import batches, shuffle_sounds, tasks_of_rows, tasks_of_suite
from coatkit.evaluation.predictions import Predictions
from coatkit.evaluation.suite import read_suite
from coatkit.infer import AudioThinker

SUITE = """\
name: small
tasks:
  - name: clips
    data: {path: test.jsonl, filter: {where: {task: clips}}}
    metric: exact
    max_new_tokens: 12
  - name: sums
    data: {path: test.jsonl, filter: {where: {task: sums}}}
    metric: choice
    choices: ["4", "7"]
    max_new_tokens: 8
"""


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Any:
    """A project whose run answers three rows by heart, with test.jsonl and suite.yaml beside it."""
    project = new_project()
    every = project.rows
    project.rows = [*every[:2], every[-1]]
    project.spec["stages"] = [
        {"name": "one", "steps": 60, "lr": 1e-2, "batch": {"rows": 3}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    test = [{**row, "task": "clips"} for row in every[:9]] + [{**every[-1], "task": "sums"}]
    (project.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    (project.folder / "suite.yaml").write_text(SUITE)
    return project


@pytest.fixture
def here(trained: Any, tmp_path: Path) -> Path:
    """A folder of the test's own with rows, clips and suite; the run stays where it is."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(trained.folder / "clips", folder / "clips")
    for name in ("test.jsonl", "suite.yaml"):
        shutil.copy(trained.folder / name, folder)
    return folder


def call(*arguments: Any) -> str:
    """What a command printed; an error it foresaw is raised."""
    result = CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=True)
    if isinstance(result.exception, CoatkitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def add(folder: Path, **row: Any) -> None:
    with (folder / "test.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def edit(folder: Path, index: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a row of test.jsonl in place."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    change(rows[index])
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# Results


@pytest.fixture(scope="module")
def whole(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's evaluation, never interrupted, two rows at a time."""
    out = tmp_path_factory.mktemp("whole") / "eval"
    said = call("eval", trained.run.folder, "--data", trained.folder / "suite.yaml", "--out", out, "--batch", 2)
    assert "clips  exact" in said
    assert "step 60: small" in said
    return out


def test_a_suite_is_scored(trained: Any, whole: Path) -> None:
    results = results_of(whole)
    assert list(results["tasks"]) == ["clips", "sums"]
    assert (results["step"], results["trained"], results["shuffled_sounds"]) == (60, True, None)
    clips, sums = results["tasks"]["clips"], results["tasks"]["sums"]
    lines = lines_of(whole)
    assert [line["id"] for line in lines] == [*(f"r{i:02d}" for i in range(9)), "t3"]
    right = [line["answer"] == f"clip {i}" for i, line in enumerate(lines[:9])]
    assert right[:2] == [True, True]  # learnt by heart
    assert clips["score"] == pytest.approx(100 * sum(right) / 9)
    assert [line["score"] for line in lines[:9]] == [100.0 * one for one in right]
    assert clips["low"] < clips["score"] < clips["high"]
    assert (clips["rows"], clips["bad"], clips["filtered_out"]) == (9, 0, 1)
    assert (sums["score"], sums["parse_failures"], sums["metric"]) == (100, 0, "choice")
    assert lines[9]["question"] == "What is 3 plus 1?"
    assert (lines[9]["references"], lines[9]["choices"], lines[9]["read_as"]) == (["4"], ["4", "7"], "4")


def test_answers_are_those_of_the_model(trained: Any, whole: Path) -> None:
    import coatkit

    model = coatkit.load(trained.run.folder, device="cpu")
    for task in tasks_of_suite(read_suite(trained.folder / "suite.yaml")):
        said = {line["index"]: line["answer"] for line in lines_of(whole) if line["task"] == task.spec.name}
        for item in task.items:
            alone = model.answer([item.row], max_new_tokens=task.spec.max_new_tokens)
            assert said[item.index] == alone[0]


def test_rows_without_a_suite_are_scored_task_by_task(trained: Any, here: Path, tmp_path: Path) -> None:
    for i in range(10):
        edit(here, i, lambda row: row.update(metric="exact" if row["task"] == "clips" else "chrf"))
    out = tmp_path / "out"
    call("eval", trained.run.folder, "--data", here / "test.jsonl", "--out", out, "--max-new-tokens", 12)
    tasks = results_of(out)["tasks"]
    assert {name: (task["metric"], task["rows"]) for name, task in tasks.items()} == {
        "clips": ("exact", 9),
        "sums": ("chrf", 1),
    }
    call("eval", trained.run.folder, "--data", here / "test.jsonl", "--metric", "exact", "--out", tmp_path / "exact",
         "--max-new-tokens", 12)  # fmt: skip
    assert {task["metric"] for task in results_of(tmp_path / "exact")["tasks"].values()} == {"exact"}


def test_results_go_into_the_runs_folder(trained: Any, here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run.folder, run)
    arguments = ["eval", run, "--data", here / "suite.yaml", "--limit", 2]
    call(*arguments)
    call(*arguments, "--untrained")
    call(*arguments, "--shuffle-audio")
    found = {name: results_of(run / "eval" / name) for name in ("small", "small-untrained", "small-shuffled")}
    assert [one["tasks"]["clips"]["score"] for one in found.values()] == [100, 0, 0]
    assert [one["trained"] for one in found.values()] == [True, False, True]
    assert found["small-shuffled"]["shuffled_sounds"] == 0
    said = call("compare", run / "eval/small-shuffled", run / "eval/small")
    assert "clips  exact" in said
    assert "+100.0" in said
    assert json.loads(call("compare", run / "eval/small", run / "eval/small", "--json"))["clips"]["p"] == 1
    with pytest.raises(RunError, match=r"holds no evaluation; name one of .*eval/small, .*small-shuffled"):
        compare(run, run / "eval/small")
    assert json.loads(call(*arguments, "--json"))["step"] == 60


# Stopped and continued

KILLED = """
import os, signal, sys
from coatkit.evaluation.predictions import Predictions

written, append = [], Predictions.append

def append_or_die(self, lines):
    if len(written) == 2:
        with self.path.open("a") as file:
            file.write('{"task": "clips", "index": 3, "id": "r0')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    written.append(lines)
    append(self, lines)

Predictions.append = append_or_die
from coatkit.cli import main
main()
"""


def test_killed_in_the_middle_of_a_line_it_goes_on(
    trained: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = [
        "eval",
        str(trained.run.folder),
        "--data",
        str(trained.folder / "suite.yaml"),
        "--out",
        str(out),
        "--batch",
        "2",
    ]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    text = (out / "predictions.jsonl").read_text()
    assert text.count("\n") == 4
    assert not text.endswith("\n")
    with pytest.raises(RunError, match="cut off"):
        compare(out, whole)
    asked: list[int] = []
    answer = AudioThinker.answer
    monkeypatch.setattr(
        AudioThinker, "answer", lambda self, rows, **kw: asked.append(len(rows)) or answer(self, rows, **kw)
    )
    call(*words)
    assert asked == [2, 2, 1, 1]  # 10 rows, 4 answered before
    for name in ("predictions.jsonl", "eval.json", "results.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    call(*words)
    assert sum(asked) == 6  # all there: scored again, nothing asked


def test_half_a_batch_is_asked_again(trained: Any, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (task, _) = tasks_of_suite(read_suite(trained.folder / "suite.yaml"))
    pair = next(batches(task.items, 2))
    kept = [line for line in lines_of(out) if line["index"] != pair[0].index or line["task"] != "clips"]
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    identity = json.loads((out / "eval.json").read_text())["identity"]
    with Predictions(out, identity) as opened:
        opened.keep(batches(task.items, 2))
        assert pair[1].key not in opened.lines
        assert len(opened.lines) == 7
    assert not (out / "results.json").exists()
    with pytest.raises(RunError, match="is not finished"):
        compare(out, whole)


def test_another_metric_needs_no_new_answers(
    trained: Any, here: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    suite = here / "suite.yaml"
    suite.write_text(SUITE.replace("metric: exact", "metric: wer"))
    monkeypatch.setattr(AudioThinker, "answer", lambda *a, **k: pytest.fail("asked again"))
    call("eval", trained.run.folder, "--data", suite, "--out", out, "--batch", 2)
    assert results_of(out)["tasks"]["clips"]["metric"] == "wer"
    with pytest.raises(RunError, match=r"task 'clips': .* differ in metric: wer and exact"):
        compare(out, whole)
    suite.write_text(SUITE.replace('["4", "7"]', '["4", "5", "8"]'))
    call("eval", trained.run.folder, "--data", suite, "--out", out, "--batch", 2)
    assert lines_of(out)[-1]["choices"] == ["4", "5", "8"]
    with pytest.raises(RunError, match=r"part at row t3 \(choices\)"):
        compare(out, whole)


CHANGES: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "a row": (lambda folder: edit(folder, 0, lambda row: row.update(note="x")), [], r"tasks\.clips\.data"),
    "the filter": (
        lambda f: (f / "suite.yaml").write_text(SUITE.replace("{task: sums}", "{task: [sums, more]}")),
        [],
        "source",
    ),
    "the length": (lambda f: (f / "suite.yaml").write_text(SUITE.replace("12", "13")), [], r"clips\.max_new_tokens"),
    "a task": (lambda f: (f / "suite.yaml").write_text(SUITE.replace("name: sums", "name: adds")), [], r"tasks\.sums"),
    "the batch": (lambda folder: None, ["--batch", "3"], "batch"),
    "the model": (lambda folder: None, ["--untrained"], "model, trained"),
    "the sounds": (lambda folder: None, ["--shuffle-audio"], "shuffled_sounds"),
    "the rows": (lambda folder: None, ["--limit", "3"], r"clips\.rows"),
}


@pytest.mark.parametrize(("change", "words", "named"), CHANGES.values(), ids=CHANGES)
def test_answers_of_something_else_are_not_mixed_in(
    trained: Any, here: Path, whole: Path, tmp_path: Path, change: Callable[[Path], Any], words: list[str], named: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    change(here)
    batch = [] if "--batch" in words else ["--batch", "2"]
    arguments = ["eval", trained.run.folder, "--data", here / "suite.yaml", "--out", out, *batch, *words]
    with pytest.raises(RunError, match=rf"(?s)changed since: .*{named}.*--out FOLDER.*--restart"):
        call(*arguments)
    assert lines_of(out) == lines_of(whole)
    if "--limit" in words:
        call(*arguments, "--restart")
        assert len(lines_of(out)) == 4


def test_a_run_that_learnt_on_is_another_model(trained: Any, whole: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.copytree(trained.run.folder, run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    newest.rename(newest.with_name("step-00000061"))
    arguments = ["eval", run, "--data", trained.folder / "suite.yaml", "--out", out, "--batch", 2]
    call(*arguments)  # the same weights
    from safetensors.torch import load_file, save_file

    path = run / "checkpoints/step-00000061/model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path)
    with pytest.raises(CoatkitError):
        call(*arguments)


def test_one_process_at_a_time(trained: Any, whole: Path, tmp_path: Path) -> None:
    with Predictions(tmp_path, {}), pytest.raises(RunError, match="another process is evaluating"):
        Predictions(tmp_path, {}).__enter__()
    with Predictions(tmp_path, {}):
        pass


@pytest.mark.parametrize("damage", ['{"task": 1\n', "[]\n", '{"task": "clips"}\n'])
def test_a_damaged_line_is_named(whole: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    text = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions.jsonl").write_text("".join([*text[:2], damage, *text[3:]]))
    identity = json.loads((out / "eval.json").read_text())["identity"]
    with pytest.raises(RunError, match=r"predictions\.jsonl:3: damaged"):
        Predictions(out, identity).__enter__()
    (out / "eval.json").unlink()
    with pytest.raises(RunError, match="nothing says what it was made with"):
        Predictions(out, identity).__enter__()


# Bad rows


def test_bad_rows_are_refused_or_counted_and_named(trained: Any, here: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "x"}]
    add(here, id="gone", task="clips", messages=talk, audio="clips/gone.wav")
    add(here, id="unanswered", task="clips", messages=talk[:1], audio="clips/r00.wav")
    add(here, id="odd", task="sums", messages=[{"role": "user", "content": "2 + 3?"}, {**talk[1], "content": "5"}])
    soundfile.write(here / "clips/short.wav", [0.0] * 100, 16_000)
    add(here, id="short", task="clips", messages=talk, audio="clips/short.wav")
    flac = (here / "clips/r07.flac").read_bytes()
    (here / "clips/r07.flac").write_bytes(flac[: len(flac) // 2])  # its header is whole
    out, suite = tmp_path / "out", here / "suite.yaml"
    with pytest.raises(DataError) as refused:
        call("eval", trained.run.folder, "--data", suite, "--out", out)
    for part in ("3 bad row", "gone.wav", "unanswered", "'5' is none of its choices: 4, 7", "--skip-bad"):
        assert part in str(refused.value)
    assert not out.exists()
    said = call("eval", trained.run.folder, "--data", suite, "--out", out, "--skip-bad")
    assert "clips: 4 bad rows left out, first:" in said
    clips = results_of(out)["tasks"]["clips"]
    assert (clips["rows"], clips["bad"]) == (8, 4)
    assert [(row["id"], row["index"]) for row in clips["bad_rows"]] == [
        ("gone", 10),
        ("unanswered", 11),
        ("short", 13),
        ("r07", 7),
    ]
    assert "too short" in clips["bad_rows"][2]["reason"]
    assert results_of(out)["tasks"]["sums"]["bad"] == 1
    assert {line["id"] for line in lines_of(out) if "bad" in line} == {"r07"}
    with pytest.raises(RunError, match="could not be decoded"):
        compare(out, out)
    (here / "clips/r07.flac").write_bytes(flac)
    call("eval", trained.run.folder, "--data", suite, "--out", out, "--skip-bad")
    assert results_of(out)["tasks"]["clips"]["rows"] == 9


def test_a_sound_that_cannot_be_decoded_stops_and_can_be_repaired(trained: Any, here: Path, tmp_path: Path) -> None:
    flac = (here / "clips/r01.flac").read_bytes()
    (here / "clips/r01.flac").write_bytes(flac[: len(flac) // 2])
    arguments = ["eval", trained.run.folder, "--data", here / "suite.yaml", "--out", tmp_path / "out", "--batch", 1]
    with pytest.raises(DataError, match=r"row r01\).*r01\.flac"):
        call(*arguments)
    before = len(lines_of(tmp_path / "out"))
    assert before == 7  # longest first
    (here / "clips/r01.flac").write_bytes(flac)
    call(*arguments)
    assert len(lines_of(tmp_path / "out")) == 10


def test_a_line_that_cannot_be_read_is_left_out_and_counted(trained: Any, here: Path, tmp_path: Path) -> None:
    with (here / "test.jsonl").open("a") as file:
        file.write("{no json\n")
    arguments = ["eval", trained.run.folder, "--data", here / "test.jsonl", "--metric", "exact", "--limit", 1]
    with pytest.raises(DataError, match=r"1 bad row\(s\):\n  .*test\.jsonl:11: not valid JSON"):
        call(*arguments)
    call(*arguments, "--skip-bad", "--out", tmp_path / "out")
    assert {name: task["bad"] for name, task in results_of(tmp_path / "out")["tasks"].items()} == {
        "clips": 1,
        "sums": 0,
    }
    (here / "test.jsonl").write_text("{no json\n")
    with pytest.raises(DataError, match=r"no row of .*test\.jsonl can be read, first: .*not valid JSON"):
        call(*arguments, "--skip-bad")


def test_every_row_bad(trained: Any, here: Path) -> None:
    tasks = tasks_of_rows(here / "test.jsonl", metric="note")
    with pytest.raises(DataError, match=r"task 'clips': every row is bad, first: .*'clip 0'.*names no note"):
        evaluate(trained.run.folder, "x", tasks, skip_bad=True)


# Rows and suites


def test_references_and_choices_of_a_row(here: Path) -> None:
    question = [{"role": "user", "content": "Which?"}]
    rows = [
        {"messages": question, "right": "B", "choices": ["dog", "cat"]},
        {"messages": question, "right": "cat", "choices": {"A": "dog", "B": "cat"}},
        {"messages": question, "right": 5, "choices": ["5", "6"]},
        {"messages": question, "right": ["a", "b"], "choices": ["a", "b"]},
        {"messages": question, "right": None, "choices": ["a", "b"]},
        {"messages": question, "right": "a", "choices": ["a", "A"]},
        {"messages": question, "right": "a", "choices": {"B": "a", "A": "b"}},
        {"messages": question, "right": "a"},
    ]
    path = here / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = tasks_of_rows(path, metric="choice", reference="right")
    assert [(item.references, item.choices) for item in task.items] == [
        (("B",), ("dog", "cat")),
        (("cat",), ("dog", "cat")),
        (("5",), ("5", "6")),
    ]
    reasons = [reason for _, _, reason in task.bad]
    for reason, part in zip(
        reasons,
        ["takes one right answer", "'right' must hold", "2 to 26 different", "2 to 26 different", "needs options"],
        strict=True,
    ):
        assert part in reason
        assert "rows.jsonl:" in reason


def test_batches_hold_every_row_once_and_like_lengths(here: Path) -> None:
    (task, _) = tasks_of_rows(here / "test.jsonl", metric="exact")
    parts = list(batches(task.items, 4))
    assert [len(part) for part in parts] == [4, 4, 1]
    seconds = [sum(item.seconds) for part in parts for item in part]
    assert seconds == sorted(seconds, reverse=True)
    assert sorted(item.index for part in parts for item in part) == list(range(9))


def test_shuffled_sounds_are_the_same_sounds_on_other_rows(here: Path) -> None:
    def shuffled(seed: int) -> list[str]:
        tasks = tasks_of_rows(here / "test.jsonl", metric="exact")
        shuffle_sounds(tasks, seed)
        assert [task.own_sound for task in tasks] == [0, 0]
        for item in tasks[0].items:
            info = soundfile.info(item.row.audios[0].path)
            assert item.seconds == (info.frames / info.samplerate,)
        assert tasks[1].items[0].row.audios == ()
        return [item.row.audios[0].path.stem for item in tasks[0].items]

    own = [f"r{i:02d}" for i in range(9)]
    first = shuffled(0)
    assert sorted(first) == own
    assert all(a != b for a, b in zip(first, own, strict=True))
    assert shuffled(0) == first
    assert shuffled(1) != first


def test_nothing_to_shuffle_is_said(trained: Any, here: Path, tmp_path: Path) -> None:
    arguments = ["eval", trained.run.folder, "--data", here / "suite.yaml", "--limit", 1, "--shuffle-audio"]
    with pytest.raises(RunError, match="no sound can be shuffled"):
        call(*arguments, "--out", tmp_path / "out")


WRONG: dict[str, tuple[str, str, str]] = {
    "key": ("metric: exact", "metrik: exact", r"suite\.yaml:5: tasks\.0\.metrik: unknown key; did you mean 'metric'"),
    "metric": ("metric: exact", "metric: exakt", r"suite\.yaml:5: tasks\.0\.metric: 'exakt' is not one of exact, .*"),
    "name": ("name: sums", "name: clips", r"tasks: 'clips' is given twice"),
    "choices": ('["4", "7"]', '["4", "4"]', r"tasks\.1\.choices: '4' is given twice"),
    "one choice": ('["4", "7"]', '["4"]', r"tasks\.1\.choices: .*at least 2"),
    "choices of": ("metric: choice", "metric: wer", "the metric wer takes none; choice, likelihood, f1 do"),
    "folder": ("name: small", "name: a/b", "name: must be the name of one folder"),
    "filter": ("task: clips", "tsak: clips", r"task 'clips': .*its filter asks for where\.tsak, a key no row has"),
    "rows": ("path: test.jsonl", "path: gone.jsonl", r"gone\.jsonl: cannot be read"),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_suite_is_told_before_the_model_is_loaded(here: Path, old: str, new: str, message: str) -> None:
    (here / "suite.yaml").write_text(SUITE.replace(old, new, 1))
    with pytest.raises((SpecError, DataError), match=message):
        call("eval", here / "no-run", "--data", here / "suite.yaml")


def test_the_quickstarts_suite_takes_every_row() -> None:
    tasks = tasks_of_suite(read_suite(Path(__file__).parents[1] / "examples/quickstart/suite.yml"))
    assert {task.spec.name: (len(task.items), task.bad) for task in tasks} == {"kind": (47, []), "note": (22, [])}


def test_a_suites_paths_are_relative_to_it_and_it_is_named_by_its_file(here: Path) -> None:
    data = yaml.safe_load(SUITE)
    del data["name"]
    (here / "other.yml").write_text(yaml.safe_dump(data))
    suite = read_suite(here / "other.yml")
    assert suite.name == "other"
    assert suite.tasks[0].data.path == str(here / "test.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test.jsonl"], r"test\.jsonl:1: it has no label 'metric'; name one with --metric: exact, choice"),
        (["test.jsonl", "--metric", "exakt"], "--metric exakt: there is no such metric; did you mean 'exact'"),
        (["test.jsonl", "--metric", "exact", "--choices", "a,b"], "task 'clips': choices: the metric exact takes none"),
        (["suite.yaml", "--metric", "exact"], "--metric: a suite says this itself"),
        (["test.jsonl", "--metric", "exact"], "no-run: is not a run folder"),
        (["gone.jsonl", "--metric", "exact"], r"gone\.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_said(here: Path, words: list[str], message: str) -> None:
    with pytest.raises(CoatkitError, match=message):
        call("eval", here / "no-run", "--data", here / words[0], *words[1:])


def test_other_rows_are_not_compared(trained: Any, here: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = lines_of(whole)
    others = [*lines[:4], {**lines[4], "references": ["other"]}, *lines[5:]]
    for changed, message in (
        (others, r"part at row r04 \(references\)"),
        (lines[:-1], "has 1 rows and .* has 0"),
    ):
        (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(RunError, match=message):
            compare(whole, out)
    call("eval", trained.run.folder, "--data", here / "test.jsonl", "--metric", "exact", "--out", tmp_path / "rows")
    record = json.loads((tmp_path / "rows/eval.json").read_text())
    record["scoring"]["more"] = record["scoring"].pop("sums")
    record["identity"]["tasks"]["more"] = record["identity"]["tasks"].pop("sums")
    (tmp_path / "rows/eval.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="have other tasks: clips, sums and clips, more"):
        compare(whole, tmp_path / "rows")
