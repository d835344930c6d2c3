"""`coatkit new`: what it writes installs, is found and passes its own tests; what it cannot write it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coatkit.cli import cli
from coatkit.errors import CoatkitError, SpecError

PASSED = {"expert": 33, "head": 20, "backbone": 70}
"""Checks that must pass at least: the suite and the package's own."""


def new(*words: Any) -> str:
    result = CliRunner().invoke(cli, ["new", *map(str, words)])
    if isinstance(result.exception, CoatkitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def run(*words: Any, here: Path, site: Path | None = None) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "" if site is None else str(site)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    return done.stdout


# Eighty checks of a whole model; the same class without a package is tried in tests/test_docs_blocks.py.
@pytest.mark.parametrize("kind", ["expert", "head", pytest.param("backbone", marks=pytest.mark.slow)])
def test_a_new_package_passes_its_own_tests(kind: str, tmp_path: Path) -> None:
    said = new(kind, "my-own.2", "--to", tmp_path, "--license", "mit")
    package, site = tmp_path / f"coatkit-{kind}-my-own-2", tmp_path / "site"
    assert f"{package}: written" in said
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, ".")
    run(*pip, here=package)
    assert f"{kind:8}  my-own.2 " in run("-m", "coatkit", "plugins", here=tmp_path, site=site)
    told = run("-m", "pytest", "-p", "no:cacheprovider", "-rs", "tests", here=package, site=site)
    passed = int(told.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed >= PASSED[kind]
    ruff = ("-m", "ruff", "--isolated")
    run(
        *ruff[:2],
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "E,F,I,B,UP",
        "--line-length",
        120,
        ".",
        here=package,
    )
    run(*ruff[:2], "format", "--isolated", "--no-cache", "--line-length", 120, "--check", ".", here=package)
    assert "MIT License" in (package / "LICENSE").read_text()
    for path in package.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".toml"):
            assert "$" not in path.read_text(), path


@pytest.mark.parametrize(
    ("licence", "spdx", "first"),
    [
        ("apache-2.0", "Apache-2.0", "Apache License"),
        ("mit", "MIT", "MIT License"),
        ("bsd-3-clause", "BSD-3-Clause", "BSD 3-Clause License"),
        ("none", None, None),
    ],
)
def test_licences(tmp_path: Path, licence: str, spdx: str | None, first: str | None) -> None:
    new("head", "mine", "--to", tmp_path, "--license", licence)
    package = tmp_path / "coatkit-head-mine"
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project.get("license") == spdx
    assert (package / "LICENSE").exists() == (first is not None)
    assert ("Choose a licence" in (package / "README.md").read_text()) == (first is None)
    if first is not None:
        assert first in (package / "LICENSE").read_text().strip().splitlines()[0]
        assert f'code_licence="{spdx}"' in (package / "src/coatkit_head_mine/__init__.py").read_text()


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("expert", "My Expert", "'my-expert' would do"),
        ("expert", "a--b", "with single - or . between; 'a-b' would do"),
        ("expert", "../up", "'up' would do"),
        ("expert", "é", "small letters and digits"),
        ("expert", "x" * 61, "a name of over 60 characters"),
        ("expert", "coatkit-expert-x", "give NAME alone"),
        ("head", "class", "a word of Python or YAML"),
        ("head", "off", "a word of Python or YAML"),
        ("head", "linear", "an installed head has it (coatkit)"),
        ("expert", "basic-pitch", "an installed expert has it (coatkit-expert-basic-pitch)"),
        ("expert", "basic.pitch", "the package coatkit-expert-basic-pitch is installed already"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, kind: str, name: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        new(kind, name, "--to", tmp_path / "made")
    assert said in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_name_may_be_another_kinds(tmp_path: Path) -> None:
    new("head", "audio", "--to", tmp_path)
    assert (tmp_path / "coatkit-head-audio").is_dir()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "coatkit-head-mine").mkdir()
    with pytest.raises(SpecError, match=r"coatkit-head-mine: is there already; .* --to"):
        new("head", "mine", "--to", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["coatkit-head-mine"]
    assert not list((tmp_path / "coatkit-head-mine").iterdir())


@pytest.mark.parametrize("inside", ["file", "file/deeper"])
def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path, inside: str) -> None:
    from coatkit.scaffold import write_package

    (tmp_path / "file").write_text("kept")
    with pytest.raises(SpecError, match="a file stands in the way; name another folder"):
        write_package("head", "mine", tmp_path / inside)
    assert (tmp_path / "file").read_text() == "kept"


def test_half_a_package_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coatkit import scaffold

    def full(template: str, words: dict[str, str]) -> str:
        if template == "README.md":
            raise OSError(28, "No space left on device")
        return "x"

    monkeypatch.setattr(scaffold, "_render", full)
    with pytest.raises(OSError, match="No space"):
        scaffold.write_package("head", "mine", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_of_digits_makes_a_class(tmp_path: Path) -> None:
    new("head", "2x", "--to", tmp_path)
    assert "class A2xHead(Head):" in (tmp_path / "coatkit-head-2x/src/coatkit_head_2x/head.py").read_text()
