"""`coatkit plugins check`: a suite's verdict on an installed plugin or a class in a file, in words and exit code."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import coatkit
from coatkit.cli import cli
from coatkit.errors import CoatkitError, PluginError, SpecError
from coatkit.plugins import registry
from coatkit.verdict import chosen_options, kind_of, run_tests

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("broken_heads.py", "broken_experts.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    shutil.copy(ROOT / "examples/custom_expert/loudness.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def check(*words: str) -> Any:
    result = CliRunner().invoke(cli, ["plugins", "check", *words])
    if isinstance(result.exception, CoatkitError):
        raise result.exception
    return result


def test_a_good_expert_of_ones_own(here: Path) -> None:
    result = check("./loudness.py:Loudness", "--option", "floor_db=60")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("expert ./loudness.py:Loudness: 30 promises kept, 0 broken")
    assert "RANDOM" not in result.stderr
    assert not list(here.rglob("report.xml"))


def test_a_broken_head_is_told_with_the_remedy(here: Path) -> None:
    result = check("./broken_heads.py:PoolsPadding", "--verbose")
    assert result.exit_code == 1
    assert "  BROKEN    padding changes nothing: what stands at padded positions leaks into a sound" in result.stdout
    assert "            What to do: use the mask: attention" in result.stdout
    assert "  kept      states matter\n" in result.stdout
    assert "  left out  entry module imports no torch: it is no installed plugin" in result.stdout
    assert "16 promises kept, 2 broken, 1 left out" in result.stdout


def test_an_installed_head_as_json(here: Path) -> None:
    result = check("transformer", "--option", "heads=4", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (told["kind"], told["options"]) == ("head", {"heads": 4})
    assert {one["outcome"] for one in told["checks"].values()} == {"passed"}


def test_options_that_do_not_fit_break_the_first_promise(here: Path) -> None:
    result = check("transformer", "--option", "heads=7")
    assert result.exit_code == 1
    assert "BROKEN    loads: it could not be made with hidden_size 64 and dim 12" in result.stdout
    assert "does not divide the backbone's width 64" in result.stdout


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["no-such"], PluginError, "no expert named 'no-such' is installed"),
        (["./loudness.py"], PluginError, "name the class in the file too"),
        (["./gone.py:Mine"], PluginError, "there is no file"),
        (["./loudness.py:Loudnes"], PluginError, "did you mean 'Loudness'"),
        (["./loudness.py:Loudness", "--kind", "head"], PluginError, "is no subclass of coatkit.Head"),
        (["transformer", "--option", "heads"], SpecError, "--option heads: expected KEY=VALUE"),
        (["transformer", "--option", "heads=[1"], SpecError, "--option heads=[1: "),
    ],
)
def test_what_cannot_be_checked_is_said(here: Path, words: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        check(*words)
    assert said in str(caught.value)


def test_a_file_from_elsewhere_is_run_with_allow_code_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says that it was run."""
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    source = (
        "from pathlib import Path\n\nPath({!r}).touch()\nraise RuntimeError('it was run')\n\n\nclass Mine:\n    pass\n"
    )
    (here / "mine.py").write_text(source.format(str(here / "was_run")))
    monkeypatch.chdir(elsewhere)
    with pytest.raises(PluginError, match=r"is not inside the folder you are in .*--allow-code"):
        check("../mine.py:Mine")
    assert not (here / "was_run").exists()
    with pytest.raises(PluginError, match="it was run"):
        check("../mine.py:Mine", "--allow-code")
    assert (here / "was_run").exists()
    with pytest.raises(PluginError, match=r"'fractions' belongs to no installed plugin .*--allow-code"):
        check("fractions:Fraction")


def test_random_weights_are_taken_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    for kind, name, expected in (
        ("expert", "panns", {"weights": "random"}),
        ("expert", "basic-pitch", {}),  # ships its weights
        ("backbone", "mini", {"weights": "random"}),
        ("head", "linear", {}),
    ):
        component = registry().resolve(kind, name, tmp_path)  # type: ignore[arg-type]
        assert chosen_options(component, {}) == expected
    panns = registry().resolve("expert", "panns", tmp_path)
    assert chosen_options(panns, {"weights": "/own.pth"}) == {"weights": "/own.pth"}


def test_a_class_tells_its_kind(here: Path) -> None:
    assert kind_of("./broken_heads.py:Good", None, here) == "head"
    assert kind_of("./broken_experts.py:Good", None, here) == "expert"
    assert kind_of("mini", None, here) == "backbone"


def test_what_pytest_loads_with_coatkit_is_light() -> None:
    """Every pytest run in an environment with coatkit loads this."""
    # As pytest looks: at every distribution, for a build may have left another one's metadata in the folder.
    entries = [e for found in importlib.metadata.distributions(name="coatkit") for e in found.entry_points]
    [module] = {entry.value for entry in entries if entry.group == "pytest11"}
    source = f"import sys, {module}; print({module}.pytest_report_header(), *sys.modules)"
    said = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert said[:2] == ["coatkit:", coatkit.__version__]
    assert not {"torch", "numpy", "pydantic", "transformers", "pytest"} & set(said)


def test_a_file_that_cannot_be_read_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"gave no verdict:(?s:.*)SyntaxError"):
        run_tests("def x(:\n", tmp_path)
