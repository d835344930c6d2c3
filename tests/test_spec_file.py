"""Reading a spec: what is accepted, and what every wrong one is told."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from coatkit.errors import SpecError
from coatkit.spec_file import LoadedSpec, load_spec

BASE = """\
name: quick
seed: 17
backbone: {use: mini}
experts:
  audio: {target: consumed}
data: {train: train.jsonl}
stages:
  - {name: one, steps: 10, lr: 1.0e-3, batch: {rows: 2}, weights: {audio: 1.0}}
  - {name: two, steps: 5, lr: 1.0e-3, batch: {tokens: 4096}, weights: {audio: 0.5}}
output: runs/quick
"""

EXPERT_FILE = """\
from coatkit import Expert

raise RuntimeError("the check must not run this")

class Loudness(Expert):
    def __init__(self, floor_db=80.0, *, window=1): ...
    def encode(self, audio): ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "loudness.py").write_text(EXPERT_FILE)
    return tmp_path


def load(folder: Path, text: str | bytes, *overrides: str) -> LoadedSpec:
    file = folder / "spec.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_spec(file, overrides)


def problems(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    """What is wrong, with the spec's own path cut off the front."""
    with pytest.raises(SpecError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return [p.removeprefix(f"{folder / 'spec.yaml'}:") for p in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert BASE.count(old) == 1, old
    return BASE.replace(old, new)


def own(entry: str) -> str:
    """The base spec with one expert of the user's own."""
    return changed("  audio: {target: consumed}", f"  audio: {entry}")


def test_weights_beside_the_spec_begin_with_a_dot(folder: Path) -> None:
    (folder / "models/mine").mkdir(parents=True)
    text = changed("{use: mini}", "{use: mini, weights: models/mine}")
    assert problems(folder, text) == [
        "3: backbone.weights: there is none here, but one beside the spec; write ./models/mine"
    ]


@pytest.mark.parametrize("change", ["thinking=off", "stages.1.weights={}"])
def test_a_control_without_an_expert_has_no_rate_for_its_head(folder: Path, change: str) -> None:
    text = changed("steps: 5, lr: 1.0e-3", "steps: 5, lr: {default: 1.0e-3, heads.audio: 1.0e-4}")
    spec = load(folder, text, change, "stages.0.weights={}").spec
    assert [list(stage.lr) for stage in spec.stages] == [["default"], ["default"]]


def test_a_valid_spec_loads_with_its_components(folder: Path) -> None:
    loaded = load(folder, BASE)
    assert loaded.spec.total_steps == 15
    assert loaded.output == folder / "runs/quick"
    assert set(loaded.chosen) == {"backbone", "experts.audio", "heads.audio"}
    assert loaded.chosen["backbone"].component.distribution == "coatkit-backbone-mini"
    assert loaded.chosen["heads.audio"].options == {"heads": 8, "feedforward": 4.0, "dropout": 0.0}
    assert loaded.notes == []


# Each: what is replaced, by what, and the start and further parts of the one problem named.
WRONG = {
    "unknown key": ("seed: 17", "sede: 17", "2: sede: unknown key", "did you mean 'seed'?"),
    "unknown key, nothing near": ("seed: 17", "zzz: 17", "2: zzz: unknown key", "known: name, seed, backbone"),
    "unknown nested key": ("steps: 10,", "steps: 10, q: 2,", "8: stages.0.q: unknown key", "known: name, steps"),
    "missing": ("name: quick\n", "", "1: name: missing", "required"),
    "missing in a stage": ("steps: 10, ", "", "8: stages.0.steps: missing"),
    "type": ("steps: 10", "steps: ten", "8: stages.0.steps:", "integer", "(got 'ten')"),
    "range": ("steps: 10", "steps: 0", "8: stages.0.steps:", "greater than or equal to 1", "(got 0)"),
    "infinite weight": ("audio: 1.0}", "audio: .inf}", "8: stages.0.weights.audio:", "finite"),
    "negative weight": ("audio: 1.0}", "audio: -1}", "8: stages.0.weights.audio:", "greater than or equal to 0"),
    "name": ("name: quick", "name: a/b", "1: name: 'a/b' may hold only the characters A-Za-z0-9._-"),
    "backbone as text": ("{use: mini}", "mini", "3: backbone: expected keys (use)", "write {use: mini}"),
    "experts as a list": ("  audio: {target: consumed}", "  - audio", "4: experts: expected keys", "found ['audio']"),
    "expert as a number": ("{target: consumed}", "3", "5: experts.audio: expected keys (use, head)", "found 3"),
    "stages as a mapping": ("stages:\n", "stages: []\nstagez:\n", "7: stages: list should have at least 1 item"),
    "rows and tokens": ("{rows: 2}", "{rows: 2, tokens: 9}", "8: stages.0.batch: give either rows or tokens"),
    "neither": ("{rows: 2}", "{}", "8: stages.0.batch: give either rows or tokens"),
    "accumulate": ("{rows: 2}", "{rows: 2, accumulate: 3}", "8: stages.0.batch: accumulate: 3 is more than rows: 2"),
    "lr without default": (
        "steps: 10, lr: 1.0e-3",
        "steps: 10, lr: {lora: 1.0e-3}",
        "8: stages.0.lr: needs a 'default' rate",
    ),
    "lr part": (
        "steps: 10, lr: 1.0e-3",
        "steps: 10, lr: {default: 1.0e-3, lora: x}",
        "8: stages.0.lr.lora:",
        "number",
        "(got 'x')",
    ),
    "thinking key": (
        "seed: 17",
        "thinking: {placment: before_header}",
        "2: thinking.placment: unknown key; did you mean 'placement'?",
    ),
    "thinking value": (
        "seed: 17",
        "thinking: {placement: before_heder}",
        "2: thinking.placement: 'before_heder' is not one of response_prefix, before_header",
        "did you mean 'before_header'?",
    ),
    "thinking on": ("seed: 17", "thinking: on", "2: thinking: expected keys (placement, tokens_per_audio_token)"),
    "seed": ("seed: 17", "seed: -1", "2: seed:", "greater than or equal to 0"),
    "NUL in a path": ("train.jsonl", '"a\\0b"', "6: data.train: holds a NUL character"),
    "half a surrogate": ("train.jsonl", '"\\ud800"', "6: data.train:", "unicode"),
    "no data file": ("train.jsonl", "gone.jsonl", "6: data.train: there is no file ", "/gone.jsonl"),
    "an impossible file name": ("train.jsonl", "x" * 5000, "6: data.train: there is no file "),
    "stage's data": ("name: one,", "name: one, train: gone.jsonl,", "8: stages.0.train: there is no file "),
    "heldout": ("train.jsonl}", "train.jsonl, heldout: gone.jsonl}", "6: data.heldout: there is no file "),
    "unknown expert in weights": (
        "{audio: 1.0}",
        "{audoi: 1.0}",
        "8: stages.0.weights.audoi: no expert of this name; did you mean 'audio'?",
    ),
    "rate of an unknown part": (
        "steps: 10, lr: 1.0e-3",
        "steps: 10, lr: {default: 1.0e-3, projektor: 1.0e-4}",
        "8: stages.0.lr.projektor: no part of this name; did you mean 'projector'?",
    ),
    "rate of an unknown head": (
        "steps: 10, lr: 1.0e-3",
        "steps: 10, lr: {default: 1.0e-3, heads.audoi: 1.0e-4}",
        "8: stages.0.lr.heads.audoi: no part of this name; did you mean 'heads.audio'?",
    ),
    "no weights": ("{use: mini}", "{use: mini, weights: ./gone}", "3: backbone.weights: there is no file or folder /"),
    "nothing to learn": ("{audio: 1.0}", "{}, ce_weight: 0", "8: stages.0: nothing to learn"),
    "warm-up longer than the stage": (
        "steps: 10",
        "steps: 10, warmup_steps: 11",
        "8: stages.0.warmup_steps: more than the stage's 10 steps",
    ),
    "stage name twice": ("name: two", "name: one", "9: stages.1.name: 'one' is taken by an earlier stage"),
    "unknown backbone": (
        "use: mini",
        "use: mimi",
        "3: backbone.use: no backbone named 'mimi' is installed",
        "did you mean 'mini'?",
        "pip install coatkit-backbone-mimi",
    ),
    "unknown head": (
        "seed: 17",
        "head: {use: linaer}",
        "2: head.use: no head named 'linaer' is installed",
        "did you mean 'linear'?",
    ),
    "option of a plugin": (
        "target: consumed",
        "tarket: consumed",
        "5: experts.audio.tarket: unknown key; did you mean 'target'?",
    ),
    "value of a plugin's option": (
        "target: consumed",
        "target: consume",
        "5: experts.audio.target: 'consume' is not one of consumed, tower",
        "did you mean 'consumed'?",
    ),
    "nested option of a plugin": (
        "use: mini",
        "use: mini, lora: {rnk: 8}",
        "3: backbone.lora.rnk: unknown key; did you mean 'rank'?",
    ),
    "option of the default head": (
        "seed: 17",
        "head: {use: transformer, hds: 2}",
        "2: head.hds: unknown key; did you mean 'heads'?",
    ),
    "option of an expert's head": (
        "target: consumed",
        "target: consumed, head: {use: transformer, heads: 0}",
        "5: experts.audio.head.heads:",
        "greater than or equal to 1",
    ),
    "number as key": ("{audio: 1.0}", "{1: 1.0}", "8: stages.0.weights.1: keys must be text; write this one in quotes"),
    "list as key": ("seed: 17", "? [a]\n: 1", "2: a key: keys must be text"),
    "date": ("name: quick", "name: 2026-01-02", "1: name: only text, numbers", "a date goes in quotes"),
    "bytes in an option": (
        "{target: consumed}",
        "{use: './loudness.py:Loudness', floor_db: !!binary 'gA=='}",
        "5: experts.audio.floor_db: only text",
    ),
    "duplicate key": ("seed: 17", "seed: 17\nname: other", "3: name: given twice, first on line 1"),
    "nested duplicate": ("{rows: 2}", "{rows: 2, rows: 3}", "8: stages.0.batch.rows: given twice, first on line 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_wrong_spec_is_told(folder: Path, case: str) -> None:
    old, new, start, *parts = WRONG[case]
    found = [p for p in problems(folder, changed(old, new)) if p.startswith(start)]
    assert len(found) == 1, problems(folder, changed(old, new))
    for part in parts:
        assert part in found[0]


def test_an_unknown_expert_is_named_with_the_nearest_and_the_package(folder: Path) -> None:
    text = changed("  audio: {target: consumed}", "  audio:\n  adio:")
    [problem] = problems(folder, text)
    assert problem.startswith("6: experts.adio: no expert named 'adio' is installed")
    assert "did you mean 'audio'?" in problem
    assert "pip install coatkit-expert-adio" in problem


def test_no_package_is_suggested_for_what_cannot_be_one(folder: Path) -> None:
    [problem] = problems(folder, own("{use: 'a b; rm'}"))
    assert "no expert named 'a b; rm' is installed" in problem
    assert "pip install" not in problem


def test_problems_of_one_kind_are_told_together(folder: Path) -> None:
    text = changed("steps: 10", "steps: 0").replace("tokens: 4096", "tokenz: 4096").replace("seed: 17", "seed: x")
    found = problems(folder, text)
    assert [p.split(": ")[1] for p in found] == ["seed", "stages.0.steps", "stages.1.batch.tokenz"]


def test_problems_of_components_files_and_stages_are_told_together(folder: Path) -> None:
    text = changed("use: mini", "use: mimi").replace("target: consumed", "target: x").replace("name: two", "name: one")
    found = problems(folder, text.replace("train.jsonl", "gone.jsonl"))
    assert [p.split(": ")[1] for p in found] == [
        "backbone.use",
        "experts.audio.target",
        "data.train",
        "stages.1.name",
    ]


def test_a_wrong_default_head_is_one_problem_however_many_experts_use_it(folder: Path) -> None:
    text = changed("  audio: {target: consumed}", "  audio:\n  other: {use: audio}") + "head: {use: gone}\n"
    assert len(problems(folder, text)) == 1


@pytest.mark.parametrize("off", ["off", '"off"', "no", "null"])
def test_thinking_off(folder: Path, off: str) -> None:
    text = changed("weights: {audio: 1.0}", "weights: {}").replace(", weights: {audio: 0.5}", "")
    loaded = load(folder, text + f"thinking: {off}\n")
    assert loaded.spec.thinking is None
    assert loaded.resolved()["thinking"] == "off"


def test_thinking_off_alone_gives_the_control_without_experts(folder: Path) -> None:
    loaded = load(folder, BASE, "thinking=off")
    assert loaded.spec.experts == {}
    assert list(loaded.chosen) == ["backbone"]
    assert [stage.active for stage in loaded.spec.stages] == [[], []]
    assert any("thinking is off" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "expected keys (name, backbone, data, stages, ...), found None"),
        (b"- a\n- b\n", "expected keys (name, backbone, data, stages, ...), found ['a', 'b']"),
        (b"hello", "expected keys (name, backbone, data, stages, ...), found 'hello'"),
        (b"a: [1\nb: 2\n", "2: not valid YAML: expected ',' or ']'"),
        (b"a:\n\tb: 1\n", "2: not valid YAML"),
        (b"a: 1\n---\nb: 1\n", "2: not valid YAML"),
        (b"a: \0\n", "not valid YAML"),
        (b"name: 2020-13-45\n", "1: name: only text, numbers, true, false, null, lists and keys with values"),
        (b"name: 9" + b"9" * 5000, "not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "1: name: only text, numbers"),
        ("name: café\n".encode("latin-1"), "not UTF-8 text (byte 9)"),
        (b"a: &a [*a]\n", "too large or too deeply nested for a spec"),
        (b"[" * 500 + b"]" * 500, "not valid YAML"),
        (b"[" * 60 + b"]" * 60, "too large or too deeply nested for a spec"),
        (b"name: " + b"x" * (1 << 18), "larger than 256 KiB"),
    ],
)
def test_files_that_are_no_spec(folder: Path, text: bytes, said: str) -> None:
    [problem] = problems(folder, text)
    assert problem.lstrip().startswith(said)


@pytest.mark.parametrize(
    "level",
    [
        "[" + ", ".join(["*{below}"] * 9) + "]",  # each level names the one below nine times
        "{{" + ", ".join(["z: *{below}"] * 9) + "}}",  # as duplicate keys, which one place in the file
        "{{<<: [" + ", ".join(["*{below}"] * 9) + "]}}",  # as merges
    ],
)
def test_alias_bombs_are_refused_quickly(folder: Path, level: str) -> None:
    lines = ["k0: &k0 {x: 1}", *(f"k{i}: &k{i} {level.format(below=f'k{i - 1}')}" for i in range(1, 15))]
    found = problems(folder, "\n".join(lines))
    assert found[0].strip() == "too large or too deeply nested for a spec"


def test_a_pipe_is_not_waited_for_and_a_device_not_read(tmp_path: Path) -> None:
    pipe, zero = tmp_path / "spec.yaml", tmp_path / "zero.yaml"
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    for path in (pipe, zero):
        with pytest.raises(SpecError, match=f"{path.name}: cannot be read: Not a regular file"):
            load_spec(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "gone.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SpecError, match=f"{path}: cannot be read: {said}"):
            load_spec(path)


def test_a_byte_order_mark_and_windows_lines_are_read(folder: Path) -> None:
    assert load(folder, b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()).spec.name == "quick"


def test_a_merge_key_is_ordinary_yaml(folder: Path) -> None:
    text = changed(
        "- {name: two, steps: 5, lr: 1.0e-3, batch: {tokens: 4096}, weights: {audio: 0.5}}",
        "- {<<: *one, name: two}",
    ).replace("- {name: one,", "- &one {name: one,")
    assert [s.steps for s in load(folder, text).spec.stages] == [10, 10]


# --set


def test_overrides_apply_in_order_and_into_lists(folder: Path) -> None:
    loaded = load(folder, BASE, "stages.1.steps=20", "name=a", "name=b", "stages.0.batch={tokens: 5}")
    assert (loaded.spec.name, loaded.spec.stages[1].steps, loaded.spec.stages[0].batch.tokens) == ("b", 20, 5)


def test_an_override_may_make_sections_that_were_not_there(folder: Path) -> None:
    loaded = load(folder, BASE, "thinking.placement=before_header", "backbone.lora.rank=4", "optimizer.eps=1e-6")
    assert loaded.spec.thinking is not None
    assert loaded.spec.thinking.placement == "before_header"
    assert loaded.chosen["backbone"].options["lora"]["rank"] == 4


def test_an_override_may_fill_an_empty_entry(folder: Path) -> None:
    loaded = load(folder, own(""), "experts.audio.target=tower")
    assert loaded.chosen["experts.audio"].options["target"] == "tower"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed"], "--set seed: expected key.path=value, e.g. --set stages.0.steps=20"),
        (["=3"], "--set =3: expected key.path=value"),
        (["a..b=3"], "--set a..b=3: expected key.path=value"),
        (["seed=["], "--set seed=[: '[' is not valid YAML"),
        (["seed=2020-13-45"], "--set seed=2020-13-45: '2020-13-45' is not valid YAML"),
        (["name=2026-01-02"], "--set name=2026-01-02: only text, numbers, true, false, null"),
        (["head={1: 2}"], "--set head={1: 2}: only text"),
        (["seed=" + "[" * 3000], "--set seed=[[["),
        (
            ["seed=!!python/name:os.system"],
            "--set seed=!!python/name:os.system: '!!python/name:os.system' is not valid",
        ),
        (["stages.2.steps=1"], "--set stages.2.steps=1: there is no stages.2; stages has 2, counted from 0"),
        (["stages.-1.steps=1"], "--set stages.-1.steps=1: there is no stages.-1"),
        (["stages.steps=1"], "--set stages.steps=1: there is no stages.steps"),
        (["stages.2={}"], "--set stages.2={}: there is no stages.2"),
        ([f"stages.{'9' * 5000}=1"], "--set stages.999"),
        (["name.x=1"], "--set name.x=1: there is no name.x"),
        (["²=1"], "--set ²=1: ²: unknown key"),
        (["stages.0.stepz=1"], "--set stages.0.stepz=1: stages.0.stepz: unknown key; did you mean 'steps'?"),
        (["stages.0.steps=0"], "--set stages.0.steps=0: stages.0.steps: input should be greater"),
        (["head.use=linaer"], "--set head.use=linaer: head.use: no head named 'linaer'"),
        (["head.hds=3"], "--set head.hds=3: head.hds: unknown key; did you mean 'heads'?"),
        (["thinking={placement: x}"], "--set thinking={placement: x}: thinking.placement: 'x' is not one of"),
        (["optimizer.x=1"], "--set optimizer.x=1: optimizer.x: unknown key"),
        (["head.use=linear", "head={use: linaer}"], "--set head={use: linaer}: head: no head named 'linaer'"),
        (["head.hds=1", "head={hdz: 1}"], "--set head={hdz: 1}: head.hdz: unknown key"),
        (["data.train=gone.jsonl"], "--set data.train=gone.jsonl: data.train: there is no file"),
        (["experts.audio.target=x"], "--set experts.audio.target=x: experts.audio.target: 'x' is not one of"),
        (["name=ok", "name=not/ok"], "--set name=not/ok: name: "),
    ],
)
def test_a_wrong_override_is_named_as_the_origin(folder: Path, overrides: list[str], said: str) -> None:
    [problem] = problems(folder, BASE, *overrides)
    assert problem.startswith(said)


def test_a_problem_beside_an_override_keeps_its_own_line(folder: Path) -> None:
    found = problems(folder, changed("lr: 1.0e-3, batch: {rows: 2}", "lr: fast, batch: {rows: 2}"), "stages.0.steps=3")
    assert found[0].startswith("8: stages.0.lr.default:")


# Classes of the user's own


def test_a_users_file_is_checked_without_being_run(folder: Path) -> None:
    loaded = load(folder, own("{use: './loudness.py:Loudness', floor_db: 60, window: 2}"))
    component = loaded.chosen["experts.audio"].component
    assert component.target == f"{folder / 'loudness.py'}:Loudness"
    assert component.manifest is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            "{use: './loudness.py:Loudness', floor_bd: 6}",
            ".floor_bd: unknown option of ./loudness.py:Loudness; did you",
        ),
        ("{use: './loudness.py:Loudnes'}", ".use: ./loudness.py:Loudnes: {folder}/loudness.py defines no class"),
        ("{use: './loudness.py:Other'}", "defines no class 'Other'; classes there: Expert, Loudness"),
        ("{use: './gone.py:Loudness'}", ".use: ./gone.py:Loudness: there is no file {folder}/gone.py"),
        ("{use: './loudness.py'}", ".use: ./loudness.py: name the class in the file too: use: ./loudness.py:Class"),
        ("{use: 'no_such_module:Thing'}", ".use: no_such_module:Thing: there is no module 'no_such_module'"),
        ("{use: ':Thing'}", ".use: :Thing: there is no module ''"),
        ("{use: 'json:Nope'}", "defines no class 'Nope'"),
        ("{use: './syntax.py:Mine'}", "syntax.py:1: not valid Python"),
        ("{use: './deep.py:Mine'}", "deep.py: cannot be read as Python"),
        ("{use: './nul.py:Mine'}", "nul.py"),
        ("{use: ''}", ".use: string should have at least 1 character"),
    ],
)
def test_what_a_wrong_use_is_told(folder: Path, entry: str, said: str) -> None:
    (folder / "syntax.py").write_text("class Mine(:\n")
    (folder / "deep.py").write_text("x = " + "+".join(["1"] * 20_000) + "\nclass Mine: ...\n")
    (folder / "nul.py").write_bytes(b"class Mine: ...\n\0")
    [problem] = problems(folder, own(entry))
    assert problem.startswith("5: experts.audio")
    assert said.format(folder=folder) in problem


