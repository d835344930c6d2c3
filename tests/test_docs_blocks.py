"""What the documentation shows is run: code, specs, suites, rows and commands, in order within a page.

A copy of the examples stands in for the repository, with a run of the quickstart that has learnt two steps from random
weights where the documents have the trained one. Every command is read by the command line's own parser; those in
`LEFT_OUT` are not run after that, and say why. `make test-docs` runs the slow ones too.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import soundfile
import yaml
from click.testing import CliRunner

from coatkit.cli import cli
from coatkit.data.readers import open_rows
from coatkit.evaluation.suite import read_suite
from coatkit.spec_file import load_spec

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from by_path import module_at

ROOT = Path(__file__).parents[1]
RUN = "examples/quickstart/runs/quickstart"
TINY = ("backbone.weights=random", "backbone.dtype=float32", "stages.0.steps=1", "stages.1.steps=1")
TINY += ("stages.0.warmup_steps=0", "stages.1.warmup_steps=0", "stages.0.batch.rows=2", "stages.1.batch.rows=2")

# Commands that are read and not run: what they begin with, and why.
LEFT_OUT = {
    "ablate": "trains and asks a run for each arm: tests/test_ablate.py",
    "cache spec.yml": "hours of sound, with the study's expert: tests/test_store.py",
    "cache spec.yaml": "asks before it writes: tests/test_store.py",
    "demo": "a server: tests/web/test_demo_page.py",
    "fetch": "loads weights: tests/test_assets.py",
    "latency": "measures: tests/test_latency.py",
    "ask --server": "wants vLLM: make test-vllm",
    "eval RUN --data suite.yaml --judge": "wants a judge: tests/test_judge.py",
    "eval RUN --data rows.jsonl --metric judge": "wants a judge: tests/test_judge.py",
    "eval data/run": "wants the run that is trained there",
    "train align": "hours; its spec is checked",
    "view examples/first/runs": "wants the run that takes minutes",
    "probe RUN": "wants rows with these labels: tests/test_probe.py",
    "export RUN --to model": "writes the whole model: tests/test_export.py",
    "export RUN --to adapter": "writes a model: tests/test_export.py",
    "export examples/paper/runs": "wants the run of 7 B weights",
    "export --to": "writes a model: tests/test_export.py",
    "compare examples/paper/runs": "wants the arms of 7 B weights",
    "report examples/paper/runs": "wants the arms of 7 B weights",
    "report runs/sft": "wants two trained runs: tests/test_report.py",
    "train examples/paper/qwen2-audio.yaml --set stages.0.steps=10": "7 B weights; the tiny one below it is run",
    "train spec.yaml --set backbone.quantize": "wants a GPU: tests/test_qlora.py",
    "train spec.yaml --set cache": "wants the cache of the line above: tests/test_store.py",
    "eval runs/mine": "wants the reader's suite; the same is run in start.md",
    "check examples/paper/qwen2-audio.yaml --set backbone.weights=/models": "a folder of the reader's",
    "plan examples/paper": "counts 8 B parameters: tests/test_plan.py, which also compares what the page prints",
    "new": "writes a package: tests of coatkit new",
    "train spec.yaml --debug-nan": "wants a run with NaN: tests/test_debug_nan.py",
    "probe runs/mini-study": "wants a run of the study: tests/test_probe.py",
    "plugins check": "runs a whole suite: tests of coatkit plugins check",
}
# Other programs: what is known of them. `make`, `pip` and scripts are looked up.
PROGRAMS = {
    "source",
    "export",
    "cd",
    "for",
    "sbatch",
    "accelerate",
    "vllm",
    "lmms_eval",
    "npm",
    "done",
    "mkdir",
    "tar",
    "cmp",
}
# Python that is not run as it stands: where, what is in it, and why. It is compiled.
NOT_RUN = {
    ("README.md", "class Loudness"): "the shape of examples/custom_expert, which tests/test_examples.py trains",
    ("docs/analysis.md", "from mine import Vocoder"): "the reader's decoder: tests/test_view.py",
    ("docs/data.md", "tarfile"): "run in tests/test_formats_docs.py",
    ("docs/serving.md", 'folder, sound = "model"'): "run in tests/test_export.py",
    ("docs/testing.md", "checkpoint_tensor"): "a part of a class; the suites of the plugins are such classes",
    ("docs/add-a-backbone.md", "GLM-ASR as a backbone"): "run by the suite below it",
    ("plugins/coatkit-expert-panns/README.md", "event_logits"): "wants its weights: tests of the plugin",
}


# Blocks that a page tells to save: page, what is in the block, file.
SAVED = [
    ("docs/first-expert.md", "class Timbre(", "examples/first/timbre.py"),
    ("docs/first-expert.md", "name: timbre\nseed", "examples/first/spec.yaml"),
    ("docs/first-expert.md", "class TestTimbre(", "examples/first/test_timbre.py"),
    ("docs/add-a-backbone.md", "class GlmAsr(", "glm_asr.py"),
    ("docs/add-a-backbone.md", "class TestConformance(", "test_glm_asr.py"),
    ("docs/recipes/your-data.md", "name: mine", "spec.yaml"),
]


def tool(name: str) -> Any:
    return module_at(ROOT / f"docs/tools/{name}.py", f"docs_{name}")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, in which language, and what it says."""

    path: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def blocks() -> list[Block]:
    tree = tool("tree")
    found = []
    for path in tree.documents():
        line = 1
        for fenced, part in tree.parts((ROOT / path).read_text(encoding="utf-8")):
            if fenced and (match := re.match(r" *```+(\w*)\n(.*?)\n? *```+ *$", part, re.S)):
                found.append(Block(path, line, match[1], match[2] + "\n"))
            line += part.count("\n")
    return found


