"""`coatkit ablate`: from a study to arms, runs in several sittings, and a table paired by seed and row."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from coatkit import plugins
from coatkit.analysis.ablate import ablate
from coatkit.analysis.ablate_arms import Arm, arms_of, own_loss
from coatkit.analysis.ablate_job import Job
from coatkit.analysis.ablate_processes import Pool
from coatkit.analysis.ablate_study import CONTROLS, PAPER, ArmSpec, StudySpec, read_study, study_of_spec
from coatkit.analysis.ablate_table import score_arms
from coatkit.cli import cli
from coatkit.errors import DataError, RunError, SpecError
from coatkit.evaluation.bootstrap import over_seeds, over_seeds_t, paired, two_sided
from coatkit.evaluation.metrics import Scored, ratio

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs" / "analysis.md", ROOT / "examples"

# Reads its targets as they are; the other kind of expert has a loss of its own.
CRITIC = """
from level import Level


class Critic(Level):
    def loss(self, predicted, target, mask):
        return super().loss(predicted, target, mask)
"""

SUITE = """\
name: small
tasks:
  - {name: clips, data: test.jsonl, metric: exact, max_new_tokens: 4}
"""


def prepare(project: Any, **study: Any) -> Path:
    """The project's files, with a suite of four rows and a study; gives the study's file."""
    project.write()
    (project.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in project.rows[:4]))
    (project.folder / "suite.yaml").write_text(SUITE)
    path = Path(project.folder / "study.yml")
    path.write_text(yaml.safe_dump({"base": "spec.yaml", "suite": "suite.yaml", **study}, sort_keys=False))
    return path


def arms(path: Path, **options: Any) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(read_study(path, **options))[0]}


def problems(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        arms_of(read_study(path))
    return str(caught.value)


# From a study to arms


def test_the_papers_arms(project: Any) -> None:
    (project.folder / "critic.py").write_text(CRITIC)
    project.spec["experts"]["critic"] = {"use": "./critic.py:Critic", "head": {"use": "transformer", "heads": 2}}
    project.spec["stages"][1]["weights"]["critic"] = 1.0
    path = prepare(project, preset="paper", arms={"heard": {"drop": ["audio"]}}, seeds=[3, 5])
    found = arms(path)
    assert list(found) == ["sft", "block-only", "representational", "all", "linear-heads", "heard"]
    spec = {name: arm.spec for name, arm in found.items()}
    assert spec["sft"].thinking is None
    assert spec["block-only"].thinking is not None
    experts = {name: list(one.experts) for name, one in spec.items()}
    everything = ["audio", "level", "critic"]
    assert experts == {
        "sft": [],
        "block-only": [],
        "representational": ["audio", "level"],
        "all": everything,
        "linear-heads": everything,
        "heard": ["level", "critic"],
    }
    assert {spec["linear-heads"].head_of(name).use for name in everything} == {"linear"}
    assert {spec["all"].head_of(name).use for name in everything} == {"transformer"}
    assert found["all"].changes == ()
    assert {arm.baseline for arm in found.values()} == {"sft"}
    for name, arm in found.items():
        assert {seed: loaded.spec.seed for seed, loaded in arm.runs.items()} == {3: 3, 5: 5}
        assert arm.runs[5].output == project.folder / "runs/study/arms" / name / "seed-5"
        assert (arm.spec.total_steps, arm.rows, arm.parts_from(found["sft"])) == (6, 30, [])


def test_an_arm_of_the_preset_that_is_another_is_left_out(project: Any) -> None:
    project.spec["head"] = {"use": "linear"}
    found, notes = arms_of(read_study(prepare(project, preset="paper")))
    # Every expert here is trained by the distance of features, and every head is linear.
    assert [arm.name for arm in found] == ["sft", "block-only", "all"]
    assert notes == ["arm 'linear-heads' of the preset is left out: with this base it is 'all'"]


def test_an_arm_of_ones_own_stays_where_the_preset_has_it_too(project: Any) -> None:
    path = prepare(project, preset="paper", arms={"bare": {"keep": []}, "none": {"drop": ["audio", "level"]}})
    assert "arms.none: trains just as the arm 'bare'; leave one out" in problems(path)
    path = prepare(project, preset="paper", arms={"bare": {"keep": []}})
    found, notes = arms_of(read_study(path))
    assert [arm.name for arm in found] == ["sft", "all", "linear-heads", "bare"]
    assert notes == ["arm 'block-only' of the preset is left out: with this base it is 'bare'"]
    path = prepare(project, preset="paper", arms={"bare": {"keep": []}}, baseline="block-only", controls=["vanilla"])
    assert "no arm is called 'block-only'; known: sft, all, linear-heads, bare; arm 'block-only' of the" in problems(
        path
    )


def test_an_arm_of_the_preset_can_be_said_otherwise(project: Any) -> None:
    path = prepare(project, preset="paper", arms={"sft": {"set": {"thinking": "off", "stages.two.lr": 1e-5}}})
    arm = arms(path)["sft"]
    assert (arm.spec.thinking, arm.spec.stages[1].lr, arm.spec.stages[0].lr) == (
        None,
        {"default": 1e-5},
        {"default": 2e-3},
    )


def test_a_grid_crosses_every_arm_and_its_baseline(project: Any) -> None:
    grid = {"backbone.lora.rank": [2, 4], "stages.*.lr": [1e-3, {"default": 1e-3, "heads": 1e-2}]}
    path = prepare(project, arms={"plain": {"keep": []}, "both": None}, grid=grid, baseline="plain", seeds=[0])
    found = arms(path)
    combinations = ["+rank=2+lr=0.001", "+rank=2+lr=1", "+rank=4+lr=0.001", "+rank=4+lr=1"]
    assert list(found) == [name + suffix for name in ("plain", "both") for suffix in combinations]
    for suffix in combinations:
        assert found["both" + suffix].baseline == found["plain" + suffix].baseline == "plain" + suffix
    last = found["both+rank=4+lr=1"].spec
    assert last.backbone.options["lora"]["rank"] == 4
    assert [stage.lr for stage in last.stages] == [{"default": 1e-3, "heads": 1e-2}] * 2
    one = prepare(project, grid={"seed": [1]}, baseline="base+seed=1")
    assert list(arms(one)) == ["base+seed=1"]


def test_changes_of_the_study_and_of_the_command_line_are_everyones(project: Any) -> None:
    path = prepare(
        project, set={"stages.one.steps": 7, "stages.*.schedule": "linear"}, arms={"a": {}, "b": {"keep": []}}
    )
    for arm in arms(path, overrides=["stages.1.steps=9"], seeds=[8]).values():
        assert [stage.steps for stage in arm.spec.stages] == [7, 9]
        assert {stage.schedule for stage in arm.spec.stages} == {"linear"}
        assert list(arm.runs) == [8]


def test_which_experts_have_a_loss_of_their_own(project: Any) -> None:
    (project.folder / "more.py").write_text(
        "from coatkit import Expert\nclass A(Expert):\n  def loss(self): ...\nclass B(A): ...\nclass C(Expert): ...\n"
    )
    uses = ["audio", "spidr", "panns", "emotion2vec", "basic-pitch", "mert", *(f"./more.py:{name}" for name in "ABC")]
    found = {use: own_loss(plugins.registry().resolve("expert", use, project.folder)) for use in uses}
    assert [use for use, has in found.items() if has] == ["panns", "basic-pitch", "./more.py:A", "./more.py:B"]


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ({}, "a study needs arms, a grid, or preset: paper"),
        ({"arm": {}}, r"study.yml:3: arm: unknown key; did you mean 'arms'\?"),
        ({"arms": {"a": {"kep": []}}}, r"study.yml:5: arms.a.kep: unknown key; did you mean 'keep'\?"),
        ({"arms": {"a": {"keep": [], "drop": ["level"]}}}, "study.yml:4: arms.a: give either keep or drop"),
        ({"arms": {"a/b": {}}}, r"study.yml:4: arms.a/b: .* may hold only the characters"),
        ({"arms": {"a": {"drop": ["lever"]}}}, r"study.yml:5: arms.a.drop: .* no expert 'lever'; did you mean 'lev"),
        ({"arms": {"a": {"set": {"stages.tow.steps": 2}}}}, r"study.yml:6: .*no stage 'tow'; did you mean 'two'\?"),
        ({"arms": {"a": {"set": {"stages.two.stesp": 2}}}}, r"study.yml:4: arms.a: arm 'a': .*did you mean 'steps'\?"),
        ({"arms": {"a": {"head": "liner"}}}, r"arm 'a': .*no head named 'liner'"),
        ({"arms": {"a": {}, "b": {"drop": []}}}, "study.yml:5: arms.b: trains just as the arm 'a'; leave one out"),
        ({"arms": {"a": {}}, "baseline": "b"}, "study.yml:5: baseline: no arm is called 'b'; known: a"),
        ({"arms": {"a": {}}, "controls": ["shuffled"]}, r"'shuffled' is not one of .*did you mean 'shuffled-audio'"),
        ({"arms": {"a": {}}, "controls": ["vanilla"], "controls_of": ["b"]}, "controls_of: no arm is called 'b'"),
        ({"arms": {"a": {}}, "controls_of": ["a"]}, "there are no controls"),
        ({"arms": {"a": {}}, "seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"arms": {"a": {}}, "seeds": []}, "at least 1 item"),
        ({"arms": {"a": {}}, "base": "sepc.yaml"}, "study.yml:1: base: there is no file .*sepc.yaml"),
        ({"arms": {"a": {}}, "suite": "no.yaml"}, "study.yml:2: suite: there is no file .*no.yaml"),
        ({"grid": {"seed": []}}, "study.yml:4: grid.seed: .*at least 1 item"),
        ({"grid": {"stages.x.lr": [1]}}, "study.yml:4: grid.stages.x.lr: the base has no stage 'x'"),
        ({"preset": "papers"}, r"'papers' is not one of paper; did you mean 'paper'\?"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_told_with_its_line(project: Any, study: dict[str, Any], said: str) -> None:
    assert re.search(said, problems(prepare(project, **study)))


def test_a_plain_spec_gets_the_papers_arms(project: Any) -> None:
    prepare(project)
    study = study_of_spec(project.folder / "spec.yaml", project.folder / "suite.yaml", seeds=[4])
    assert [arm.name for arm in arms_of(study)[0]] == ["sft", "block-only", "all", "linear-heads"]
    assert study.output == project.folder / "runs/spec-ablation"


def call(*arguments: Any) -> tuple[int, str]:
    """Exit code, and what was said or raised."""
    result = CliRunner().invoke(cli, ["ablate", *map(str, arguments)])
    error = result.exception if isinstance(result.exception, SpecError | RunError | DataError) else None
    return getattr(error, "exit_code", result.exit_code), f"{result.output}{error or ''}"


def test_the_plan_is_told_without_torch(project: Any) -> None:
    changes = {"longer": {"set": {"stages.two.steps": 5}}, "tokens": {"set": {"stages.0.batch": {"tokens": 300}}}}
    path = prepare(project, arms={"a": {}, "off": {"set": {"thinking": False}}, **changes}, controls=["text-cot"])
    code = (
        "import sys; from coatkit.cli import cli\n"
        f"cli(['ablate', {str(path)!r}, '--dry-run'], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.search(r"a +6 +30 +audio, level +-\n", said)
    assert re.search(r"off +6 +30 +none \(no block\) +thinking=false\n", said)
    assert re.search(r"longer +8\* +40\* +audio, level +stages.1.steps=5\n", said)
    assert "tokens*: not the same training as a: other rows a step" in said
    assert "controls of tokens: text-cot" in said
    assert "12 runs, seeds 0, 1, 2; compared with a" in said
    assert said.endswith("False False\n")
    assert not (project.folder / "runs").exists()


def test_wrong_usage_is_two(project: Any) -> None:
    path = prepare(project, preset="paper")
    spec, suite = project.folder / "spec.yaml", project.folder / "suite.yaml"
    for arguments, said in [
        ((spec,), "is a training spec, so name what to evaluate on: --suite SUITE"),
        ((path, "--suite", suite), "a study says this itself"),
        ((spec, "--suite", suite, "--seeds", "1;2"), "expected whole numbers"),
        ((spec, "--suite", suite, "--seeds", "1,1"), "1 is given twice"),
        ((path, "--set", "stages.0.stepz=3"), "did you mean 'steps'"),
        ((project.folder / "no.yml",), "cannot be read"),
    ]:
        code, out = call(*arguments, "--dry-run")
        assert (code, said in out) == (2, True), out


def ablations() -> str:
    """The section of the page."""
    return re.split(r"\n## ", DOCS.read_text(encoding="utf-8").split("\n## Ablations\n")[1])[0]


def test_docs_name_every_key_arm_and_control() -> None:
    known = {name for model in (StudySpec, ArmSpec) for name in model.model_fields}
    for name in (*known, *PAPER, *CONTROLS):
        assert f"`{name}`" in ablations(), name


def test_the_study_in_docs_is_one(tmp_path: Path) -> None:
    (study,) = re.findall(r"```yaml\n(.+?)```", ablations(), re.S)
    path = tmp_path / "study.yml"
    for name in ("spec.yaml", "suite.yml"):
        study = study.replace(f" {name}", f" {EXAMPLES / 'quickstart' / name}")
    path.write_text(study)
    assert list(arms(path))[:2] == ["sft", "block-only"]
    read = read_study(path).spec
    assert set(StudySpec.model_fields) - read.model_fields_set <= {"grid", "set"}


def test_the_example_is_a_study() -> None:
    found = arms(EXAMPLES / "quickstart" / "ablation.yml")
    assert {name: list(arm.spec.experts) for name, arm in found.items()} == {
        "sft": [],
        "block-only": [],
        "all": ["audio", "basic-pitch"],
    }


# Runs


@pytest.fixture(scope="module")
def studied(new_project: Callable[[], Any]) -> Any:
    """A study of two arms and two seeds, done in one process, with what was said."""
    project = new_project()
    project.rows = [*project.rows[:4], project.rows[-1]]
    for stage in project.spec["stages"]:
        stage["steps"] = 2
    more = {"controls": ["untrained", "vanilla", "text-cot", "shuffled-audio"], "max_thought_tokens": 3}
    project.study = prepare(project, arms={"plain": {"keep": []}, "both": {}}, seeds=[0, 1], **more)
    project.said = []
    project.results = ablate(read_study(project.study), in_process=True, say=project.said.append)
    return project


def test_every_arm_is_trained_and_asked(studied: Any) -> None:
    results, out = studied.results, studied.folder / "runs/study"
    assert json.loads((out / "results.json").read_text()) == results
    # Seed by seed, so that all arms are there early.
    assert list(results["runs"]) == ["plain/seed-0", "both/seed-0", "plain/seed-1", "both/seed-1"]
    for name, run in results["runs"].items():
        assert (run["state"], run["step"], run["rows"], run["sittings"]) == ("done", 4, 20, 1)
        assert run["random_weights"] == ["backbone"]
        assert json.loads((out / "arms" / name / "run.json").read_text())["format"] == 1
    asked = results["runs"]["both/seed-1"]["asked"]
    folder = out / "arms/both/seed-1"
    made = {name: json.loads((folder / one["folder"] / "results.json").read_text()) for name, one in asked.items()}
    assert {"plain", *made} == set(results["tasks"]["clips"]["arms"])
    how = {name: (one["trained"], one["block"], one["cot"], one["shuffled_sounds"]) for name, one in made.items()}
    assert how == {
        "both": (True, True, None, None),
        "untrained of both": (False, True, None, None),
        "vanilla of both": (False, False, None, None),
        "text-cot of both": (False, False, 3, None),
        "shuffled-audio of both": (True, True, None, 1),
    }


def test_the_table_is_what_the_evaluations_say(studied: Any) -> None:
    out = studied.folder / "runs/study"
    arms = studied.results["tasks"]["clips"]["arms"]
    single = {}
    for name in ("plain", "both"):
        files = [out / f"arms/{name}/seed-{seed}/eval/small/results.json" for seed in (0, 1)]
        single[name] = [json.loads(file.read_text())["tasks"]["clips"]["score"] for file in files]
        assert arms[name]["seeds"] == dict(zip("01", single[name], strict=True))
        assert arms[name]["score"] == pytest.approx(np.mean(single[name]))
    found = arms["both"]["difference"]
    assert (found["to"], found["seeds"]) == ("plain", [0, 1])
    assert found["points"] == pytest.approx(np.mean(single["both"]) - np.mean(single["plain"]))
    each = [two - one for one, two in zip(single["plain"], single["both"], strict=True)]
    assert list(found["by_seed"].values()) == pytest.approx(each)
    assert found["p_seeds"] == (None if (p := over_seeds_t(each)) is None else pytest.approx(p))
    assert "difference" not in arms["plain"]
    table = (out / "table.md").read_text()
    assert "| clips (exact) | both | 2 | 4 | 20 |" in table
    assert "| clips (exact) | untrained of both | 2 | 0 | 0 |" in table
    assert "RANDOM WEIGHTS in backbone: these runs teach nothing real." in table
    assert "All arms train the same steps on the same data, with as many rows." in table
    assert "With so few seeds two trainings tell little" in table
    assert "| plain | `stages.0.weights.audio=0`" in table
    assert "| both | nothing |" in table


def files_of(folder: Path) -> dict[str, int]:
    """When each checkpoint and each file of answers was written."""
    files = [*folder.glob("arms/*/*/checkpoints/*/*"), *folder.glob("arms/*/*/eval/*/predictions.jsonl")]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


@pytest.fixture
def again(studied: Any) -> Any:
    """The done study, and its table and progress put back afterwards."""
    out = studied.folder / "runs/study"
    kept = {path: path.read_bytes() for path in (studied.study, out / "results.json", out / "table.md")}
    kept |= {path: path.read_bytes() for path in (studied.folder / name for name in ("train.jsonl", "level.py"))}
    yield studied
    for path, content in kept.items():
        path.write_bytes(content)


def test_what_is_done_is_used_again(again: Any) -> None:
    out = again.folder / "runs/study"
    before, said = files_of(out), []
    assert ablate(read_study(again.study), in_process=True, say=said.append) == again.results
    assert said[-1] == "study: 2 arms, 2 seeds: 4 runs, 0 to do"
    # What is done is read from the run folders.
    (out / "results.json").unlink()
    results = ablate(read_study(again.study), in_process=True, say=said.append)
    assert results["tasks"] == again.results["tasks"]
    assert {name: at for name, at in files_of(out).items() if "checkpoints" in name} == {
        name: at for name, at in before.items() if "checkpoints" in name
    }


def test_a_study_that_was_moved_with_its_project_is_taken_up(again: Any, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere/project"
    shutil.copytree(again.folder, folder)

    def made() -> dict[str, Any]:
        files = files_of(folder / "runs/study").items()
        return {name: at for name, at in files if "checkpoints" in name or "predictions" in name}

    before, said = made(), list[str]()
    results = ablate(read_study(folder / again.study.name), in_process=True, say=said.append)
    assert said[-1] == "study: 2 arms, 2 seeds: 4 runs, 0 to do"
    assert results["tasks"] == again.results["tasks"]
    assert made() == before  # nothing was trained or asked again
    with (folder / "train.jsonl").open("a") as stream:
        stream.write("\n")
    with pytest.raises(RunError, match=rf"changed since: data\.{folder}/train\.jsonl"):  # rows by their content
        ablate(read_study(folder / again.study.name), in_process=True)


def test_another_seed_is_added(again: Any) -> None:
    out = again.folder / "runs/study"
    before, said = files_of(out), []
    results = ablate(read_study(again.study, seeds=[1, 6]), in_process=True, say=said.append)
    assert "study: 2 arms, 2 seeds: 4 runs, 2 to do" in said
    assert list(results["tasks"]["clips"]["arms"]["plain"]["seeds"]) == ["1", "6"]
    assert before.items() <= files_of(out).items()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda folder: ["optimizer.eps=1e-7"], "optimizer.eps"),
        (lambda folder: (folder / "level.py").open("a").write("# other\n") and [], "the code of experts.level"),
        (lambda folder: (folder / "train.jsonl").open("a").write("\n") and [], "data."),
    ],
    ids=["spec", "expert", "rows"],
)
def test_a_run_made_from_something_else_is_refused(
    again: Any, change: Callable[[Path], list[str]], differs: str
) -> None:
    out = again.folder / "runs/study"
    before = files_of(out)
    study = read_study(again.study, overrides=change(again.folder))
    with pytest.raises(RunError) as caught:
        ablate(study, in_process=True)
    assert f"{out}/arms/both/seed-1: this run was made from something else; changed since: {differs}" in str(
        caught.value
    )
    assert "give the arm another name" in str(caught.value)
    assert files_of(out) == before
    code, text = call(again.study, "--dry-run")  # the plan looks at no run
    assert (code, "both" in text) == (0, True)


def test_other_rows_to_ask_about_need_a_word(again: Any) -> None:
    out, test = again.folder / "runs/study", again.folder / "test.jsonl"
    content = test.read_text()
    before = {name: at for name, at in files_of(out).items() if "checkpoints" in name}
    test.write_text("".join(line + "\n" for line in content.splitlines()[:3]))
    try:
        results = ablate(read_study(again.study, seeds=[0]), in_process=True)
        for run in results["runs"].values():
            assert run["state"] == "failed"
            assert "--restart" in run["reason"]
        assert results["tasks"] == {}
        results = ablate(read_study(again.study, seeds=[0]), in_process=True, restart=True)
        assert {run["state"] for run in results["runs"].values()} == {"done"}
        assert results["tasks"]["clips"]["rows"] == 3
        assert before == {name: at for name, at in files_of(out).items() if "checkpoints" in name}
        test.write_text('{"id": 1}\n')
        with pytest.raises(DataError, match=r"test\.jsonl"):
            ablate(read_study(again.study, seeds=[0]), in_process=True)
    finally:
        test.write_text(content)
        ablate(read_study(again.study), in_process=True, restart=True)


def test_time_that_is_up_begins_nothing(again: Any) -> None:
    said: list[str] = []
    results = ablate(read_study(again.study, seeds=[7]), in_process=True, max_minutes=1e-9, say=said.append)
    assert said[-1] == "time is up; run this again to go on"
    assert {run["state"] for run in results["runs"].values()} == {"waiting"}
    assert "Not complete: 2 of 2 runs are not done." in (again.folder / "runs/study/table.md").read_text()


def test_one_process_at_a_time(again: Any) -> None:
    with (again.folder / "runs/study/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process works on this study"):
            ablate(read_study(again.study), in_process=True)
    (again.folder / "runs/study/results.json").write_text("{")
    with pytest.raises(RunError, match="Remove it: what is done is found again"):
        ablate(read_study(again.study), in_process=True)
    with pytest.raises(RunError, match="2 jobs need processes of their own"):
        ablate(read_study(again.study), in_process=True, jobs=2)


def test_an_arm_that_fails_stops_no_other(project: Any) -> None:
    project.rows = project.rows[:4]
    worse = {"experts.level.gain": float("inf"), "optimizer.max_skipped": 0}
    path = prepare(project, arms={"bad": {"set": worse}, "good": {"set": {"stages.two.steps": 4}}}, seeds=[0])
    code, said = call(path, "--in-process")
    assert code == 3
    assert "1 of 2 runs failed; called again, they are tried again" in said
    assert re.search(r"bad/seed-0: .*steps gave NaN or Inf", said)
    results = json.loads((project.folder / "runs/study/results.json").read_text())
    assert {name: run["state"] for name, run in results["runs"].items()} == {
        "bad/seed-0": "failed",
        "good/seed-0": "done",
    }
    # One arm has no score yet, so there is nothing to compare with; it was to train other steps.
    assert "difference" not in results["tasks"]["clips"]["arms"]["good"]
    table = (project.folder / "runs/study/table.md").read_text()
    assert "| clips (exact) | good | 1 | 7* | 28* |" in table
    assert "good*: not the same training: steps (bad has others)" in table
    assert "- bad/seed-0: 1 steps gave NaN or Inf" in table
    code, said = call(path, "--in-process", "--json")
    assert "1 to do" in said
    assert code == 3
    # A failure stays told until it is tried again.
    code, said = call(path, "--in-process", "--max-minutes", "1e-9")
    assert (code, "bad/seed-0: 1 steps gave NaN or Inf" in said) == (3, True)
    # What is thrown away is no longer in the table, though asking again fails.
    for file in (project.folder / "runs/study/arms/good/seed-0").glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"damaged")
    code, said = call(path, "--in-process", "--restart")
    assert (code, "2 of 2 runs failed" in said) == (3, True)
    assert json.loads((project.folder / "runs/study/results.json").read_text())["tasks"] == {}


# In processes of their own


def wait_for(what: Callable[[], Any], of: subprocess.Popen[str]) -> Any:
    for _ in range(1200):
        if found := what():
            return found
        assert of.poll() is None, of.communicate()
        time.sleep(0.1)
    raise AssertionError("it did not come")


def process_of(run: str) -> int:
    """The process that trains a run."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(f"{run}.job.json".encode()) for word in words):
            return int(folder.name)
    raise AssertionError(f"no process works on {run}")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the process to kill in /proc")