def test_the_running_program_is_no_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as under the `coatkit` script
    [problem] = problems(folder, own("{use: '__main__:Thing'}"))
    assert "there is no module '__main__'" in problem


@pytest.mark.parametrize(
    "source",
    [
        "class Mine(Base):\n    pass\n",  # options unknown: another class may take them
        "@dataclass\nclass Mine(Expert):\n    level: float = 1\n",
        "class Mine(Expert):\n    def __init__(self, /, level): ...\n",
        "class Mine(Expert):\n    def __init__(self, **kwargs): ...\n",
        "try:\n    import x\nexcept ImportError:\n    class Mine(Expert):\n        def __init__(self, level): ...\n",
        "from elsewhere import Mine\n",
        "from elsewhere import *\n",
        "Mine = make()\n",
        "def __getattr__(name): ...\n",
        "# -*- coding: latin-1 -*-\n# \xe9\nclass Mine(Expert):\n    def __init__(self, level): ...\n",
        "\ufeffclass Mine(Expert):\n    def __init__(self, level): ...\n",
    ],
)
def test_ways_to_write_a_class_that_takes_the_option(folder: Path, source: str) -> None:
    (folder / "mine.py").write_bytes(source.encode("utf-8" if source.startswith("\ufeff") else "latin-1"))
    assert load(folder, own("{use: './mine.py:Mine', level: 2}")).chosen["experts.audio"].options == {"level": 2}