BLOCKS = blocks()


def of(language: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == language]


def commands(block: Block) -> list[list[str]]:
    """Lines of a shell block as words, without comments and what is set for them."""
    lines = []
    text = re.sub(r"(^|\s)#.*$", "", block.text.replace("\\\n", " "), flags=re.M)
    for line in text.splitlines():
        for part in re.split(r" && |; ?(?:do |done)?", line):
            words = shlex.split(part.removeprefix("for i in 1 2 3"))
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]) and not words[0].startswith("job="):
                words = words[1:]
            if words:
                lines.append(words)
    return lines


def own(words: list[str]) -> list[str] | None:
    """The arguments of `coatkit`, also where another program starts it; None where none does."""
    for i, word in enumerate(words):
        if word.endswith("bin/coatkit") or (word == "coatkit" and (i == 0 or words[i - 1] == "-m")):
            return words[i + 1 :]
    return None


SHELL = [(block, i, words) for block in BLOCKS if block.language == "sh" for i, words in enumerate(commands(block))]
OURS = [pytest.param(b, a, id=f"{b}-{i}") for b, i, words in SHELL if (a := own(words)) is not None]
OTHERS = [pytest.param(b, words, id=f"{b}-{i}") for b, i, words in SHELL if own(words) is None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, a run where the quickstart's is, and files by the names documents use for the reader's own."""
    root = tmp_path_factory.mktemp("docs")
    for path in sorted((ROOT / "examples").rglob("*")):
        there = root / path.relative_to(ROOT)
        if path.is_file() and "audio" not in path.parts and path.suffix != ".safetensors" and "runs" not in path.parts:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())
    quickstart = root / "examples/quickstart"
    (quickstart / "audio").symlink_to(ROOT / "examples/quickstart/audio")
    (root / "audio").symlink_to(quickstart / "audio")
    for name in ("train", "test", "rows", "heldout"):
        lines = (quickstart / f"{'train' if name == 'train' else 'heldout'}.jsonl").read_text().splitlines()
        (root / f"{name}.jsonl").write_text("\n".join(lines[:12]) + "\n")
        if name == "heldout":
            (quickstart / "heldout.jsonl").write_text("\n".join(lines[:12]) + "\n")  # twelve rows are asked, not 69
    (root / "loudness.py").write_bytes((ROOT / "examples/custom_expert/loudness.py").read_bytes())
    noise = np.random.default_rng(0).normal(scale=0.1, size=8 * 16_000)
    soundfile.write(root / "sound.flac", noise, 16_000)
    (root / "suite.yaml").write_text((quickstart / "suite.yml").read_text().replace("name: heldout\n", "", 1))
    (root / "examples/first").mkdir()
    for page, sign, name in SAVED:
        [text] = [b.text for b in BLOCKS if b.path == page and sign in b.text]
        (root / name).write_text(text)
    done = CliRunner().invoke(cli, ["train", str(quickstart / "spec.yaml"), *(f"--set={change}" for change in TINY)])
    assert done.exit_code == 0, done.output
    (root / "page").write_text("")
    return root


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are read at the root of the repository."""
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place"))


# Commands


@pytest.mark.parametrize(("block", "arguments"), OURS)
def test_a_command_is_one_and_runs(block: Block, arguments: list[str], place: Path) -> None:
    parsed(arguments)
    if why(arguments) is not None:
        return
    if (place / "page").read_text() != block.path:  # a page finds no answers of another's
        shutil.rmtree(place / RUN / "eval", ignore_errors=True)
        (place / "page").write_text(block.path)
    known = [RUN + word.removeprefix("RUN") if word == "RUN" or word.startswith("RUN/") else word for word in arguments]
    if known[0] == "train":
        known += [f"--set={change}" for change in TINY if not any(change.split("=")[0] in word for word in known)]
        if not any("output=" in word for word in known):
            known.append(f"--set=output={place}/out-{len(list(place.glob('out-*')))}")
    elif known[0] == "view" and "--decoder-seconds" not in " ".join(known):
        known += ["--decoder-seconds", "0"]
    elif known[0] == "eval" and "--limit" not in known and "--data" in known:
        known += ["--limit", "2"]
    done = CliRunner().invoke(cli, known)
    assert done.exit_code == 0, f"coatkit {shlex.join(known)}\n{done.output}\n{done.exception}"


def parsed(arguments: list[str]) -> None:
    """Read by the parser of the command, which refuses what it does not know."""
    command: click.Command = cli
    words, context = arguments, click.Context(cli, info_name="coatkit", **cli.context_settings)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    with contextlib.suppress(click.exceptions.Exit):  # what --help and its like end with
        command.make_context("coatkit", [*words], parent=context)  # commands keep the help option of their first parent


def why(arguments: list[str]) -> str | None:
    said = shlex.join(arguments).replace("'", "")
    return next((reason for start, reason in LEFT_OUT.items() if said.startswith(start)), None)


def test_what_is_left_out_is_met() -> None:
    said = [shlex.join(parameter.values[1]).replace("'", "") for parameter in OURS]
    later = {"export --to", "train align"}  # pages that are being written
    assert [start for start in LEFT_OUT if start not in later and not any(s.startswith(start) for s in said)] == []


@pytest.mark.parametrize(
    "arguments", [["train", "spec.yaml", "--resum"], ["trian", "x"], ["eval", "RUN", "--dta", "x"]]
)
def test_a_command_that_is_none_would_be_seen(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parsed(arguments)


@pytest.mark.parametrize(("block", "words"), OTHERS)
def test_other_programs_are_called_with_what_is_there(block: Block, words: list[str]) -> None:
    here = (ROOT / block.path).parent
    program, rest = words[0].removeprefix("job=$("), words[1:]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+)(?= ?.*:)", (ROOT / "Makefile").read_text(), re.M))
        assert rest[0] in targets
    elif program.endswith("pip") or "pip" in rest[:2]:
        names = [name for word in rest for name in re.findall(r"coatkit[\w.-]*(?:\[\w+\])?", word) if "/" not in word]
        for name in names:
            installable(name)
    elif program.endswith("pytest"):
        assert any(word.endswith(".py") for word in rest)
    elif program.endswith("python"):
        script = next((word for word in rest if word.endswith(".py")), None)
        if script is not None:
            assert (ROOT / script).is_file() or (here / script).is_file()
        else:
            assert rest[0] == "-m"
            module = rest[1]
            assert module == "venv" or importlib.util.find_spec(module) is not None
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK)
    else:
        assert program in PROGRAMS, f"{block}: {words}"
    for word in words:
        if word.startswith("examples/") and "/runs" not in word and "first" not in word:
            assert (ROOT / word).exists(), f"{block}: {word}"