def test_killed_and_stopped_runs_go_on(project: Any) -> None:
    project.rows = project.rows[:4]
    project.spec["checkpoint"] = {"every": 1, "keep": 2}
    for stage in project.spec["stages"]:
        stage["steps"] = 30
    path = prepare(project, arms={"one": {"keep": []}, "two": {"drop": ["audio"]}}, seeds=[0])
    out = project.folder / "runs/study"
    command = [sys.executable, "-m", "coatkit", "ablate", str(path), "--jobs", "2"]
    devices = {**os.environ, "CUDA_VISIBLE_DEVICES": "3,5"}  # neither is there, so both runs take the CPU
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=devices) as sitting:
        try:
            runs = [out / f"arms/{name}/seed-0" for name in ("one", "two")]
            wait_for(lambda: all(list(run.glob("checkpoints/step-*")) for run in runs), sitting)
            processes = [process_of(f"project/runs/study/logs/{name}.seed-0") for name in ("one", "two")]
            seen = [Path(f"/proc/{one}/environ").read_bytes().split(b"\0") for one in processes]
            os.kill(processes[0], signal.SIGKILL)
            wait_for(lambda: "SIGKILL" in (out / "results.json").read_text(), sitting)
            sitting.send_signal(signal.SIGINT)
            said, _ = sitting.communicate(timeout=120)
        except BaseException:
            sitting.kill()
            raise
    assert [next(word for word in one if word.startswith(b"CUDA_VISIBLE"))[-1:] for one in seen] == [b"3", b"5"]
    assert sitting.returncode == 3, said
    told = json.loads((out / "results.json").read_text())["runs"]
    assert told["one/seed-0"]["state"] == "failed"
    assert "its process was ended by SIGKILL; was there enough memory?" in told["one/seed-0"]["reason"]
    assert "one.seed-0.log" in told["one/seed-0"]["reason"]
    assert told["two/seed-0"]["state"] == "stopped"
    assert "1 runs save what they have; run this again to go on" in said
    reached = told["two/seed-0"]["step"]
    assert 0 < reached < 60
    lines: list[str] = []
    results = ablate(read_study(path), in_process=True, say=lines.append)
    assert f"two/seed-0: begins after step {reached} of 60" in lines
    for run in results["runs"].values():
        assert (run["state"], run["step"], run["rows"]) == ("done", 60, 240)
    assert results["runs"]["two/seed-0"]["sittings"] == 2
    for folder in runs:
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 61))