def test_an_expert_without_an_init_takes_no_options(folder: Path) -> None:
    (folder / "mine.py").write_text("import coatkit\nclass Mine(coatkit.Expert):\n    dim = 1\n")
    [problem] = problems(folder, own("{use: './mine.py:Mine', level: 2}"))
    assert problem == "5: experts.audio.level: unknown option of ./mine.py:Mine"


# The resolved spec, which a run folder keeps

RICH = """\
name: rich
backbone: {use: mini, weights: random, lora: {rank: 4}, train: {lm: none}}
thinking: {placement: before_header, tokens_per_audio_token: 0.5}
experts:
  audio:
  loud: {use: "./loudness.py:Loudness", floor_db: 60, head: {use: linear}}
  again: {use: audio, target: tower, head: {use: "./heads/mine.py:MyHead", width: 3}}
head: {use: transformer, heads: 2}
data: {train: train.jsonl, heldout: held/out.jsonl, on_bad_row: quarantine}
stages:
  - {name: one, steps: 10, lr: {default: 1.0e-3, heads: 2.0e-3}, train: held/out.jsonl, weights: {audio: 1, loud: 2}}
  - {name: two, steps: 5, lr: 1e-4, schedule: cosine, warmup_steps: 2, batch: {tokens: 99}, weights: {again: 0.1}}
output: runs/rich
"""


