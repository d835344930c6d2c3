"""Runs and stores that earlier releases wrote: they open here and go on, or are refused with the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import coatkit
from coatkit import checkpoint
from coatkit.cli import cli
from coatkit.errors import RunError
from coatkit.spec_file import load_spec
from coatkit.store import Store, verify
from coatkit.trainer import train

OLD = Path(__file__).parent / "data/versions"


def brought_here(name: str, folder: Path) -> Path:
    """A copy of an old project, as it would stand had it been made in `folder`."""
    here = folder / name
    shutil.copytree(OLD / name, here)
    for file in (here / "run/run.json", here / "run/spec.yaml"):
        text = file.read_text()
        assert "HERE/" in text
        file.write_text(text.replace("HERE", str(here.resolve())))
    return here


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return brought_here("format-2", tmp_path)


@pytest.fixture
def oldest(tmp_path: Path) -> Path:
    return brought_here("format-1", tmp_path)


def test_what_an_earlier_release_trained_answers(older: Path) -> None:
    thinker = coatkit.load(older / "run")
    assert isinstance(thinker.ask(older / "clips/r00.wav", "What is heard?", max_new_tokens=4), str)
    learnt = load_file(older / "run/checkpoints/step-00000002/model.safetensors")
    parameters = dict(thinker.backbone.model.named_parameters())
    of_backbone = [name for name in learnt if name.startswith("net.")]
    assert of_backbone
    for name in of_backbone:
        assert torch.equal(parameters[name.removeprefix("net.")].detach(), learnt[name])


def test_what_an_earlier_release_began_goes_on_to_what_it_came_to(older: Path) -> None:
    run = older / "run"
    theirs = load_file(run / "checkpoints/step-00000002/model.safetensors")
    shutil.rmtree(run / "checkpoints/step-00000002")
    train(load_spec(older / "spec.yaml"), resume=True)
    ours = load_file(run / "checkpoints/step-00000002/model.safetensors")
    assert ours.keys() == theirs.keys()
    before = load_file(run / "checkpoints/step-00000001/model.safetensors")
    assert any(not torch.equal(before[name], theirs[name]) for name in theirs)  # the second step learns something
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_features_an_earlier_release_stored_are_read(older: Path) -> None:
    (folder,) = (older / "features").iterdir()
    store = Store(folder)
    assert len(store) == 2
    assert [wrong for _, wrong in verify(folder)] == [""]
    assert all(store.frames(key).isfinite().all() for key in sorted(store.keys()))


def test_a_checkpoint_of_an_older_format_is_refused_with_the_remedy(oldest: Path) -> None:
    with pytest.raises(RunError, match=r"step-00000001: format 1, .* reads format 2; use the coatkit that wrote it"):
        checkpoint.load_position(oldest / "run/checkpoints/step-00000001")


@pytest.mark.parametrize("arguments", [["train", "spec.yaml", "--resume"], ["ask", "run", "clips/r00.wav", "What?"]])
def test_a_run_that_is_too_old_is_refused_with_the_remedy(
    oldest: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(oldest)
    before = {path: path.read_bytes() for path in (oldest / "run").rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, RunError)
    assert "coatkit that wrote it" in str(result.exception) or "start a new run" in str(result.exception)
    after = {path: path.read_bytes() for path in (oldest / "run").rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before  # nothing of it is touched


@pytest.mark.parametrize("place", ["run/run.json", "run/checkpoints/step-00000002/state.json"])
def test_what_a_newer_release_wrote_says_upgrade(older: Path, place: str) -> None:
    file = older / place
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    loaded = load_spec(older / "spec.yaml")
    with pytest.raises(RunError, match=r"format 99, but .* upgrade coatkit"):
        train(loaded, resume=True)


def test_a_store_a_newer_release_wrote_says_upgrade(older: Path) -> None:
    (folder,) = (older / "features").iterdir()
    about = folder / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "format": 99}))
    with pytest.raises(RunError, match=r"format 99, but .* upgrade coatkit"):
        Store(folder)
