"""Resuming is exact: a run that was cut short and continued equals one that was not, bit by bit (on the CPU)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coatkit.errors import RunError

FILES = ("model.safetensors", "optimizer.safetensors")


def prepare(project: Any, policy: str = "reset") -> Any:
    """Two stages of four steps, with everything in them that could go wrong: dropout, moments, kept and fresh heads."""
    project.spec["backbone"]["lora"]["dropout"] = 0.1
    project.spec["head"]["dropout"] = 0.1
    project.spec["optimizer"] = {"between_stages": policy, "weight_decay": 0.01}
    project.spec["checkpoint"] = {"every": 1, "keep": 100}
    for stage in project.spec["stages"]:
        stage.update(steps=4, schedule="cosine", warmup_steps=1)
    return project


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: what learns, the optimizer's moments and the random state."""
    path = folder / f"checkpoints/step-{step:08d}"
    return {f"{file}|{name}": value for file in FILES for name, value in load_file(path / file).items()}


def saved(folder: Path) -> list[int]:
    """Steps there are checkpoints of."""
    return sorted(int(path.name.partition("-")[2]) for path in (folder / "checkpoints").glob("step-*"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_equal(folder: Path, expected: Path) -> None:
    """Metrics, and every tensor of every checkpoint; the last of a stage may hold no moments, the one before does."""
    assert saved(folder)[-1] == saved(expected)[-1]
    for step in saved(folder):
        ours, theirs = state(folder, step), state(expected, step)
        assert set(ours) == set(theirs)
        assert [(step, name) for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        name = f"checkpoints/step-{step:08d}/state.json"
        assert (folder / name).read_text() == (expected / name).read_text()
    assert metrics(folder) == metrics(expected)


@pytest.fixture(scope="module", params=["reset", "keep"])
def whole(request: pytest.FixtureRequest, new_project: Callable[[], Any]) -> Any:
    """A run that was never cut short, with a checkpoint after every step."""
    project = prepare(new_project(), request.param)
    project.whole = project.train("output=whole").folder
    return project


def cut(project: Any, step: int, name: str) -> Path:
    """The folder as it was left by a run that died after `step` and the metrics of the step after it."""
    folder: Path = project.folder / name
    shutil.copytree(project.whole, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": ' + str(step + 2))
    (folder / "checkpoints/.step-00000099.partial").mkdir()
    return folder


@pytest.mark.parametrize("step", [0, 2, 4, 6, 7])
def test_cut_short_and_continued_equals_in_one_go(whole: Any, step: int) -> None:
    """Before the first checkpoint, inside stage one, at the very boundary, inside stage two, before its last step."""
    folder = cut(whole, step, f"cut-{step}")
    torch.manual_seed(step)  # another process would have another random state
    run = whole.train(f"output={folder}", resume=True)
    assert run.result.finished
    assert_equal(folder, whole.whole)


def test_what_is_compared_could_differ(whole: Any) -> None:
    """The moments are there, and dropout made the random state move."""
    first, last = state(whole.whole, 1), state(whole.whole, 7)
    assert {"exp_avg", "exp_avg_sq", "step", "0.cpu"} <= {name.rpartition("|")[2] for name in last}
    assert not torch.equal(first["optimizer.safetensors|random|0.cpu"], last["optimizer.safetensors|random|0.cpu"])
    steps = {name.split("|")[1]: int(value) for name, value in last.items() if name.endswith("|step")}
    kept = whole.spec["optimizer"]["between_stages"] == "keep"
    assert {n for name, n in steps.items() if name.startswith("heads.level.")} == {3}
    assert {n for name, n in steps.items() if not name.startswith("heads.level.")} == {7 if kept else 3}
    assert any(name.endswith("|exp_avg") for name in state(whole.whole, 4)) == kept


def test_a_finished_run_stays_as_it_is(whole: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole.whole / "checkpoints").rglob("*")}
    run = whole.train("output=whole", resume=True)
    assert run.result.finished
    assert {p: p.stat().st_mtime_ns for p in (whole.whole / "checkpoints").rglob("*")} == before


def test_resuming_where_nothing_is_begins(project: Any) -> None:
    run = prepare(project).train(resume=True)
    assert run.result.finished
    assert [line["step"] for line in run.metrics] == list(range(1, 9))


# What must be the same, and what may change


@pytest.fixture
def begun(project: Any) -> Any:
    """A run that died after two steps."""
    prepare(project)
    project.whole = project.train("output=whole").folder
    shutil.move(cut(project, 2, "cut"), project.folder / "run")
    return project


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("seed=5", "seed"),
        ("stages.0.steps=5", "stages.0.steps"),
        ("stages.1.weights.audio=0.7", "stages.1.weights.audio"),
        ("experts.level.gain=2.0", "experts.level"),
        ("optimizer.weight_decay=0", "optimizer.weight_decay"),
    ],
)
def test_another_spec_is_refused_and_the_key_named(begun: Any, change: str, name: str) -> None:
    with pytest.raises(RunError, match=f"changed since: .*{name}"):
        begun.train(change, resume=True)


def test_other_data_are_refused_and_the_file_named(begun: Any) -> None:
    begun.rows[0]["messages"][1]["content"] = "something else"
    with pytest.raises(RunError, match=r"changed since: data\..*train\.jsonl\.sha256"):
        begun.train(resume=True)


def test_keys_that_specs_have_gained_since_do_not_matter(begun: Any) -> None:
    path = begun.folder / "run/spec.yaml"
    spec = yaml.safe_load(path.read_text())
    del spec["gradients_every"], spec["backbone"]["compile"]
    for stage in spec["stages"]:
        del stage["batch"]["pack"]
    path.write_text(yaml.safe_dump(spec))
    assert begun.train(resume=True).result.finished
    assert_equal(begun.folder / "run", begun.whole)


def test_a_key_that_specs_have_gained_and_that_is_used_is_named(begun: Any) -> None:
    path = begun.folder / "run/spec.yaml"
    spec = yaml.safe_load(path.read_text())
    for stage in spec["stages"]:
        del stage["batch"]["pack"]
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(RunError, match=r"changed since: stages\.0\.batch\.pack"):
        begun.train("stages.0.batch.pack=true", resume=True)


def test_where_and_how_often_is_saved_may_change(begun: Any) -> None:
    shutil.move(begun.folder / "run", begun.folder / "moved")
    run = begun.train("output=moved", "checkpoint.every=3", "checkpoint.keep=1", "data.workers=1", resume=True)
    assert run.result.finished
    assert [path.name for path in run.checkpoints] == ["step-00000008"]
    assert_equal(run.folder, begun.whole)


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    begun: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = begun.folder / f"run/checkpoints/step-00000002/{name}"
    path.write_bytes(path.read_bytes()[:20])
    assert begun.train(resume=True).result.finished
    said = " ".join(capsys.readouterr().err.split())
    assert f"step-00000002/{name}: " in said
    assert "going back to the checkpoint before: step-00000001" in said
    assert (begun.folder / f"run/checkpoints/damaged-step-00000002/{name}").stat().st_size == 20
    assert_equal(begun.folder / "run", begun.whole)


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_kept(begun: Any) -> None:
    for path in (begun.folder / "run/checkpoints").glob("step-*"):
        (path / "model.safetensors").unlink()
    before = sorted((begun.folder / "run/checkpoints").glob("step-*"))
    with pytest.raises(RunError, match=r"(?s)step-00000002/model.safetensors: .*No checkpoint of this run is whole"):
        begun.train(resume=True)
    assert sorted((begun.folder / "run/checkpoints").glob("step-*")) == before


def test_a_moved_project_goes_on_where_it_is(begun: Any, tmp_path: Path) -> None:
    before, begun.folder = begun.folder, tmp_path / "elsewhere"
    shutil.move(before, begun.folder)
    assert begun.train(resume=True).result.finished
    assert_equal(begun.folder / "run", begun.folder / "whole")
    assert str(before) not in (begun.folder / "run/spec.yaml").read_text()


def test_a_moved_project_whose_data_changed_is_refused(begun: Any, tmp_path: Path) -> None:
    before, begun.folder = begun.folder, tmp_path / "elsewhere"
    shutil.move(before, begun.folder)
    begun.rows[0]["messages"][1]["content"] = "something else"
    with pytest.raises(RunError, match=r"changed since: data\..*train\.jsonl\.sha256"):
        begun.train(resume=True)


# A process that is killed


def test_killed_at_any_moment_and_continued_equals_in_one_go(project: Any) -> None:
    prepare(project)
    project.spec["checkpoint"] = {"every": 2, "keep": 100}
    for stage in project.spec["stages"]:
        stage["steps"] = 15
    spec, folder = project.write(), project.folder / "run"
    delay = random.SystemRandom().uniform(0, 1)
    command = [sys.executable, "-c", "from coatkit.cli import main; main()", "train", str(spec)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 90
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
    died = len((folder / "metrics.jsonl").read_text().splitlines())
    project.train(resume=True)
    expected = project.train("output=expected").folder
    try:
        assert_equal(folder, expected)
    except AssertionError as error:
        raise AssertionError(f"killed after {delay:.3f} s, at step {died}") from error
