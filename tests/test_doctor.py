"""`coatkit doctor`: what is wrong is found, named with its remedy, and makes the exit code 1."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from coatkit import checkpoint, doctor, run_folder, store
from coatkit.cli import cli
from coatkit.errors import RunError


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wrong(place: Path | None = None, **options: Any) -> list[str]:
    """What is wrong here, with the remedies; the machine's own state (a full disk, say) is left out."""
    found = [f for f in doctor.examine(place, **options) if f.state == "wrong" and not f.what.startswith("disk ")]
    return [f"{f.what} -> {f.remedy}" for f in found]


def run_of(folder: Path, record: dict[str, Any] | None = None) -> Path:
    step = folder / "checkpoints/step-00000002"
    step.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": run_folder.FORMAT, **(record or {})}))
    (step / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": 2}))
    for name in ("model", "optimizer"):
        save_file({"a": torch.ones(3)}, step / f"{name}.safetensors")
    return folder


def test_it_knows_the_formats_of_the_modules_it_does_not_load() -> None:
    assert (doctor.RUN_FORMAT, doctor.CHECKPOINT_FORMAT) == (run_folder.FORMAT, checkpoint.FORMAT)
    assert store.FORMAT == doctor.STORE_FORMAT


def test_all_is_well_here_without_torch() -> None:
    code = (
        "import sys\nfrom coatkit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    print('code', stopped.code)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=True)
    *_, said, ended, loaded = done.stdout.splitlines()
    assert (said, ended, loaded) == ("nothing is wrong", "code 0", "False False"), done.stdout + done.stderr
    assert f"Python {'.'.join(map(str, sys.version_info[:3]))}" in done.stdout


def test_what_is_wrong_makes_it_fail(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert f"wrong  {tmp_path} is no run folder: it has no run.json\n       -> " in result.output


def test_a_missing_and_an_old_requirement_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.requires
    more = ["no-such-thing>=2", "click>=900", 'never-asked; extra == "x"', "never-asked; python_version < '3'", "???"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: more if name == "coatkit" else real(name))
    first, second = wrong()
    assert first == "coatkit needs no-such-thing>=2, which is missing -> pip install 'no-such-thing>=2'"
    assert second.startswith("coatkit needs click>=900; ")


def test_a_broken_plugin_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from coatkit.plugins import Broken, registry

    monkeypatch.setattr(registry(), "broken", [Broken("bad = bad:x", "coatkit-bad", "1.0", "ImportError: no")])
    assert wrong() == [
        "plugin coatkit-bad 1.0 failed to load: ImportError: no -> pip install --upgrade coatkit-bad, or uninstall it"
    ]


def test_damaged_weights_are_found_by_their_digest(cache_of_its_own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = cache_of_its_own / "assets/mine/weights.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x" * 1000)
    entry = {"source": "https://a", "sha256": hashlib.sha256(b"x" * 1000).hexdigest()}
    lock = cache_of_its_own / "assets.lock"
    lock.write_text(json.dumps({"assets": {"mine/weights.bin": entry, "mine/gone": entry, "../../out": entry}}))
    assert wrong() == []
    weights.write_bytes(b"x" * 999 + b"y")
    (said,) = wrong()
    assert said.endswith(f"its SHA-256 differs -> delete {weights}, then: coatkit fetch mine")
    monkeypatch.setattr(doctor, "_HASHED", 10)
    assert wrong() == []
    assert [f.what for f in doctor.examine() if f.state == "note"][:1] == ["1 more were not read, for they are large"]
    assert len(wrong(everything=True)) == 1
    lock.write_text("[" * 100_000)
    assert wrong() == [f"{lock} is damaged -> delete {lock} and fetch again"]


def test_a_cache_that_cannot_be_written_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "file"))
    assert any("cannot be written" in said and "COATKIT_CACHE=FOLDER" in said for said in wrong())


def test_too_many_threads_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert [said for said in wrong() if "OMP_NUM_THREADS=4096" in said and said.endswith("-> unset OMP_NUM_THREADS")]


def test_a_spec_is_checked_and_its_weights_looked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "spec.yaml"
    path.write_text(
        "name: test\nbackbone: {use: mini}\nexperts: {audio: {}}\ndata: {train: rows.jsonl}\noutput: run\n"
        "stages: [{name: one, steps: 1, lr: 1.0e-3, weights: {audio: 1.0}}]\n"
    )
    missing = wrong(path)
    assert missing
    assert all(said.startswith("weights are missing: mini: ") and f"coatkit fetch {path}" in said for said in missing)
    path.write_text(path.read_text().replace("steps", "stepz"))
    assert any(f"{path}:" in said and "stepz" in said for said in wrong(path))


def test_a_sound_run_is_well(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run")
    assert wrong(folder) == []
    assert any("1 of 1 checkpoints are whole" in finding.what for finding in doctor.examine(folder))


@pytest.mark.parametrize("name", ["model", "optimizer"])
@pytest.mark.parametrize("kept", [0, 5, 20, -1, None])
def test_a_cut_off_checkpoint_is_found(tmp_path: Path, name: str, kept: int | None) -> None:
    folder = run_of(tmp_path / "run")
    file = folder / f"checkpoints/step-00000002/{name}.safetensors"
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept])
    assert any(str(file) in said and "--resume" in said for said in wrong(folder))
    assert any("has no whole checkpoint" in said for said in wrong(folder))


def test_what_a_run_was_made_with_and_is_not_here(tmp_path: Path) -> None:
    from importlib.metadata import version

    made = {
        "environment": {"coatkit": "0.0.1"},
        "components": {
            "backbone": {"use": "x", "from": "coatkit-backbone-gone", "version": "1.0"},
            "experts.a": {"use": "audio", "from": "coatkit", "version": "0.0.1"},
            "experts.b": {"use": "./a.py:A", "from": "/nowhere/a.py", "version": ""},
            "experts.c": ["damaged"],
        },
    }
    folder = run_of(tmp_path / "run", made)
    (said,) = wrong(folder)
    assert said.endswith("is of coatkit-backbone-gone, not installed -> pip install coatkit-backbone-gone")
    notes = [finding.what for finding in doctor.examine(folder) if finding.state == "note"]
    assert any(f"was made by coatkit 0.0.1; this is {version('coatkit')}" in note for note in notes)
    assert any("/nowhere/a.py" in note for note in notes)


@pytest.mark.parametrize(
    ("found", "remedy"),
    [(99, "upgrade coatkit"), (0, "make it anew"), (None, "make it anew"), ("2", "make it anew")],
)
def test_other_formats_are_refused_with_the_remedy(tmp_path: Path, found: object, remedy: str) -> None:
    """Of a run, a checkpoint and a store, where they are opened and by the doctor."""
    folder = run_of(tmp_path / "run")
    state = folder / "checkpoints/step-00000002/state.json"
    about = doctor.cache_dir() / "features/mine/about.json"
    about.parent.mkdir(parents=True)
    places = {folder / "run.json": folder, state: folder, about: None}
    for file, place in places.items():
        before = file.read_text() if file.exists() else None
        file.write_text(json.dumps({"format": found}))
        if file.name == "run.json":
            with pytest.raises(RunError, match=remedy):
                run_folder.RunFolder(folder).read_record()
        elif file.name == "state.json":
            with pytest.raises(RunError, match=remedy):
                checkpoint.load_position(state.parent)
        else:
            with pytest.raises(RunError, match=remedy):
                store.About.read(about.parent)
        assert any(remedy in said or "delete" in said or "train it anew" in said for said in wrong(place))
        if before is None:
            file.unlink()
        else:
            file.write_text(before)
