"""What every package says of itself; `make test-wheels` builds and installs them."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from coatkit.errors import SpecError
from coatkit.spec_file import load_spec

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]


def project(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_a_package_says_what_it_is_and_what_it_runs_on(path: Path) -> None:
    said = project(path)
    assert said["requires-python"] == ">=3.11"
    assert {f"Programming Language :: Python :: {v}" for v in ("3.11", "3.12", "3.13")} <= set(said["classifiers"])
    assert said["license"].startswith("Apache-2.0")  # what is shipped beside the code may add its own
    assert said["description"]
    for name in (*said["license-files"], said["readme"]):
        assert list(path.parent.glob(name)), name


def test_a_folder_of_its_name_does_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / "coatkit").mkdir()  # as the clone is, for a script that lies beside it
    command = [sys.executable, "-c", "import coatkit; coatkit.Expert"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_extra_of_the_paper_is_its_experts_and_backbones() -> None:
    extra = project(FILES[0])["optional-dependencies"]["paper"]
    plugins = {path.parent.name for path in FILES[1:]}
    assert set(extra) == {n for n in plugins if n.startswith(("coatkit-expert-", "coatkit-backbone-"))} - {
        "coatkit-backbone-mini"
    }


RUN = """\
name: old
backbone: {use: mini, weights: random}
experts: {gone: {}}
data: {train: train.jsonl}
stages: [{name: one, steps: 1, lr: 1.0e-3, weights: {gone: 1.0}}]
output: .
"""


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"components": {"experts.gone": {"from": "coatkit-expert-gone", "version": "0.3.1"}}}, True),
        ({"components": {"experts.gone": {"from": "/home/me/gone.py", "version": ""}}}, False),
        ({"components": {"experts.gone": {"from": "a; rm -rf", "version": "1"}}}, False),
        ({"components": {"experts.gone": {"from": "coatkit-expert-gone", "version": ""}}}, False),
        ({"components": []}, False),
        (None, False),
    ],
)
def test_the_spec_of_a_run_names_the_plugin_it_was_made_with(record: Any, told: bool, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(RUN)
    if record is not None:
        (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match="no expert named 'gone' is installed") as caught:
        load_spec(tmp_path / "spec.yaml", need="components")
    remedy = "made with coatkit-expert-gone 0.3.1; install it again: pip install coatkit-expert-gone==0.3.1"
    assert (remedy in str(caught.value)) == told
    assert ("install it again" in str(caught.value)) == told
