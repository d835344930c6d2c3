"""Whose code runs: a spec's own beside it, a plugin's, and nothing that a stranger's spec or run folder names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from coatkit import trust
from coatkit.cli import cli
from coatkit.errors import PluginError, SpecError
from coatkit.spec_file import LoadedSpec, load_spec

CODE = """
from pathlib import Path
from coatkit import Expert
Path({mark!r}).touch()
class Mine(Expert): ...
"""
SPEC: dict[str, Any] = {
    "name": "trust",
    "backbone": {"use": "mini", "weights": "random"},
    "data": {"train": "rows.jsonl"},
    "stages": [{"name": "one", "steps": 1, "lr": 1e-3, "weights": {"mine": 1.0}}],
    "output": "run",
}


@pytest.fixture(autouse=True)
def _nothing_has_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    trust._said.clear()
    yield
    trust._said.clear()


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once the code has run."""
    return tmp_path / "it-ran"


def write(folder: Path, use: str, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("{}\n")
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "experts": {"mine": {"use": use}}, **keys}))
    return path


def code(path: Path, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CODE.format(mark=str(mark)))
    return path


def run(loaded: LoadedSpec) -> type[Any]:
    return loaded.chosen["experts.mine"].component.load_class()


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    return str(caught.value)


def test_a_file_beside_the_spec_runs_and_is_named_once(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = code(tmp_path / "a/own/mine.py", mark)
    loaded = load_spec(write(tmp_path / "a", "./own/mine.py:Mine"))
    assert not mark.exists()  # finding it runs nothing
    assert run(loaded).__name__ == "Mine"
    run(loaded)
    assert mark.exists()
    assert capsys.readouterr().err == f"coatkit: ./own/mine.py:Mine: runs the code in {file}\n"


@pytest.mark.parametrize("use", ["../mine.py:Mine", "{folder}/mine.py:Mine", "./link.py:Mine", "./link/mine.py:Mine"])
def test_a_file_elsewhere_is_refused_through_links_too(tmp_path: Path, mark: Path, use: str) -> None:
    code(tmp_path / "mine.py", mark)
    path = write(tmp_path / "a", use.format(folder=tmp_path))
    if "link.py" in use:
        (tmp_path / "a/link.py").symlink_to(tmp_path / "mine.py")
    if "link/" in use:
        (tmp_path / "a/link").symlink_to(tmp_path)
    said = refused(path)
    assert f"{path}:" in said  # with the line
    assert f"{tmp_path}/mine.py is not inside the spec's folder ({tmp_path}/a)" in said
    assert "--allow-code" in said
    assert not mark.exists()


def test_a_folder_whose_name_begins_alike_is_elsewhere(tmp_path: Path, mark: Path) -> None:
    code(tmp_path / "a-more/mine.py", mark)
    assert "is not inside" in refused(write(tmp_path / "a", "../a-more/mine.py:Mine"))


def test_an_override_is_held_to_the_same_rule(tmp_path: Path, mark: Path) -> None:
    code(tmp_path / "mine.py", mark)
    code(tmp_path / "a/mine.py", mark)
    assert "is not inside" in refused(write(tmp_path / "a", "./mine.py:Mine"), "experts.mine.use=../mine.py:Mine")


def test_a_base_specs_file_is_taken_from_its_own_folder(tmp_path: Path, mark: Path) -> None:
    code(tmp_path / "base/mine.py", mark)
    write(tmp_path / "base", "./mine.py:Mine")
    arm = tmp_path / "arms/arm.yaml"
    arm.parent.mkdir()
    arm.write_text("extends: ../base/spec.yaml\noutput: run\n")
    run(load_spec(arm))
    assert mark.exists()
    code(tmp_path / "mine.py", mark)
    arm.write_text("extends: ../base/spec.yaml\noutput: run\nexperts: {mine: {use: ../mine.py:Mine}}\n")
    assert "is not inside" in refused(arm)


@pytest.mark.parametrize("use", ["antigravity:Mine", "json:JSONDecoder", "sneaky:Mine"])
def test_a_module_of_no_plugin_is_refused(
    tmp_path: Path, mark: Path, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code(tmp_path / "site/sneaky.py", mark)
    code(tmp_path / "site/antigravity.py", mark)
    monkeypatch.syspath_prepend(tmp_path / "site")
    said = refused(write(tmp_path / "a", use))
    assert "belongs to no installed plugin of coatkit" in said
    assert not mark.exists()
    if use.startswith("sneaky"):
        monkeypatch.setenv(trust.VARIABLE, "1")
        run(load_spec(tmp_path / "a/spec.yaml"))
        assert mark.exists()


def test_a_module_of_a_plugin_is_not_asked_about(tmp_path: Path) -> None:
    loaded = load_spec(write(tmp_path / "a", "coatkit_expert_basic_pitch.expert:BasicPitch"))
    assert run(loaded).__name__ == "BasicPitch"


def stranger(folder: Path, use: str) -> Path:
    """A run folder somebody sent: they wrote all of it, its record and digests too."""
    path = write(folder, use)
    (folder / "run.json").write_text(json.dumps({"format": 1, "components": {"experts.mine": {"sha256": "0" * 64}}}))
    return path


@pytest.mark.parametrize("use", ["./mine.py:Mine", "{folder}/theirs/mine.py:Mine", "{folder}/mine.py:Mine"])
def test_a_run_folders_code_does_not_run(tmp_path: Path, mark: Path, use: str) -> None:
    for place in ("theirs", "."):
        code(tmp_path / place / "mine.py", mark)
    loaded = load_spec(stranger(tmp_path / "theirs", use.format(folder=tmp_path)), need="components")
    with pytest.raises(PluginError, match=r"mine\.py, and if you trust it, say --allow-code"):
        run(loaded)
    assert not mark.exists()


def test_a_run_whose_spec_is_a_link_out_of_it_is_a_run_all_the_same(tmp_path: Path, mark: Path) -> None:
    code(tmp_path / "theirs/deep/mine.py", mark)
    real = write(tmp_path / "theirs/deep", "./mine.py:Mine")
    (tmp_path / "theirs/run").mkdir()
    (tmp_path / "theirs/run/run.json").write_text('{"format": 1}')
    (tmp_path / "theirs/run/spec.yaml").symlink_to(real)
    loaded = load_spec(tmp_path / "theirs/run/spec.yaml", need="components")
    with pytest.raises(PluginError, match="--allow-code"):
        run(loaded)
    assert not mark.exists()


def test_a_run_of_ones_own_goes_on_until_its_code_changes(tmp_path: Path, mark: Path) -> None:
    file = code(tmp_path / "a/mine.py", mark)
    run(load_spec(write(tmp_path / "a", "./mine.py:Mine")))
    mark.unlink()
    of_run = stranger(tmp_path / "a/run", f"{file}:Mine")
    sys.modules.pop(run(load_spec(of_run, need="components")).__module__)
    assert run(load_spec(of_run, need="components"))
    assert mark.exists()
    mark.unlink()
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(PluginError, match="--allow-code"):
        run(load_spec(of_run, need="components"))
    assert not mark.exists()


def test_it_is_asked_before_another_interpreter_runs_it(tmp_path: Path, mark: Path) -> None:
    from coatkit.foreign import ForeignExpert

    code(tmp_path / "theirs/mine.py", mark)
    loaded = load_spec(stranger(tmp_path / "theirs", "./mine.py:Mine"), need="components")
    with (
        pytest.raises(PluginError, match="--allow-code"),
        ForeignExpert(Path(sys.executable), loaded.chosen["experts.mine"].component, {}),
    ):
        pass
    assert not mark.exists()


def test_a_cache_that_cannot_be_written_costs_nothing(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "file"))
    code(tmp_path / "a/mine.py", mark)
    run(load_spec(write(tmp_path / "a", "./mine.py:Mine")))
    assert mark.exists()


def test_the_option_is_for_one_command(tmp_path: Path, mark: Path) -> None:
    code(tmp_path / "mine.py", mark)
    path = str(write(tmp_path / "a", "../mine.py:Mine"))
    assert isinstance(CliRunner().invoke(cli, ["check", path]).exception, SpecError)
    assert CliRunner().invoke(cli, ["check", "--allow-code", path]).exit_code == 0
    assert trust.VARIABLE not in os.environ
    assert isinstance(CliRunner().invoke(cli, ["check", path]).exception, SpecError)
    assert not mark.exists()  # checking runs nothing, with the option too


@pytest.mark.parametrize("name", ["train", "plan", "cache", "ask", "view", "eval", "probe", "export", "demo"])
def test_commands_that_run_code_have_the_option(name: str) -> None:
    assert "--allow-code" in CliRunner().invoke(cli, [name, "--help"]).output


def test_a_strangers_run_is_refused_on_the_command_line(tmp_path: Path, mark: Path) -> None:
    """The whole way, in a process of its own: the backbone is the stranger's class."""
    code(tmp_path / "theirs/mine.py", mark)
    path = stranger(tmp_path / "theirs", "audio")
    spec = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**spec, "backbone": {"use": "./mine.py:Mine"}}))
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "sound.wav", np.zeros(16_000, "float32"), 16_000)
    command = [sys.executable, "-m", "coatkit", "ask", str(tmp_path / "theirs"), str(tmp_path / "sound.wav"), "What?"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert "a run folder's code is not run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not mark.exists()
