"""`coatkit mix`, and training on mixtures: made on demand, used again, named in the run's record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from coatkit.cli import cli
from coatkit.data.mixture import MixtureRows
from coatkit.errors import DataError, RunError, SpecError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mixed(project: Any, **more: Any) -> Any:
    """The tiny project with a mixture of its clips and its text rows."""
    project.write()
    lessons = [{**row, "lesson": i} for i, row in enumerate(project.rows[16:])]
    for name, part in (("clips", project.rows[:16]), ("text", lessons)):
        (project.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    project.spec["data"] = {
        "mixture": {
            "rows": 24,
            "categories": {
                "sound": {"share": 0.75, "sources": ["clips.jsonl"]},
                "text": {"share": 0.25, "sources": ["text.jsonl"], "max_epochs": 1},
            },
            **more,
        }
    }
    return project


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["mix", *words])


def test_mix_prints_what_was_drawn_and_writes_it_once(project: Any, own_cache: Path) -> None:
    halves = [{"path": "text.jsonl", "filter": {"where": {"lesson": part}}} for part in ([0, 1], [2, 3])]
    mixed(project).spec["data"]["mixture"]["categories"]["text"]["sources"] = halves
    spec = str(project.write())
    result = run(spec)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "stage one, two: 24 rows, seed 11"
    assert [line.split() for line in lines[1:7]] == [
        ["category", "source", "pool", "requested", "actual", "epochs", "a", "row", "comes"],
        ["sound", "project/clips.jsonl", "16", "18", "20", "1.25", "1", "to", "2", "x"],
        ["text", "4", "6", "4", "1", "1", "x"],
        ["project/text.jsonl,", "lesson:", "0/1", "(of", "4)", "2", "3", "2", "1", "1", "x"],
        ["project/text.jsonl,", "lesson:", "2/3", "(of", "4)", "2", "3", "2", "1", "1", "x"],
        ["24", "rows"],
    ]
    (path,) = (own_cache / "mixtures").glob("*.parquet")
    assert lines[7] == f"written: {path} ({path.stat().st_size / 1e3:.0f} kB)"
    assert lines[8] == f"what was drawn: {path.with_suffix('.json')}"
    again = run(spec)
    assert again.output == result.output.replace("written: ", "there already: ")
    assert len(MixtureRows(path)) == 24


def test_mixing_loads_no_torch(project: Any) -> None:
    code = (
        "import sys; from coatkit.cli import cli\n"
        f"cli(['mix', {str(mixed(project).write())!r}], standalone_mode=False)\n"
        "assert 'pyarrow' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_prints_the_numbers_alone(project: Any, own_cache: Path) -> None:
    spec = str(mixed(project).write())
    dry = run(spec, "--dry-run", "--set", "data.mixture.overflow=shrink")
    assert dry.exit_code == 0, dry.output
    assert dry.output.splitlines()[-2:] == ["  22 rows of 24 asked for", "not written: a dry run"]
    assert not own_cache.exists()


def test_a_mixture_for_each_stage(project: Any, tmp_path: Path) -> None:
    mixed(project)
    own = {"rows": 6, "seed": 5, "categories": {"text": {"share": 1, "sources": ["text.jsonl"]}}}
    project.spec["stages"][1]["mixture"] = own
    spec = str(project.write())
    both = run(spec)
    assert [line for line in both.output.splitlines() if line.startswith("stage")] == [
        "stage one: 24 rows, seed 11",
        "stage two: 6 rows, seed 5",
    ]
    out = tmp_path / "two.parquet"
    assert isinstance(run(spec, "--out", str(out)).exception, SpecError)
    assert not out.exists()
    result = run(spec, "--stage", "two", "--out", str(out))
    assert f"written: {out}" in result.output
    assert len(MixtureRows(out)) == 6
    # A mixture is a source like any other.
    project.spec["data"] = {"train": str(out)}
    del project.spec["stages"][1]["mixture"]
    assert len(project.train().metrics) == 6


def test_what_mix_cannot_do_is_said(project: Any) -> None:
    spec = str(mixed(project).write())
    assert "there is no stage 'tow'; did you mean 'two'?" in str(run(spec, "--stage", "tow").exception)
    project.spec["data"] = {"train": "train.jsonl"}
    plain = str(project.write())
    assert "no stage draws from a mixture; write data.mixture" in str(run(plain).exception)
    assert "stage 'two' does not draw from a mixture" in str(run(plain, "--stage", "two").exception)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("rows", 0, "data.mixture.rows: "),
        ("categories", {}, "data.mixture.categories: "),
        ("categories.sound.share", 0, "data.mixture.categories.sound.share: "),
        ("categories.sound.sources", [], "data.mixture.categories.sound.sources: "),
        ("categories.sound.sources", ["clips.jsonl", "clips.jsonl"], "clips.jsonl is named twice with the same filter"),
        ("categories.sound.sources", ["none.jsonl"], "there is no file"),
        ("categories.sound.filter", {"where": {"a": []}}, "data.mixture.categories.sound.filter.where.a: "),
        ("draws", "rows", "unknown key; did you mean 'draw'?"),
        ("overflow", "shrnk", "data.mixture.overflow: "),
        ("max_epochs", 0, "data.mixture.max_epochs: "),
    ],
)
def test_a_wrong_mixture_is_told_by_check(project: Any, path: str, value: Any, said: str) -> None:
    spec = yaml.safe_load(mixed(project).write().read_text())
    *outer, last = path.split(".")
    entry = spec["data"]["mixture"]
    for key in outer:
        entry = entry[key]
    entry[last] = value
    (project.folder / "wrong.yaml").write_text(yaml.safe_dump(spec))
    result = CliRunner().invoke(cli, ["check", str(project.folder / "wrong.yaml")])
    assert isinstance(result.exception, SpecError)
    assert said in str(result.exception)
    assert "wrong.yaml:" in str(result.exception)


def test_training_draws_on_demand_resumes_and_names_the_mixture(project: Any, own_cache: Path) -> None:
    mixed(project)
    whole = project.train("output=whole", "checkpoint.every=2")
    (path,) = (own_cache / "mixtures").glob("*.parquet")
    record = json.loads((whole.folder / "run.json").read_text())["data"]
    assert set(record) == {str(path)}
    assert record[str(path)]["rows"] == 24
    assert record[str(path)]["sha256"] == MixtureRows(path).fingerprint()
    assert {line["rows"] for line in whole.metrics} == {5}
    # Stopped and continued on the mixture that is there, or on one made anew, it is the same run to the bit.
    made = path.stat().st_mtime_ns
    project.train("output=parts", "checkpoint.every=2")
    assert path.stat().st_mtime_ns == made
    for checkpoint in sorted((project.folder / "parts/checkpoints").glob("step-*"))[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    path.unlink()
    parts = project.train("output=parts", "checkpoint.every=2", resume=True)
    assert path.exists()
    assert [line["loss"] for line in parts.metrics] == [line["loss"] for line in whole.metrics]
    # Another mixture is another run.
    with pytest.raises(RunError, match=r"changed since: .*data\.mixture\.rows"):
        project.train("output=parts", "checkpoint.every=2", "data.mixture.rows=25", resume=True)
    with (project.folder / "text.jsonl").open("a") as stream:
        stream.write(json.dumps({**project.rows[-1], "id": "new"}) + "\n")
    with pytest.raises(RunError, match=r"changed since: data\."):
        project.train("output=parts", "checkpoint.every=2", resume=True)


def test_workers_change_no_number(project: Any) -> None:
    mixed(project)
    alone, helped = project.train("output=alone"), project.train("output=helped", "data.workers=2")
    assert [line["loss"] for line in alone.metrics] == [line["loss"] for line in helped.metrics]


def test_bad_rows_of_a_mixture_follow_the_specs_policy(project: Any) -> None:
    mixed(project, filter={"where": {"kind": None}})  # a filter that looks at every row
    with (project.folder / "clips.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match=r"1 bad row\(s\) in its sources:\n  .*clips\.jsonl:17: not valid JSON"):
        project.train()
    assert len(project.train("data.on_bad_row=quarantine").metrics) == 6
    # Without one, the row is met as any bad row of a manifest is.
    mixed(project)
    with (project.folder / "clips.jsonl").open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match=r"parquet row \d+, .*clips\.jsonl:17: not valid JSON"):
        project.train("output=other")
    run = project.train("output=third", "data.on_bad_row=quarantine")
    reasons = (run.folder / "quarantine.jsonl").read_text()
    assert "clips.jsonl:17: not valid JSON" in reasons
