"""The schema says what `coatkit check` says, where a schema can; and `explain` tells every key of it."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from coatkit import cli, plugins
from coatkit.errors import SpecError
from coatkit.explain import explain, paths
from coatkit.manifest import Manifest
from coatkit.plugins import Installed, Registry
from coatkit.schema import FILES, components, schema
from coatkit.spec import Spec

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
COMMENT = "# yaml-language-server: $schema="
OURS = {path.name for path in (ROOT / "plugins").iterdir()} | {"coatkit"}

SPEC = """\
name: one
backbone: {use: mini, lora: {rank: 8}, projector: random}
thinking: {placement: before_header}
experts:
  audio: {target: tower}
  panns:
  music: {use: mert, layers: [3, 6], head: {use: linear}}
  mine: {use: "./mine.py:Mine", anything: {at: all}}
head: {use: transformer, heads: 4}
data: {train: train.jsonl, heldout: {path: held.jsonl, filter: {language: en, where: {kind: [a, null], n: 3}}}}
cache: [audio, tower]
stages:
  - {name: a, steps: 3, lr: 1.0e-3, batch: {tokens: 512}, weights: {audio: 1, panns: 0.5}}
  - {name: b, steps: 3, lr: {default: 1.0e-3, heads.music: 2.0e-3}, train: {path: b.jsonl}}