@pytest.mark.parametrize(("asked", "state"), [(True, "stopped"), (False, "failed")])
def test_a_process_that_ends_while_it_starts(tmp_path: Path, asked: bool, state: str) -> None:
    job = Job("spec.yaml", [], "suite.yml", None, 8, [], False, str(tmp_path / "result.json"))
    with (tmp_path / ".lock").open("w") as lock, Pool(tmp_path, 1, lock.fileno()) as pool:
        pool.start("one/seed-0", job)
        process = pool.running["one/seed-0"].process.pid
        assert os.getsid(process) == process  # Ctrl-C in a terminal does not reach it
        if asked:
            pool.stop()
        else:
            os.kill(process, signal.SIGTERM)
        while not (seen := list(pool.look())):
            pass  # looking waits
    ((name, ended, running),) = seen
    assert (name, ended.state, running, pool.running) == ("one/seed-0", state, False, {})
    assert ("SIGTERM" in ended.reason) is not asked


# Draws of seeds and rows


def judged(*right: int) -> Scored:
    hits = np.array(right, np.float64)
    counts = np.stack([hits, np.ones(len(hits))], 1)
    return Scored(counts, ratio, np.ones(len(hits), bool), 100 * hits, [None] * len(hits), right_or_wrong=True)


def test_with_one_seed_it_is_the_paired_bootstrap_of_rows() -> None:
    random = np.random.default_rng(3)
    one, two = (judged(*random.integers(0, 2, 40)) for _ in range(2))
    known = paired(one, two)
    differences = over_seeds([two]) - over_seeds([one])
    assert tuple(np.percentile(differences, [2.5, 97.5])) == pytest.approx((known.low, known.high))
    assert two_sided(differences) == known.p