def installable(name: str) -> None:
    """A package of ours, with an extra it has."""
    package, _, extra = name.rstrip("]").partition("[")
    folder = ROOT if package == "coatkit" else ROOT / "plugins" / package
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == package
    assert not extra or extra in project["optional-dependencies"]


# Code


@pytest.mark.parametrize("block", of("python"))
def test_python_is_python(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize("path", sorted({block.path for block in BLOCKS if block.language == "python"}))
def test_the_python_of_a_page_runs_in_order(path: str, place: Path) -> None:
    space: dict[str, Any] = {"__name__": "documentation"}
    for block in (block for block in BLOCKS if block.path == path and block.language == "python"):
        if not any(path == where and sign in block.text for where, sign in NOT_RUN):
            exec(compile(block.text, str(block), "exec"), space)


def test_code_that_is_not_run_is_there() -> None:
    for path, sign in NOT_RUN:
        assert any(block.path == path and sign in block.text for block in BLOCKS), (path, sign)


@pytest.mark.parametrize(
    "file", ["examples/first/test_timbre.py", pytest.param("test_glm_asr.py", marks=pytest.mark.slow)]
)
def test_the_suites_that_are_shown_pass(file: str, place: Path) -> None:
    path = place / file
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={place}/suite", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# Files


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_a_spec_a_part_of_one_or_a_suite(block: Block, place: Path) -> None:
    # Two lines for one key show two ways to write it.
    for text in ways(block.text):
        if "!function" in text:
            continue  # lmms-eval's: tests/lmms
        data = yaml.safe_load(text)
        folder = place
        if "extends" in data:
            folder = place / "examples/paper"
            folder = folder if (folder / data["extends"]).is_file() else folder / "arms"
            folder.mkdir(exist_ok=True)
        path = folder / "shown.yaml"
        for name in re.findall(r"[\w/.-]+\.jsonl(?:\.gz)?|corpus/train", text):
            there = folder / name
            there.parent.mkdir(parents=True, exist_ok=True)
            if name == "corpus/train":
                there.mkdir(exist_ok=True)
            elif not there.exists():
                there.write_text("")
        if "tasks" in data:
            path.write_text(text)
            assert read_suite(path).tasks
            continue
        if "base" in data:
            continue  # a study: tests/test_ablate.py
        if "name" not in data:  # a part: over the spec of the reader's own
            data = whole(data)
        elif "timbre" in data.get("experts", {}):
            path = place / "examples/first/spec.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        load_spec(path)


def ways(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    keys = [line.partition(":")[0] for line in lines]
    return lines if len(set(keys)) == 1 and len(keys) > 1 else [text]


def whole(part: dict[str, Any]) -> dict[str, Any]:
    """A spec around a part of one."""
    experts = {"audio": {}, **part.get("experts", {})}
    named = part.get("cache", {})
    listed = named if isinstance(named, list) else named.get("names", [])
    named = [*listed, *(name for stage in part.get("stages", ()) for name in stage["weights"])]
    experts |= {name: {} for name in named if name not in (*experts, "tower")}
    for expert in experts.values():
        if str(expert.get("use", "")).startswith("./loudness"):
            expert["use"] = "./loudness.py:Loudness"
    stage = {"name": "one", "steps": 1, "lr": 1e-3, "weights": dict.fromkeys(experts, 1.0)}
    base = {"name": "part", "backbone": {"use": "mini", "weights": "random"}, "data": {"train": "train.jsonl"}}
    return {**base, "stages": [stage], "output": "runs/part", **part, "experts": experts}


@pytest.mark.parametrize("block", of("toml"))
def test_toml_is_toml(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("block", of("json"))
def test_json_is_rows(block: Block, place: Path) -> None:
    if block.text.startswith('{\n "version": 1') and "..." in block.text:
        return  # a sidecar of a mixture, shortened: tests/test_mixture_command.py
    rows = [json.loads(line) for line in block.text.splitlines() if line.strip()]
    assert rows
    if block.path != "docs/data.md":  # whose rows tests/test_formats_docs.py reads, format by format
        path = place / "shown.jsonl"
        path.write_text(block.text)
        assert [row.messages[-1].role for row in open_rows(path)] == ["assistant"] * len(rows)


def test_every_block_is_of_a_known_language() -> None:
    assert {block.language for block in BLOCKS} <= {"", "text", "python", "sh", "yaml", "toml", "json"}
    assert len(BLOCKS) > 100
