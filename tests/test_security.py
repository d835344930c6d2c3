"""What docs/security.md promises of the code as a whole: no way from data to code, and no secret in what is written."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coatkit.errors import RunError

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "coatkit").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")])
CANARIES = {
    "HF_TOKEN": "hf_canary0000000000000000000000000000",
    "OPENAI_API_KEY": "sk-canary-1111111111111111",
    "AWS_SECRET_ACCESS_KEY": "canary/2222222222",
    "HTTPS_PROXY": "http://me:canary3333@localhost:9",
}

LOADS = {
    "pickle.load": {},
    "pickle.Unpickler": {},
    "marshal.loads": {},
    "joblib.load": {},
    "yaml.load": {},
    "yaml.unsafe_load": {},
    "yaml.full_load": {},
    "os.system": {},
    "os.popen": {},
    "tempfile.mktemp": {},
    "shutil.unpack_archive": {},
    "eval": {},
    "exec": {},
    "torch.load": {"weights_only": True},
    "numpy.load": {"allow_pickle": False},
    "np.load": {"allow_pickle": False},
}
"""Calls, and the arguments that they are allowed with; none is never."""


def unsafe(source: str) -> list[str]:
    """Calls in a source that could turn data into code, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"{node.value.lineno}: trust_remote_code")
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"{node.lineno}: trust_remote_code")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if given.get("shell") or name.rpartition(".")[2] in ("extractall", "extract"):
            found.append(f"{node.lineno}: {name}")
        needed = LOADS.get(name)
        if needed is not None and (not needed or any(given.get(key) is not value for key, value in needed.items())):
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_turns_data_into_code(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "yaml.load(f, Loader=L)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "tar.extractall()",
        "A.from_pretrained(x, trust_remote_code=True)",
        "A.from_pretrained(x, **{'trust_remote_code': yes})",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert len(unsafe(line)) == 1


def test_what_is_written_and_said_holds_no_secret(project: Any, tmp_path: Path) -> None:
    """Everything that training, a look at the environment, and failures write: run folder, cache, output."""
    cache = tmp_path / "cache"
    env = {**os.environ, **CANARIES, "COATKIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    spec = str(project.write())
    said = ""
    for words in (
        ["train", spec, "--set", "stages.0.steps=1", "--set", "stages.1.steps=1"],
        ["doctor", spec],
        ["train", spec],  # it is there already
        ["ask", "--server", "http://127.0.0.1:9", str(project.folder / "clips/r00.wav"), "What?"],
        ["ask", "--server", "http://me:canary4444@host/v1", str(project.folder / "clips/r00.wav"), "What?"],
    ):
        done = subprocess.run([sys.executable, "-m", "coatkit", *words], capture_output=True, text=True, env=env)
        said += done.stdout + done.stderr
    assert (project.folder / "run/run.json").exists(), said
    assert "holds a run already" in said
    written = [p for folder in (project.folder, cache) for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 20
    for path in written:
        assert b"canary" not in path.read_bytes(), path
    assert "canary" not in said


def test_a_password_in_a_servers_address_is_not_repeated(tmp_path: Path, sound: Any) -> None:
    import soundfile

    from coatkit.serving import ask_server

    soundfile.write(tmp_path / "a.wav", sound(0.5), 16_000)
    with pytest.raises(RunError) as caught:
        ask_server("http://me:canary@host:80/v1", tmp_path / "a.wav", "What?")
    assert "canary" not in str(caught.value)
    assert "//...@host" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("MIT", ""),
        ("Apache-2.0 AND CC-BY-4.0", ""),
        ("CC-BY-NC-4.0", "forbids commercial use"),
        ("MIT AND CC-BY-NC-SA-4.0", "forbids commercial use"),
        ("Free for non-commercial use", "forbids commercial use"),
        ("", "no licence in its metadata"),
        ("Permission", "not known"),
    ],
)
def test_licences_that_are_refused_or_unknown_are_named(said: str, wrong: str) -> None:
    namespace = runpy.run_path(str(ROOT / "docs/tools/licences.py"))
    found = list(namespace["problems"]({"a": ("1", said)}))
    assert bool(found) == bool(wrong)
    assert wrong in "".join(found)


def test_everything_installed_has_a_licence_we_know() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/tools/licences.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") > 40