def test_seeds_are_drawn_with_replacement_one_fewer_than_there_are() -> None:
    drawn = over_seeds([judged(0, 0, 0), judged(1, 1, 1), judged(1, 1, 1)], 20_000)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [0, 50, 100]
    # Two draws of three, one of which is wrong on every row.
    assert counts / 20_000 == pytest.approx([1 / 9, 4 / 9, 4 / 9], abs=0.015)
    # So the draws spread as the mean of three does: by the sample's variance over 3.
    assert drawn.var() == pytest.approx(np.var([0, 100, 100], ddof=1) / 3, rel=0.03)


def test_the_t_test_over_seeds() -> None:
    # By hand: mean 2 and standard deviation 1 give t = 2 sqrt(3); with two degrees p = 1 - t / sqrt(t^2 + 2).
    assert over_seeds_t([1.0, 2.0, 3.0]) == pytest.approx(1 - np.sqrt(12 / 14))
    assert over_seeds_t([5.0]) is None
    assert over_seeds_t([0.1 + 0.2, 0.3, 0.3]) is None


def test_rows_are_drawn_once_for_all_seeds() -> None:
    # Each seed is right on the same half of the rows: drawn for each seed alone, the spread would be less by sqrt(3).
    half = judged(*[0, 1] * 50)
    one, three = over_seeds([half], 20_000), over_seeds([half] * 3, 20_000)
    assert (one == pytest.approx(three)) is True
    assert one.std() == pytest.approx(100 * np.sqrt(0.25 / 100), rel=0.03)