@pytest.mark.parametrize(
    "text", [BASE, RICH, BASE.replace(", weights: {audio: 1.0}", "").replace("audio: 0.5", "") + "thinking: off\n"]
)
def test_a_resolved_spec_means_the_same_from_anywhere(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_ALLOW_CODE", "1")  # from anywhere: the code then lies outside the spec's folder
    for name in ("held", "heads"):
        (folder / name).mkdir()
    (folder / "held/out.jsonl").write_text("{}\n")
    (folder / "heads/mine.py").write_text("class MyHead(Head):\n    def __init__(self, hidden_size, dim, width): ...\n")
    first = load(folder, text)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "spec.yaml"
    elsewhere.write_text(yaml.safe_dump(first.resolved(), sort_keys=False))
    second = load_spec(elsewhere)
    assert second.resolved() == first.resolved()
    assert second.output == first.output
    for place, chosen in first.chosen.items():
        assert second.chosen[place].component.target == chosen.component.target
        assert second.chosen[place].options == chosen.options
    assert [(s.active, s.lr) for s in second.spec.stages] == [(s.active, s.lr) for s in first.spec.stages]


def test_defaults_are_written_out_in_the_resolved_spec(folder: Path) -> None:
    resolved = load(folder, BASE).resolved()
    assert resolved["data"]["train"]["path"] == str(folder / "train.jsonl")
    assert resolved["experts"]["audio"]["head"] == {
        "use": "transformer",
        "heads": 8,
        "feedforward": 4.0,
        "dropout": 0.0,
    }
    assert resolved["stages"][0]["lr"] == {"default": 1e-3}
    assert resolved["backbone"]["lora"]["rank"] == 16


def test_paths_may_begin_with_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    loaded = load(folder, changed("train.jsonl", "~/train.jsonl").replace("runs/quick", "~/runs"))
    assert loaded.output == folder / "runs"


def test_data_need_not_be_there_to_answer_from_a_run(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "spec.yaml").write_text(BASE)
    assert load_spec(folder / "spec.yaml", need="components").spec.name == "quick"
    with pytest.raises(SpecError, match="there is no file"):
        load_spec(folder / "spec.yaml")


def test_an_expert_of_no_stage_is_noted(folder: Path) -> None:
    loaded = load(folder, changed("  audio: {target: consumed}", "  audio:\n  idle: {use: audio}"))
    assert loaded.notes == ["expert 'idle' is active in no stage, so it is not loaded"]
    assert "idle" not in loaded.spec.experts
    assert not any("idle" in place for place in loaded.chosen)


def test_a_weights_path_is_relative_to_the_spec(folder: Path) -> None:
    (folder / "mine").mkdir()
    spec = load(folder, BASE, "backbone.weights=./mine")
    assert spec.chosen["backbone"].options["weights"] == str(folder / "mine")
    assert spec.resolved()["backbone"]["weights"] == str(folder / "mine")
