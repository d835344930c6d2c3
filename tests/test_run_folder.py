"""A run folder: never written over, continued only as what it was, and its metrics cut where a resume begins."""

import copy
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from coatkit import files
from coatkit.errors import RunError
from coatkit.files import write_atomic
from coatkit.run_folder import RunFolder, environment

SPEC: dict[str, Any] = {
    "name": "quick",
    "seed": 17,
    "backbone": {"use": "mini", "lora": {"rank": 16}},
    "thinking": "off",
    "experts": {"audio": {"use": "audio", "head": {"use": "linear"}}},
    "data": {"train": "/data/train.jsonl", "heldout": None, "workers": 0},
    "stages": [{"name": "one", "steps": 10, "lr": {"default": 1e-3}}],
    "checkpoint": {"every": 50, "keep": 2},
    "output": "/runs/quick",
}
RECORD: dict[str, Any] = {
    "name": "quick",
    "experts": {"audio": {"dim": 576, "frame_rate": 25.0, "fingerprint": "abc"}},
    "data": {"/data/train.jsonl": {"sha256": "123", "rows": 300}},
    "environment": {"python": "3.11"},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "quick")
    folder.start(SPEC, RECORD)
    return folder


def test_a_run_keeps_its_spec_and_record(run: RunFolder) -> None:
    assert run.read_spec() == SPEC
    assert run.read_record() == {"format": 1, **RECORD}
    assert run.latest() is None
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "run.json", "spec.yaml"]


def test_text_of_any_script_is_kept_readable(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.start({**SPEC, "name": "Glöckchen 鐘"}, {**RECORD, "name": "鐘"})
    assert "Glöckchen 鐘" in run.spec.read_text(encoding="utf-8")
    assert run.read_spec()["name"] == "Glöckchen 鐘"
    assert "鐘" in run.record.read_text(encoding="utf-8")


def test_a_taken_folder_is_refused_with_both_ways_out(run: RunFolder) -> None:
    with pytest.raises(RunError) as caught:
        run.start(SPEC, RECORD)
    for part in (str(run.path), "--resume", "--set output="):
        assert part in str(caught.value)


def test_a_folder_with_other_things_in_it_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).start(SPEC, RECORD)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_start_that_was_cut_off_may_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(RunFolder, "write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.start(SPEC, RECORD)
    run.start(SPEC, RECORD)
    assert run.read_record()["name"] == "quick"


def test_a_folder_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/quick: cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "quick").start(SPEC, RECORD)


# Continuing


def changed(path: str, value: Any) -> dict[str, Any]:
    spec = copy.deepcopy(SPEC)
    inner: Any = spec
    *keys, last = path.split(".")
    for key in keys:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return spec


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 18),
        ("backbone.lora.rank", 8),
        ("backbone.lora.alpha", 32),
        ("stages.0.lr.default", 2e-3),
        ("stages.0", {"name": "two"}),
        ("thinking", {"placement": "before_header"}),
        ("experts.audio.head.use", "transformer"),
        ("data.train", "/data/other.jsonl"),
    ],
)
def test_a_change_to_the_spec_is_named(run: RunFolder, path: str, value: Any) -> None:
    with pytest.raises(RunError) as caught:
        run.check_same(changed(path, value), RECORD)
    assert f"changed since: {path}" in str(caught.value)
    assert "--set output=" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [("output", "/moved"), ("checkpoint.every", 5), ("data.workers", 4), ("data.heldout", "/data/h.jsonl")],
)
def test_what_changes_no_number_may_differ(run: RunFolder, path: str, value: Any) -> None:
    run.check_same(changed(path, value), RECORD)


def test_changed_data_and_experts_are_named(run: RunFolder) -> None:
    record = copy.deepcopy(RECORD)
    record["experts"]["audio"]["fingerprint"] = "xyz"
    record["data"]["/data/train.jsonl"]["sha256"] = "456"
    with pytest.raises(RunError) as caught:
        run.check_same(SPEC, record)
    assert "experts.audio.fingerprint" in str(caught.value)
    assert "data./data/train.jsonl.sha256" in str(caught.value)


def test_another_environment_is_no_other_run(run: RunFolder) -> None:
    run.check_same(SPEC, {**RECORD, "environment": {"python": "3.13"}, "started": "later"})