def test_differences_are_paired_by_seed_and_by_row() -> None:
    # Seeds differ much and rows differ much, but the second is better than the first on one row of every seed.
    first = [judged(0, 0, 0, 0, 1), judged(1, 1, 1, 0, 0)]
    second = [judged(0, 0, 0, 1, 1), judged(1, 1, 1, 1, 0)]
    difference = over_seeds(second, 20_000) - over_seeds(first, 20_000)
    assert difference.min() >= 0
    # So many draws without the fourth row: (4/5)^5.
    assert (difference == 0).mean() == pytest.approx(0.8**5, abs=0.015)
    assert difference.mean() == pytest.approx(20, abs=0.5)
    assert over_seeds(first, 20_000).std() > difference.std()


def test_draws_without_a_row_that_counts_have_no_score() -> None:
    one = Scored(np.zeros((2, 2)), ratio, np.zeros(2, bool), np.full(2, np.nan), [None] * 2)
    assert np.isnan(over_seeds([one, one], 10)).all()
    with pytest.raises(ValueError, match="not of the same rows"):
        over_seeds([judged(1, 0), judged(1, 0, 1)])


def test_arms_are_compared_on_the_seeds_both_have(studied: Any) -> None:
    out = studied.folder / "runs/study/arms"
    place = {name: {seed: out / f"{name}/seed-{seed}/eval/small" for seed in (0, 1)} for name in ("plain", "both")}
    del place["plain"][0]
    found = score_arms(place, {"plain": "plain", "both": "plain"})["clips"]["arms"]
    assert (list(found["both"]["seeds"]), found["both"]["difference"]["seeds"]) == (["0", "1"], [1])
    assert "difference" not in score_arms({"both": place["both"]}, {"both": "plain"})["clips"]["arms"]["both"]


def test_a_difference_is_the_arm_less_its_baseline(studied: Any, tmp_path: Path) -> None:
    place: dict[str, dict[int, Path]] = {"plain": {}, "both": {}}
    right = {"plain": [0, 1], "both": [3, 3]}  # of four rows, for each seed
    for name, seeds in place.items():
        for seed in (0, 1):
            seeds[seed] = tmp_path / name / str(seed)
            shutil.copytree(studied.folder / f"runs/study/arms/{name}/seed-{seed}/eval/small", seeds[seed])
            file = seeds[seed] / "predictions.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for i, line in enumerate(lines):
                line["answer"] = line["references"][0] if i < right[name][seed] else "?"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = score_arms(place, {"plain": "plain", "both": "plain"})["clips"]["arms"]["both"]["difference"]
    assert (found["points"], found["by_seed"]) == (62.5, {"0": 75, "1": 50})
    assert 0 <= found["low"] < 62.5 < found["high"] <= 100
    assert found["p_seeds"] == pytest.approx(2 / np.pi * np.arctan(12.5 / 62.5))  # one degree of freedom: t is 5
    (place["both"][0] / "results.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        score_arms(place, {"plain": "plain", "both": "plain"})
