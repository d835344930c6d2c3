"""Specs that extend others: what is merged, where paths point, and which file an error names."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from coatkit.errors import SpecError
from coatkit.spec_file import LoadedSpec, load_spec

BASE = """\
name: base
backbone: {use: mini, lora: {rank: 16, alpha: 32}}
experts:
  audio: {target: consumed}
  mine: {use: ./mine.py:Mine, floor: 3}
data: {train: rows/train.jsonl, heldout: rows/heldout.jsonl}
stages:
  - {name: one, steps: 10, lr: 1.0e-3, weights: {audio: 1.0}}
  - {name: two, steps: 5, lr: {default: 1.0e-3, projector: 3.0e-4}, weights: {audio: 0.5, mine: 1.0}}
output: runs/base
"""
MINE = "from coatkit import Expert\nclass Mine(Expert):\n    def __init__(self, floor=1): ...\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    (tmp_path / "arms").mkdir()
    for name in ("rows/train.jsonl", "rows/heldout.jsonl", "arms/own.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def load(folder: Path, *overrides: str, place: str = "arms/arm.yaml", **keys: Any) -> LoadedSpec:
    path = folder / place
    path.write_text(yaml.safe_dump({"extends": "../base.yaml", "output": "runs/arm", **keys}, sort_keys=False))
    return load_spec(path, overrides)


def refused(folder: Path, **keys: Any) -> str:
    with pytest.raises(SpecError) as caught:
        load(folder, **keys)
    return "\n".join(caught.value.problems)


def test_keys_are_put_over_those_of_the_base(folder: Path) -> None:
    spec = load(folder, name="arm", backbone={"lora": {"rank": 4}}, experts={"audio": {"target": "tower"}}).spec
    assert spec.name == "arm"
    assert spec.backbone.options == {"lora": {"rank": 4, "alpha": 32}}
    assert spec.experts["audio"].options == {"target": "tower"}
    assert list(spec.experts) == ["audio", "mine"]
    assert [stage.steps for stage in spec.stages] == [10, 5]


def test_paths_are_relative_to_the_file_that_states_them(folder: Path) -> None:
    loaded = load(folder, data={"train": "own.jsonl"})
    assert loaded.path(loaded.spec.data.train.path) == folder / "arms/own.jsonl"
    assert loaded.path(loaded.spec.data.heldout.path) == folder / "rows/heldout.jsonl"
    assert loaded.output == folder / "arms/runs/arm"
    assert loaded.chosen["experts.mine"].component.target == f"{folder / 'mine.py'}:Mine"


def test_a_base_in_the_same_folder_keeps_its_dots(folder: Path) -> None:
    (folder / "arm.yaml").write_text("extends: base.yaml\noutput: runs/arm\n")
    loaded = load_spec(folder / "arm.yaml")
    assert loaded.chosen["experts.mine"].component.target == f"{folder / 'mine.py'}:Mine"


def test_a_class_of_a_file_named_without_dots_moves_too(folder: Path) -> None:
    text = BASE.replace("./mine.py:Mine", "mine.py:Mine, head: {use: heads/own.py:Own}")
    (folder / "heads").mkdir()
    (folder / "heads/own.py").write_text("from coatkit import Head\nclass Own(Head): ...\n")
    (folder / "base.yaml").write_text(text)
    for place in ("arms/arm.yaml", "arm.yaml"):
        loaded = load(folder, place=place, extends=str(folder / "base.yaml"))
        assert loaded.chosen["experts.mine"].component.target == f"{folder / 'mine.py'}:Mine"
        assert loaded.chosen["heads.mine"].component.target == f"{folder / 'heads/own.py'}:Own"
    (folder / "base.yaml").write_text(BASE.replace("./mine.py", f"{folder}/mine.py"))
    assert load(folder).chosen["experts.mine"].component.target == f"{folder / 'mine.py'}:Mine"


def test_a_linked_spec_finds_its_base_beside_the_link_or_beside_itself(folder: Path) -> None:
    """Its rows, and those of its base, are where they are for the files themselves."""
    load(folder, name="arm", data={"train": "own.jsonl"})
    (folder / "links").mkdir()
    (folder / "links/arm.yaml").symlink_to("../arms/arm.yaml")
    (folder / "deep/links").mkdir(parents=True)
    (folder / "deep/links/arm.yaml").symlink_to("../../arms/arm.yaml")
    (folder / "arms_too").symlink_to("deep/..//arms")  # a folder may be a link as well
    for place in ("links", "deep/links", "arms_too"):
        loaded = load_spec(folder / place / "arm.yaml")
        assert loaded.spec.name == "arm"
        assert loaded.path(loaded.spec.data.train.path) == folder / "arms/own.jsonl"  # type: ignore[union-attr]
        assert loaded.path(loaded.spec.data.heldout.path) == folder / "rows/heldout.jsonl"  # type: ignore[union-attr]
        assert loaded.chosen["experts.mine"].component.target == f"{folder / 'mine.py'}:Mine"
    other = BASE.replace("name: base", "name: base\nseed: 5")
    (folder / "deep/base.yaml").write_text(other.replace("rows/", "../rows/"))
    (folder / "deep/mine.py").write_text(MINE)  # code elsewhere would be refused
    assert load_spec(folder / "deep/links/arm.yaml").spec.seed == 5  # the one beside the link comes first
    assert load_spec(folder / "links/arm.yaml").spec.seed != 5


def test_a_base_that_is_a_link_keeps_the_paths_of_its_file(folder: Path) -> None:
    (folder / "arms/base.yaml").symlink_to("../base.yaml")
    loaded = load(folder, extends="base.yaml")
    assert loaded.path(loaded.spec.data.train.path) == folder / "rows/train.jsonl"  # type: ignore[union-attr]
    assert loaded.chosen["experts.mine"].component.target == f"{folder / 'mine.py'}:Mine"


def test_a_link_without_a_base_says_both_places(folder: Path) -> None:
    load(folder)
    (folder / "deep/links").mkdir(parents=True)
    (folder / "deep/links/arm.yaml").symlink_to("../../arms/arm.yaml")
    (folder / "base.yaml").unlink()
    with pytest.raises(SpecError) as caught:
        load_spec(folder / "deep/links/arm.yaml")
    places = f"there is no file {folder}/deep/base.yaml, nor, where this link leads, {folder}/base.yaml"
    assert places in str(caught.value)
    with pytest.raises(SpecError) as caught:
        load_spec(folder / "arms/arm.yaml")
    assert str(caught.value).endswith(f"there is no file {folder}/base.yaml")


def test_an_override_changes_the_named_place_alone(folder: Path) -> None:
    """Where an anchor gives one value to several places, too."""
    text = BASE.replace("{audio: 0.5, mine: 1.0}", "*shared").replace("{audio: 1.0}", "&shared {audio: 1.0, mine: 1.0}")
    (folder / "base.yaml").write_text(text)
    weights = [stage.weights for stage in load_spec(folder / "base.yaml", ["stages.1.weights.audio=0.25"]).spec.stages]
    assert weights == [{"audio": 1.0, "mine": 1.0}, {"audio": 0.25, "mine": 1.0}]
    (folder / "base.yaml").write_text(
        text.replace("name: two,", "<<: *one, name: two,").replace("- {name: one", "- &one {name: one")
    )
    spec = load(folder, "stages.0.weights.mine=3").spec
    assert [stage.weights["mine"] for stage in spec.stages] == [3.0, 1.0]
    both = "[{name: a, steps: 1, lr: 1, weights: &w {mine: 1}}, {name: b, steps: 1, lr: 1, weights: *w}]"
    spec = load(folder, f"stages={both}", "stages.1.weights.mine=2").spec
    assert [stage.weights["mine"] for stage in spec.stages] == [1.0, 2.0]


def test_paths_behind_an_anchor_move_once(folder: Path) -> None:
    mixture = "&shared {rows: 9, categories: {all: {share: 1, sources: [rows/train.jsonl]}}}"
    text = BASE.replace("{train: rows/train.jsonl, heldout", f"{{mixture: {mixture}, heldout")
    (folder / "base.yaml").write_text(text.replace("{name: two,", "{name: two, mixture: *shared,"))
    loaded = load(folder)
    for found in (loaded.spec.data.mixture, loaded.spec.stages[1].mixture):
        assert found is not None
        assert loaded.path(found.categories["all"].sources[0].path) == folder / "rows/train.jsonl"


def test_a_list_of_stages_replaces_and_a_mapping_changes_by_name(folder: Path) -> None:
    fresh = [{"name": "only", "steps": 3, "lr": 0.1}]
    assert [stage.name for stage in load(folder, stages=fresh).spec.stages] == ["only"]
    spec = load(folder, stages={"two": {"steps": 7, "weights": {"mine": 0}}}).spec
    assert [(stage.name, stage.steps) for stage in spec.stages] == [("one", 10), ("two", 7)]
    assert spec.stages[1].weights == {"audio": 0.5}  # and `mine` is left out, for it teaches nowhere now
    assert list(spec.experts) == ["audio"]
    assert spec.stages[1].lr == {"default": 1e-3, "projector": 3e-4}
    spec = load(folder, stages={"one": None, "two": {"lr": 0.5}}).spec
    assert [(stage.name, stage.lr) for stage in spec.stages] == [("two", {"default": 0.5})]


def test_another_head_or_expert_brings_its_own_options_and_a_backbone_keeps_them(folder: Path) -> None:
    text = BASE.replace("name: base", "name: base\nhead: {use: transformer, heads: 4}")
    (folder / "base.yaml").write_text(text)
    assert load(folder).spec.head.options == {"heads": 4}
    assert load(folder, head={"use": "linear"}).spec.head.options == {}
    assert load(folder, head={"use": "transformer", "dropout": 0.1}).spec.head.options == {"heads": 4, "dropout": 0.1}
    assert load(folder, experts={"mine": {"use": "basic-pitch"}}).spec.experts["mine"].options == {}
    assert load(folder, experts={"audio": {"use": "basic-pitch"}}).spec.experts["audio"].options == {}
    (folder / "base.yaml").write_text(text.replace("use: transformer, heads", "heads"))
    assert load(folder, head={"use": "linear"}).spec.head.options == {}
    assert load(folder, backbone={"use": "mini"}).spec.backbone.options == {"lora": {"rank": 16, "alpha": 32}}
    assert load(folder, backbone={"lora": None}).spec.backbone.options == {}


def test_specs_extend_specs_that_extend(folder: Path) -> None:
    load(folder, place="arms/middle.yaml", seed=3, backbone={"lora": {"rank": 8}})
    spec = load(folder, "seed=5", extends="middle.yaml", backbone={"lora": {"alpha": 8}}).spec
    assert spec.seed == 5
    assert spec.backbone.options == {"lora": {"rank": 8, "alpha": 8}}


def test_errors_name_the_file_and_line_that_is_wrong(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("steps: 5", "steps: five").replace("rank: 16", "ranck: 16"))
    said = refused(folder, seed=-1, stages={"one": None})
    # What the base says at stage 1 is said of stage 0 of the merged spec, at its own line.
    assert f"{folder / 'arms/../base.yaml'}".replace("arms/../", "") + ":9: stages.0.steps" in said
    assert f"{folder / 'arms/arm.yaml'}:3: seed" in said
    (folder / "base.yaml").write_text(BASE.replace("rank: 16", "ranck: 16"))
    assert "base.yaml:2: backbone.lora.ranck" in refused(folder)
    (folder / "base.yaml").write_text(BASE)
    assert "arm.yaml:5: stages.1.steps" in refused(folder, stages={"two": {"steps": 0}})
    assert "arm.yaml:5: stages.1.weights.mein: no expert of this name; did you mean 'mine'?" in refused(
        folder, stages={"two": {"weights": {"mein": 1}}}
    ).replace(":6:", ":5:")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"extends": "gone.yaml"}, "arm.yaml:1: extends: there is no file"),
        ({"extends": "a" * 300}, "extends: there is no file"),
        ({"extends": "a\0b"}, "extends: there is no file"),
        ({"extends": 3}, "arm.yaml:1: extends: expected the path of another spec, found 3"),
        ({"extends": "arm.yaml"}, "arm.yaml extends this spec in turn"),
        ({"stages": {"tow": {"steps": 1}}}, "stages.tow:"),
        ({"stages": {"tow": {"steps": 1}}}, "base.yaml has no stage of this name; did you mean 'two'?"),
    ],
)
def test_what_cannot_be_extended_is_told(folder: Path, keys: dict[str, Any], said: str) -> None:
    assert said in refused(folder, **keys)


def test_a_ring_of_specs_is_told(folder: Path) -> None:
    (folder / "base.yaml").write_text("extends: arms/arm.yaml\noutput: x\n")
    assert "extends this spec in turn" in refused(folder)


def test_an_arm_needs_an_output_of_its_own(folder: Path) -> None:
    (folder / "arm.yaml").write_text("extends: base.yaml\nseed: 1\n")
    with pytest.raises(SpecError, match=r"arm.yaml:1: extends: .*needs an output of its own"):
        load_spec(folder / "arm.yaml")


def test_what_a_run_keeps_stands_alone(folder: Path) -> None:
    loaded = load(folder, name="arm")
    (folder / "kept.yaml").write_text(yaml.safe_dump(loaded.resolved()))
    again = load_spec(folder / "kept.yaml")
    assert again.resolved() == loaded.resolved()