def test_an_added_and_a_removed_key_and_a_longer_list_are_differences(run: RunFolder) -> None:
    for spec in (
        {**SPEC, "stages": SPEC["stages"] * 2},
        {**SPEC, "head": {"use": "linear"}},
        {k: v for k, v in SPEC.items() if k != "seed"},
    ):
        with pytest.raises(RunError, match=r"changed since: (stages|head|seed)"):
            run.check_same(spec, RECORD)


# What is not a run


def test_a_folder_that_is_no_run_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        RunFolder(tmp_path).read_record()
    with pytest.raises(RunError, match=r"is not a run folder, .*\n.*spec\.yaml: cannot be read: No such file"):
        RunFolder(tmp_path).read_spec()
    (tmp_path / "spec.yaml").write_text("name: x\n")
    with pytest.raises(RunError, match=r"spec\.yaml: is not a run folder: it has no run\.json$"):
        RunFolder(tmp_path / "spec.yaml").read_record()


@pytest.mark.parametrize("content", ["{", "", "\udcff", "[]", "3", '{"format": 2}', "{}"])
def test_a_damaged_record_is_refused(run: RunFolder, content: str) -> None:
    run.record.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"run\.json|run folder"):
        run.read_record()


@pytest.mark.parametrize("content", ["a: [", "", "- a", "\udcff", "a: !!python/name:os.system"])
def test_a_damaged_spec_is_refused(run: RunFolder, content: str) -> None:
    run.spec.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"spec\.yaml"):
        run.read_spec()


ALIASES = [f"{name}: &{name} [{f'*{below}, ' * 40}]\n" for below, name in pairwise("abcdef")]


@pytest.mark.parametrize("content", ["name: &a [*a]\nb: *a\n", "a: &a [x, x, x]\n" + "".join(ALIASES)])
def test_a_spec_of_aliases_without_end_is_refused_before_they_are_followed(run: RunFolder, content: str) -> None:
    run.spec.write_text(content)
    with pytest.raises(RunError, match=r"spec\.yaml: too large or too deeply nested"):
        run.check_same({"name": "x"}, {})


@pytest.mark.parametrize("of", ["spec", "record", "metrics"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(run: RunFolder, of: str) -> None:
    path = getattr(run, of)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    read = {"spec": run.read_spec, "record": run.read_record, "metrics": run.read_metrics}[of]
    with pytest.raises((RunError, OSError), match="Not a regular file"):
        read()


# Metrics


def test_metrics_after_the_checkpoint_are_cut(run: RunFolder) -> None:
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 8)]
    run.metrics.write_text("".join(lines) + '{"step": 8, "lo')  # a crash in the middle of a line
    run.cut_after(5)
    assert run.metrics.read_text() == "".join(lines[:5])
    run.cut_after(0)
    assert run.metrics.read_text() == ""


@pytest.mark.parametrize("line", ["", "[1]", '{"loss": 1}', '{"step": null}', "nonsense"])
def test_lines_that_are_no_metrics_are_cut(run: RunFolder, line: str) -> None:
    run.metrics.write_text('{"step": 1}\n' + line + "\n" + '{"step": 2}\n')
    run.cut_after(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_quarantine_line_cut_off_by_a_crash_is_dropped_and_the_rest_kept(run: RunFolder) -> None:
    whole = json.dumps({"step": 9, "reason": "a.jsonl:3: odd \u2028 name"}, ensure_ascii=False) + "\n"
    run.quarantine.write_text(whole + '{"step": 9, "rea', encoding="utf-8")
    run.cut_after(2)
    assert run.quarantine.read_text(encoding="utf-8") == whole
    assert run.quarantined() == {"a.jsonl:3: odd \u2028 name"}


def test_cutting_metrics_that_are_not_there_makes_none(run: RunFolder) -> None:
    run.cut_after(5)
    assert not run.metrics.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_the_environment_names_what_decides_numbers() -> None:
    found = environment()
    assert {"torch", "transformers", "peft", "numpy", "soxr"} <= set(found["packages"])
    assert yaml.safe_load(yaml.safe_dump(found)) == found == json.loads(json.dumps(found))