output: runs/one
"""


@pytest.fixture(autouse=True, scope="module")
def only_this_repositorys_plugins() -> None:
    """What somebody has installed beside it must not change what is compared."""
    found = plugins.registry()
    for key, offers in list(found.installed.items()):
        found.installed[key] = [offer for offer in offers if offer.distribution in OURS]
        if not found.installed[key]:
            del found.installed[key]


def problems(data: Any, of: str = "spec") -> list[str]:
    """Dotted places of what is wrong, as an editor would underline it."""
    validator = jsonschema.Draft7Validator(schema(of))
    found = set()
    for error in validator.iter_errors(data):
        deepest = jsonschema.exceptions.best_match([error])
        assert deepest is not None
        found.add(".".join(map(str, deepest.absolute_path)))
    return sorted(found)


def changed(path: str, value: Any) -> Any:
    """The spec above with one key set."""
    data = yaml.safe_load(SPEC)
    *way, last = path.split(".")
    at = data
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[int(last) if isinstance(at, list) else last] = value
    return data


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# The schema itself


@pytest.mark.parametrize("of", FILES)
def test_it_is_a_schema_whose_references_lead_somewhere(of: str) -> None:
    found = schema(of)
    jsonschema.Draft7Validator.check_schema(found)
    text = json.dumps(found)
    for name in {part.partition('"')[0] for part in text.split('"#/$defs/')[1:]}:
        assert name in found["$defs"]


@pytest.mark.parametrize(("of", "name"), [("spec", "coatkit"), ("suite", "suite"), ("ablation", "ablation")])
def test_the_committed_ones_are_current(of: str, name: str) -> None:
    path = EXAMPLES / f"{name}.schema.json"
    assert written(path) == schema(of), f"run: coatkit schema {of} --output {path.relative_to(ROOT)}"


def test_every_option_of_every_plugin_is_in_it_and_described() -> None:
    defs = schema()["$defs"]
    count = 0
    for installed in plugins.all_manifests():
        m = installed.manifest
        component = plugins.Component(m.kind, m.name, m.target, m, installed.distribution)
        model = component.options_model()
        assert model is not None
        for name, field in model.model_fields.items():
            assert field.description, f"{m.name}: {name} has no description"
            assert defs[f"{m.kind}.{m.name}"]["properties"][name]["description"] == field.description
            count += 1
    assert count > 30


@pytest.mark.parametrize("of", FILES)
def test_every_key_is_described(of: str) -> None:
    def look(node: Any, at: str) -> None:
        if isinstance(node, dict):
            for name, inner in node.get("properties", {}).items() if "if" not in at.split("/")[-1:] else ():
                assert inner.get("description"), f"{at}/{name}"
            for key, inner in node.items():
                look(inner, f"{at}/{key}")
        elif isinstance(node, list):
            for inner in node:
                look(inner, at)

    look(schema(of), "")


def test_it_follows_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Registry(copy.copy(plugins.registry().installed))
    found.installed["expert", "new"] = [Installed(Manifest("expert", "new", "a:B", summary="hears"), "other", "1")]
    found.installed["expert", "ill"] = [Installed(Manifest("expert", "ill", "a:B", options="nowhere:A"), "other", "1")]
    del found.installed["expert", "mert"]
    for module in ("coatkit.plugins", "coatkit.schema"):
        monkeypatch.setattr(f"{module}.registry", lambda: found)
    assert components("expert")["new"] is None
    assert problems(changed("experts.new", {"whatever": 3})) == ["experts.music.use"]
    assert problems(changed("experts.ill", {"whatever": 3})) == ["experts.music.use"]


# Specs against it


def documents() -> list[Path]:
    found = [*EXAMPLES.rglob("*.yaml"), *EXAMPLES.rglob("*.yml")]
    return sorted(p for p in found if "runs" not in p.parts and p.read_text(encoding="utf-8").startswith(COMMENT))


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_every_example_names_its_schema_and_fits(path: Path) -> None:
    named = path.read_text(encoding="utf-8").splitlines()[0].removeprefix(COMMENT)
    at = Path(os.path.normpath(path.parent / named))
    of = "spec" if at.name == "coatkit.schema.json" else at.name.removesuffix(".schema.json")
    assert at.parent == EXAMPLES
    assert problems(yaml.safe_load(path.read_text(encoding="utf-8")), of) == []


def test_the_examples_are_there() -> None:
    named = {str(p.relative_to(EXAMPLES)) for p in documents()}
    assert {
        "quickstart/spec.yaml",
        "quickstart/suite.yml",
        "quickstart/ablation.yml",
        "paper/ablation/sft.yaml",
    } <= named


@pytest.mark.parametrize("name", ["spec.yaml", "full"])
def test_what_the_models_take_it_takes(name: str) -> None:
    data = yaml.safe_load(SPEC)
    spec = Spec.model_validate(data)
    assert problems(data) == []
    if name == "full":  # as a run keeps it: every default filled in
        assert problems(spec.model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages.0.stepz", 3),
        ("stages.0.steps", 0),
        ("stages.0.steps", "many"),
        ("stages.0.lr", 11),
        ("stages.1.lr.heads", -1),
        ("stages.1.train.fromat", "x"),
        ("stages.0.batch.rows", 0),
        ("stages.0.schedule", "cosin"),
        ("stages.0.weights.audio", -1),
        ("backbone.use", "minni"),
        ("backbone.rank", 8),
        ("backbone.lora.rnk", 8),
        ("backbone.lora.rank", 0),
        ("backbone.dtype", "float16"),
        ("backbone.long_audio", "segments"),
        ("experts.audio.target", "towr"),
        ("experts.audio.layers", 3),
        ("experts.music.layrs", 3),
        ("experts.mine.use", "mine"),
        ("experts.mine.head.heads", "x"),
        ("experts.other", {}),
        ("head.use", "transfomer"),
        ("head.feedforward", 0),
        ("data.trian", "x"),
        ("data.heldout.filter.languag", "en"),
        ("data.max_seconds", 0),
        ("thinking", "on"),
        ("thinking.placement", "behind"),
        ("thinking.plcement", "before_header"),
        ("cache", "audio"),
        ("optimizer", {"lr": 3}),
        ("outptu", "x"),
    ],
)
def test_a_wrong_key_or_value_is_found_where_it_is(path: str, value: Any) -> None:
    if path == "experts.mine.head.heads":
        data = changed("experts.mine.head", {"heads": value})
    elif path == "optimizer":
        data, path = changed(path, value), "optimizer"
    else:
        data = changed(path, value)
    *_, last = path.split(".")
    found = problems(data)
    assert len(found) == 1
    # An unknown key is told of the keys it stands among.
    assert found[0] in (path, path.removesuffix(last).rstrip(".")), found


@pytest.mark.parametrize("key", ["name", "backbone", "data", "stages", "output"])
def test_what_is_missing_is_told(key: str) -> None:
    data = yaml.safe_load(SPEC)
    del data[key]
    assert problems(data) == [""]


@pytest.mark.parametrize(
    "text",
    [
        "{extends: a.yaml, output: o}",
        "{extends: a.yaml, output: o, stages: {warm-up: {steps: 3}, late: null}}",
        "{extends: a.yaml, output: o, backbone: {lora: {rank: 4}, projector: null}}",
        "{extends: a.yaml, output: o, backbone: {use: mini, projector: null, dtype: null}}",
        "{extends: a.yaml, output: o, experts: {mert: {layers: 3}, mine: {own: 2}}, head: {use: linear}}",
        "{extends: a.yaml, output: o, data: {mixture: {rows: 10, categories: {speech: {share: 2}}}}}",
    ],
)
def test_a_spec_that_extends_another_may_say_little(text: str) -> None:
    assert problems(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("{extends: a.yaml, output: o, stages: {warm-up: {stepz: 3}}}", "stages.warm-up"),
        ("{extends: a.yaml, output: o, stages: [{name: x}]}", "stages.0"),
        ("{extends: a.yaml, output: o, data: {mixture: {rows: 0}}}", "data.mixture.rows"),
        ("{extends: a.yaml, output: o, backbone: {use: mini, projectr: x}}", "backbone.projectr"),
        ("{extends: a.yaml, output: o, experts: {mert: {layers: no-number}}}", "experts.mert.layers"),
        ("{extends: 3, output: o}", "extends"),
        ("{extends: a.yaml, nmae: x, output: o}", ""),
    ],
)
def test_but_what_it_says_is_looked_at(text: str, at: str) -> None:
    assert problems(yaml.safe_load(text)) == [at]


def test_a_spec_that_extends_another_needs_an_output() -> None:
    assert problems({"extends": "a.yaml"}) == [""]


def test_suites_and_ablations() -> None:
    task = {"name": "a", "data": "a.jsonl", "metric": "choice"}
    assert problems({"tasks": [task]}, "suite") == []
    assert problems({"tasks": [{**task, "metric": "chioce"}]}, "suite") == ["tasks.0.metric"]
    assert problems({"tasks": [{**task, "choises": []}]}, "suite") == ["tasks.0"]
    assert problems({"base": "s.yaml", "suite": "s.yml", "arms": {"a": None, "b": {"keep": []}}}, "ablation") == []
    assert problems({"base": "s.yaml", "suite": "s.yml", "arms": {"a": {"kep": []}}}, "ablation") == ["arms.a"]
    assert problems({"base": "s.yaml", "suite": "s.yml", "arms": {"a b": {}}}, "ablation") == ["arms"]


# coatkit schema


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    runner = CliRunner()
    printed = runner.invoke(cli.cli, ["schema", "suite"])
    assert printed.exit_code == 0
    file = tmp_path / "suite.schema.json"
    assert runner.invoke(cli.cli, ["schema", "suite", "--output", str(file)]).exit_code == 0
    assert file.read_text(encoding="utf-8") == printed.output
    assert json.loads(printed.output) == schema("suite")


def test_where_it_cannot_write_it_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.cli, ["schema", "--output", str(tmp_path / "no" / "a.json")])
    assert isinstance(done.exception, SpecError)
    assert "no/a.json: cannot be written" in str(done.exception)


# coatkit explain


def said(key: str) -> str:
    done = CliRunner().invoke(cli.cli, ["explain", key])
    assert done.exit_code == 0, done.exception
    return done.output


def test_a_key_is_told_with_type_default_unit_and_source() -> None:
    lines = [line.strip() for line in said("data.max_seconds").splitlines()]
    assert lines == [
        "data.max_seconds",
        "longest sound in seconds (paper: 120)",
        "type:    number, more than 0",
        "default: 120",
        "unit:    seconds",
        "source:  the default is the paper's",
    ]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("stages.lr", "this key is required"),
        ("stages.0.lr", "less than 10"),
        ("stages[].lr", "less than 10"),
        ("stages.schedule", "one of constant, linear, cosine"),
        ("stages.weights.panns", "loss weight of each active expert"),
        ("experts.basic-pitch.aux_weight", "default: 0.5"),
        ("experts.basic-pitch.aux_weight", "source:  the default is ours"),
        ("experts.mert.head.heads", "default: 8"),
        ("head.linear", "options of the head linear"),
        ("backbone.lora.rank", "source:  the default is the paper's"),
        ("backbone.mini.train.projector", "default: full"),
        ("backbone.train.projector", "default: none\n"),
        ("data.mixture.draw", "from all rows of a category alike"),
        ("data.mixture.categories.speech.share", "share of the rows"),
        ("suite.judge.timeout", "unit:    seconds"),
        ("ablation.arms.mine.keep", "the only experts that teach"),
        ("", "gradients_every"),
        ("suite", "suite.tasks"),
        ("checkpoint", "checkpoint.keep"),
    ],
)
def test_keys_are_found_as_people_write_them(key: str, told: str) -> None:
    assert told in said(key)


def test_an_option_that_components_have_each_in_its_way_is_told_of_each() -> None:
    found, _ = explain("backbone.train.projector")
    assert {(key.owner, key.node["default"]) for key in found} == {
        ("backbone audio-flamingo-3, qwen2-audio, qwen2.5-omni", "none"),
        ("backbone mini", "full"),
    }


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("data.mixtur.draw", "data.mixture.draw"),
        ("stages.warmup", "stages.warmup_steps"),
        ("draw", "data.mixture.draw"),
    ],
)
def test_a_misspelt_key_suggests(key: str, near: str) -> None:
    with pytest.raises(SpecError, match=f"{key}: no such key; did you mean '{near}'?"):
        explain(key)


def test_every_key_that_is_listed_is_explained() -> None:
    known = paths()
    assert len(known) > 150
    for path in known:
        found, within = explain(path)
        assert found or within
        assert all(key.meaning and key.type for key in found), path


def test_every_field_of_the_spec_is_listed() -> None:
    known = set(paths("spec"))

    def look(model: type[BaseModel], at: str) -> None:
        for name, field in model.model_fields.items():
            assert f"{at}{name}" in known
            inner = [
                m for m in _models(field.annotation) if m.__name__ not in ("ComponentSpec", "HeadSpec", "ExpertSpec")
            ]
            for found in inner:
                look(found, f"{at}{name}.")

    look(Spec, "")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models(inner)]


# Completion by the shell


def completed(words: str, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    """Have click's own completion print what it offers for the last of the words."""
    if shell == "fish":
        line, word = words, words.rpartition(" ")[2]
    else:
        line, word = words, str(len(words.split(" ")) - 1)
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", word)
    monkeypatch.setenv("_COATKIT_COMPLETE", f"{shell}_complete")
    with pytest.raises(SystemExit):
        cli.cli(prog_name="coatkit", args=[])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_keys(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    completed("coatkit sch", monkeypatch, shell)
    assert "schema" in capsys.readouterr().out
    completed("coatkit explain sta", monkeypatch, shell)
    out = capsys.readouterr().out
    assert "stages" in out
    assert "stages." not in out  # one key further at a time
    completed("coatkit explain stages.wa", monkeypatch, shell)
    assert "stages.warmup_steps" in capsys.readouterr().out
    completed("coatkit explain stages.batch.", monkeypatch, shell)
    out = capsys.readouterr().out
    assert "stages.batch.rows" in out
    assert "stages.lr" not in out
