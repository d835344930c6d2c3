"""A small part of `make fuzz`, and that its judge sees what it is there to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coatkit.data.mixture import mix
from coatkit.errors import DataError
from coatkit.spec_data import MixtureSpec

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from by_path import module_at

FUZZ = Path(__file__).parent / "fuzz"


def load(name: str) -> Any:
    return module_at(FUZZ / f"{name}.py", f"fuzz_{name}")


harness, runner = load("harness"), load("run")


@pytest.mark.parametrize("area", ["specs", "suites", "rows", "sounds", "stores", "plugins"])
def test_spoiled_inputs_end_in_success_or_one_screen(area: str) -> None:
    cases = round(40 / runner.AREAS[area][1])
    words = [sys.executable, str(FUZZ / "run.py"), area, "--here", "--cases", str(cases), "--seed", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["crashed"] == []
    assert found["tried"] == found["accepted"] + found["refused"] == 40


def refuse(code: int, said: str) -> Any:
    def act() -> None:
        raise harness.RefusedError(code, said)

    return act


@pytest.mark.parametrize(
    ("act", "wrong"),
    [
        (lambda: None, ""),
        (refuse(2, "error: spec.yaml:3: steps: must be above 0\n"), ""),
        (refuse(1, "error: x"), "exit code 1"),
        (refuse(3, ""), "nothing is said"),
        (refuse(3, "x\n" * 26), "the message fills 26 lines"),
        (refuse(2, "x" * 160 * 26), "the message fills 26 lines"),
        (refuse(2, "Traceback (most recent call last):\n"), "a traceback is shown"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: sys.exit(1), "SystemExit"),
        (lambda: Path("left.partial").touch(), "left half-written"),
    ],
)
def test_the_judge_sees(act: Any, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found, _ = harness.judge(act, tmp_path)
    assert found.partition("\n")[0].startswith(wrong)
    assert bool(found) == bool(wrong)


@pytest.mark.parametrize(
    "content",
    [
        b"name: [",
        b"name: \xff\xfe",
        b"name: a\0b",
        b"extends: spec.yaml",
        b"name: !!python/name:os.system",
        (FUZZ.parents[1] / "examples/quickstart/spec.yaml").read_bytes(),  # its rows are not beside it
        b'name: \xe2\x80\xaeltr\nsteps: "\\ud800"',
    ],
)
def test_a_shell_sees_what_is_judged(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(harness.RefusedError) as refused:
        harness.as_a_shell("check", path)
    assert harness.wrong_with(refused.value.code, refused.value.said) == ""


def test_a_difference_from_the_shell_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "shell", lambda *_: "something else")
    with pytest.raises(AssertionError, match="a shell sees"):
        harness.as_a_shell("--version")


# What fuzzing found.


def test_a_study_that_names_a_file_no_disk_can_hold(tmp_path: Path) -> None:
    (tmp_path / "study.yml").write_text(f"base: {'y' * 400}\nsuite: {'z' * 400}\narms: {{a: {{set: {{}}}}}}\n")
    with pytest.raises(harness.RefusedError, match="there is no file") as refused:
        harness.shell("ablate", tmp_path / "study.yml", "--dry-run")
    assert refused.value.code == 2


@pytest.mark.parametrize("words", [("report", "RUN", "--out"), ("data", "SPEC", "--html")])
def test_a_place_no_disk_can_hold_is_named(words: tuple[str, ...], tmp_path: Path) -> None:
    spec = FUZZ.parents[1] / "examples/quickstart/spec.yaml"
    place = tmp_path / ("y" * 400) / "page.html"
    words = tuple({"RUN": str(tmp_path), "SPEC": str(spec)}.get(word, word) for word in words)
    with pytest.raises(harness.RefusedError) as refused:
        harness.shell(*words, place)
    assert harness.wrong_with(refused.value.code, refused.value.said) == ""


def test_a_sidecar_nested_too_deep_is_no_mixtures(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    categories = {"one": {"share": 1.0, "sources": [str(tmp_path / "rows.jsonl")]}}
    (tmp_path / "mix.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"mix\.json: is there and is no mixture"):
        mix(MixtureSpec.model_validate({"rows": 1, "categories": categories}), tmp_path / "mix.parquet")


def test_an_error_of_coatkits_own_is_a_refusal(tmp_path: Path) -> None:
    def act() -> None:
        raise DataError("rows.jsonl, line 3: is not JSON")

    assert harness.judge(act, tmp_path) == ("", True)


def test_what_hangs_is_ended_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 1)
    tally = harness.run(iter([("sleeps", lambda: time.sleep(30)), ("fine", lambda: None)]), tmp_path, 2)
    assert (tally.accepted, tally.tried) == (1, 2)
    assert tally.crashed[0][0] == "sleeps"
    assert "no end after 1 s" in tally.crashed[0][1]


def test_memory_over_the_limit_is_an_error() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import harness\n"
    code += "with harness.limited(1 << 28):\n    bytearray(1 << 29)"
    done = subprocess.run([sys.executable, "-c", code, str(FUZZ)], capture_output=True, text=True)
    assert "MemoryError" in done.stderr


def test_a_crash_is_in_the_table_and_the_exit_code(tmp_path: Path) -> None:
    found = {"rows": {"tried": 3, "accepted": 1, "refused": 1, "crashed": [("a", "b")], "peak_mb": 5, "seconds": 1}}
    assert "| 3 | 1 | 1 | 1 | 5 MB |" in runner.table(found)[2]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- fuzz: begin -->\nold\n<!-- fuzz: end -->\nafter\n")
    runner._write(page, ["new"])
    assert page.read_text() == "before\n<!-- fuzz: begin -->\nnew\n<!-- fuzz: end -->\nafter\n"
