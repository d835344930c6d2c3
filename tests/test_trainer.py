"""The loop on the tiny backbone: what it writes, what it refuses, and what it leaves untouched."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coatkit import checkpoint
from coatkit.build import build
from coatkit.data.rows import JsonlRows
from coatkit.data.steps import load_batch
from coatkit.errors import DataError, PluginError, RunError
from coatkit.optimization import group_parameters, schedule
from coatkit.spec import StageSpec

WHERE = {"step", "stage", "stage_step"}
NUMBERS = {"ce", "audio.mse", "loss", "grad_norm", "lr", "rows", "seconds", "epoch"}

POISON = """
import torch
from coatkit import Expert, Features

class Poison(Expert):
    sample_rate, frame_rate, dim = 16_000, 25.0, 1

    def encode(self, audio):
        frames = -(-audio.lengths // 640)
        value = torch.where(audio.samples.amax(1) > 0.99, torch.nan, 0.5)
        return Features(value[:, None, None].expand(-1, int(frames.max()), 1), frames, self.frame_rate)
"""

SIGNALLING = """
import os, signal
import torch
from coatkit import Expert, Features

class Signalling(Expert):
    sample_rate, frame_rate, dim = 16_000, 25.0, 1
    calls = 0

    def encode(self, audio):
        Signalling.calls += 1
        if Signalling.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        frames = -(-audio.lengths // 640)
        return Features(torch.zeros(len(audio), int(frames.max()), 1), frames, self.frame_rate)
"""


def one_stage(project: Any, steps: int, rows: int, **changes: Any) -> None:
    project.spec["stages"] = [{**project.spec["stages"][0], "steps": steps, "batch": {"rows": rows}, **changes}]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def values(run: Any, *names: str) -> list[float]:
    return [line[name] for line in run.metrics for name in names if name in line]


# What a run writes


def test_both_stages_are_trained_and_every_loss_is_logged(project: Any) -> None:
    run = project.train()
    assert run.result.finished
    assert [(m["step"], m["stage"], m["stage_step"]) for m in run.metrics] == [
        *((i, "one", i) for i in (1, 2, 3)),
        *((i + 3, "two", i) for i in (1, 2, 3)),
    ]
    for line in run.metrics:
        second = line["stage"] == "two"
        assert set(line) == WHERE | NUMBERS | ({"level.mse"} if second else set())
        assert all(math.isfinite(line[name]) for name in set(line) - WHERE)
        weighted = line["ce"] + (0.5 * line["audio.mse"] + 2.0 * line["level.mse"] if second else line["audio.mse"])
        assert line["loss"] == pytest.approx(weighted, rel=1e-6)
        assert (line["rows"], line["lr"]) == (5, 2e-3)
    assert values(run, "ce")[-1] < values(run, "ce")[0]
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    logged = {"ce": 6, "audio/mse": 6, "level/mse": 3, "grad_norm": 6}
    assert {tag: [e.step for e in board.Scalars(tag)][-1] for tag in logged} == dict.fromkeys(logged, 6)
    assert {tag: len(board.Scalars(tag)) for tag in logged} == logged


def test_what_is_logged_are_means_over_tokens_and_positions(project: Any) -> None:
    one_stage(project, 1, 20, weights={"audio": 1.0, "level": 1.0})
    loaded = project.load()
    model = build(loaded, "cpu").train()
    rows = JsonlRows(project.folder / "train.jsonl")[:]
    batch = load_batch(rows, model.backbone.preparer, {8_000}, 120.0, train=True)
    losses = model(batch, ["audio", "level"])
    (line,) = project.train().metrics
    assert batch.inputs.labels is not None
    counts = {"ce": int((batch.inputs.labels != -100).sum())}
    for name, total in losses.sums.items():
        count = counts.get(name, int(batch.inputs.think_lengths.sum()))
        assert line[name] == pytest.approx(total.item() / count, rel=1e-5)


def test_the_folder_holds_what_the_run_depends_on(project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = project.load()
    run = project.train()
    said = capsys.readouterr().err.splitlines()
    # Code of one's own is named where it first runs in a process, which is before.
    first, *_ = [line for line in said if not line.startswith("coatkit: ./level.py:Level: runs the code in ")]
    assert first == "RANDOM WEIGHTS in backbone: this run teaches nothing real."
    spec = yaml.safe_load((run.folder / "spec.yaml").read_text())
    assert spec == loaded.resolved()
    assert spec["optimizer"]["clip_norm"] == 1.0
    assert spec["experts"]["level"]["use"] == f"{project.folder / 'level.py'}:Level"
    record = json.loads((run.folder / "run.json").read_text())
    assert record["random_weights"] == ["backbone"]
    source = hashlib.sha256((project.folder / "level.py").read_bytes()).hexdigest()
    assert record["components"]["experts.level"]["sha256"] == source
    assert record["components"]["backbone"]["from"] == "coatkit-backbone-mini"
    assert record["components"]["backbone"]["version"]
    data = (project.folder / "train.jsonl").read_bytes()
    assert record["data"] == {
        str(project.folder / "train.jsonl"): {
            "sha256": hashlib.sha256(data).hexdigest(),
            "rows": 20,
            "bad_rows": 0,
            "left_out": 0,
            "hours": pytest.approx(sum(0.1 + 0.025 * i for i in range(16)) / 3600, abs=1e-4),
        }
    }
    experts = record["experts"]
    assert {name: (e["dim"], e["frame_rate"], e["sample_rate"]) for name, e in experts.items()} == {
        "audio": (64, 25.0, 16_000),
        "level": (2, 50.0, 8_000),
    }
    assert len({e["fingerprint"] for e in experts.values()}) == 2
    assert record["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    model = build(loaded, "cpu")
    learnt = sum(p.numel() for ps in model.parts().values() for p in ps)
    assert sum(record["parameters"]["trainable"].values()) == learnt
    saved = run.tensors()
    assert set(saved) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_folder_that_holds_a_run_is_never_written_over(project: Any) -> None:
    run = project.train()
    before = digests(run.folder)
    with pytest.raises(RunError, match=r"run: holds a run already.\n.*--resume, .*--set output=..., or delete"):
        project.train("seed=5")
    assert digests(run.folder) == before


def test_the_same_seed_gives_the_same_run(project: Any) -> None:
    first, again, other = (project.train(*changes) for changes in ((), ("output=b",), ("output=c", "seed=12")))
    assert values(first, "loss") == values(again, "loss")
    assert all(torch.equal(value, again.tensors()[name]) for name, value in first.tensors().items())
    assert values(first, "loss")[0] != values(other, "loss")[0]


def test_processes_that_read_ahead_change_nothing(project: Any) -> None:
    assert values(project.train("output=a"), "loss") == values(project.train("output=b", "data.workers=2"), "loss")


# Learning rates


def test_each_part_has_its_own_rate(project: Any) -> None:
    project.spec["stages"][1]["lr"] = {"default": 1e-3, "tokens": 1e-2, "heads": 2e-3, "heads.level": 5e-3}
    loaded = project.load()
    model = build(loaded, "cpu")
    groups, named = group_parameters(model, loaded.spec.stages[1], 0.1)
    peak = {id(p): (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(peak) == len(named) == sum(len(group["params"]) for group in groups)
    for name, parameter in named.items():
        rate = 1e-3
        if "thinking_rows" in name:
            rate = 1e-2
        elif name.startswith("heads."):
            rate = 5e-3 if name.startswith("heads.level.") else 2e-3
        assert peak[id(parameter)] == (rate, 0.1 if parameter.ndim > 1 else 0.0), name
    first, _ = group_parameters(model, loaded.spec.stages[0], 0.1)
    heads = {id(p) for p in model.heads["level"].parameters()}
    assert not heads & {id(p) for group in first for p in group["params"]}


def test_a_rate_for_a_part_that_does_not_learn_is_found_before_anything_is_written(project: Any) -> None:
    project.spec["stages"][1]["lr"] = {"default": 1e-3, "tower": 1e-2}
    with pytest.raises(RunError, match=r"stage 'two': lr names tower, but what learns is: default, heads, .*lora"):
        project.train()
    assert not (project.folder / "run").exists()


def test_a_stage_in_which_nothing_learns_is_refused(project: Any) -> None:
    project.spec["backbone"]["train"] = {"lm": "none", "projector": "none", "tokens": "none"}
    project.spec["stages"][1]["weights"] = {}
    with pytest.raises(RunError, match="stage 'two': nothing learns"):
        project.train()
    assert not (project.folder / "run").exists()


@pytest.mark.parametrize(
    ("shape", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 3, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 1, [0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", 1, [0.5, 1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
    ],
)
def test_schedule(shape: str, warmup: int, expected: list[float]) -> None:
    stage = StageSpec.model_validate({"name": "a", "steps": 5, "lr": 1, "schedule": shape, "warmup_steps": warmup})
    assert [schedule(stage, i) for i in range(5)] == pytest.approx(expected)


def test_the_schedule_is_what_trains(project: Any) -> None:
    one_stage(project, 4, 5, lr=1e-2, schedule="linear", warmup_steps=1)
    run = project.train()
    assert values(run, "lr") == pytest.approx([5e-3, 1e-2, 2e-2 / 3, 1e-2 / 3])


def test_rates_and_schedule_are_what_moves_the_weights(project: Any) -> None:
    """Adam's first step moves every weight that has a gradient by its rate."""
    one_stage(project, 1, 5, lr={"default": 1e-2, "tokens": 4e-3}, warmup_steps=1)
    start = build(project.load(), "cpu").state_dict()
    end = project.train().tensors()
    moved = {name: float((value - start[name]).abs().max()) for name, value in end.items()}
    assert moved.pop("net.thinking_rows.rows") == pytest.approx(2e-3, rel=1e-3)
    moved = {name: value for name, value in moved.items() if "lora_A" not in name and "heads.level" not in name}
    assert moved == dict.fromkeys(moved, pytest.approx(5e-3, rel=1e-3))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_weights_are_what_the_gradient_is_made_with(project: Any, weights: tuple[float, float]) -> None:
    def norm(factor: float) -> float:
        ce, audio = (factor * weight for weight in weights)
        one_stage(project, 1, 5, ce_weight=ce, weights={"audio": audio} if audio else {})
        (line,) = project.train(f"output=run-{factor}").metrics
        assert line["loss"] == pytest.approx(ce * line["ce"] + (audio * line["audio.mse"] if audio else 0), rel=1e-6)
        found: float = line["grad_norm"]
        return found

    assert norm(3.0) == pytest.approx(3 * norm(1.0), rel=1e-4)


def test_an_experts_weight_reaches_its_own_loss_only(project: Any) -> None:
    """The head of an expert has a gradient of its own; what is shared has everyone's."""

    def first_moments(**weights: float) -> dict[str, torch.Tensor]:
        project.spec["checkpoint"]["every"] = 1
        one_stage(project, 2, 5, weights=weights)
        project.spec["optimizer"] = {"clip_norm": 1e6}
        run = project.train("output=" + "-".join(f"{n}{w}" for n, w in weights.items()))
        return run.tensors(0, "optimizer.safetensors")

    once, more = first_moments(audio=1.0, level=1.0), first_moments(audio=1.0, level=3.0)
    for name, factor in (("audio", 1.0), ("level", 3.0)):
        key = f"heads.{name}.out.weight|exp_avg"
        torch.testing.assert_close(more[key], factor * once[key], rtol=1e-4, atol=1e-7)


# What changes no number, and what does


def test_working_through_a_step_in_parts_changes_no_loss(project: Any) -> None:
    for stage in project.spec["stages"]:
        stage["batch"] = {"rows": 8}
    whole = project.train("output=whole")
    parts = project.train("output=parts", "stages.0.batch.accumulate=4", "stages.1.batch.accumulate=3")
    names = ("ce", "audio.mse", "level.mse", "loss", "grad_norm", "rows")
    assert values(parts, *names) == pytest.approx(values(whole, *names), rel=1e-5, abs=1e-5)


def test_dropout_of_the_adapters_is_applied(project: Any) -> None:
    plain, dropped = project.train("output=a"), project.train("output=b", "backbone.lora.dropout=0.3")
    # The adapters start at zero, so what is dropped shows from the second step on.
    assert values(plain, "ce")[0] == values(dropped, "ce")[0]
    assert values(plain, "ce")[2] != values(dropped, "ce")[2]
    assert values(dropped, "ce")[-1] < values(dropped, "ce")[0]


def test_the_head_of_an_inactive_expert_is_not_touched(project: Any) -> None:
    """Neither before its stage nor after it; weight decay and kept moments must not reach it."""
    project.spec["optimizer"] = {"weight_decay": 0.5, "between_stages": "keep"}
    one, two = project.spec["stages"]
    two["weights"] = {"level": 1.0}
    project.spec["stages"] = [one, two, {**one, "name": "three"}]
    start = {
        f"heads.{n}.{k}": v
        for n, head in build(project.load(), "cpu").heads.items()
        for k, v in head.state_dict().items()
    }
    run = project.train()
    first, second, third = (run.tensors(i) for i in range(3))
    for name in start:
        mine = name.startswith("heads.audio.")
        assert torch.equal(start[name], first[name]) != mine, name
        assert torch.equal(first[name], second[name]) == mine, name
        assert torch.equal(second[name], third[name]) != mine, name
    steps = {n: int(v) for n, v in run.tensors(2, "optimizer.safetensors").items() if n.endswith("out.bias|step")}
    assert steps == {"heads.audio.out.bias|step": 6, "heads.level.out.bias|step": 3}


def test_an_expert_of_ones_own_in_one_file(project: Any) -> None:
    example = Path(__file__).parents[1] / "examples/custom_expert/loudness.py"
    shutil.copy(example, project.folder)
    project.spec["experts"] = {
        "loudness": {"use": "./loudness.py:Loudness", "floor_db": 60.0, "head": {"use": "linear"}}
    }
    one_stage(project, 12, 5, weights={"loudness": 1.0}, lr=1e-2)
    found = values(project.train(), "loudness.mse")
    assert np.mean(found[-3:]) < 0.5 * np.mean(found[:3])


def test_plain_fine_tuning_without_a_block(project: Any) -> None:
    project.spec["thinking"] = "off"
    one_stage(project, 4, 5, weights={})
    run = project.train()
    assert set(run.metrics[0]) == WHERE | NUMBERS - {"audio.mse"}
    assert values(run, "ce")[-1] < values(run, "ce")[0]
    assert not any("thinking_rows" in name for name in run.tensors())


def test_rows_of_text_alone_may_teach_nothing(project: Any) -> None:
    """With only the projector learning, a step of text has a loss but no gradient."""
    project.spec["backbone"]["train"] = {"lm": "none", "tokens": "none"}
    one_stage(project, 20, 1)
    run = project.train()
    assert run.result.finished
    assert run.result.position.skipped == 0
    by_kind = {("audio.mse" in line, line["grad_norm"] > 0) for line in run.metrics}
    assert by_kind == {(True, True), (False, False)}


# NaN


@pytest.fixture
def poisoned(project: Any) -> Any:
    """One of 21 rows makes an expert's target NaN; in batches of 7 it comes up once in every three steps."""
    (project.folder / "poison.py").write_text(POISON)
    project.add_clip("poison", np.r_[np.zeros(3000), 1.0, np.zeros(3000)])
    project.spec["experts"]["poison"] = {"use": "./poison.py:Poison"}
    one_stage(project, 6, 7, weights={"audio": 1.0, "poison": 1.0})
    return project


def test_a_step_that_gives_nan_is_left_out_and_written_down(poisoned: Any) -> None:
    run = poisoned.train()
    assert run.result.finished
    assert run.result.position.skipped == 2
    skipped = [json.loads(line) for line in (run.folder / "skipped.jsonl").read_text().splitlines()]
    assert all("poison" in line["rows"] and len(line["rows"]) == 7 for line in skipped)
    bad = {line["step"] for line in skipped}
    assert len(bad) == 2
    for line in run.metrics:
        assert (line["loss"] is None) == (line["poison.mse"] is None) == (line["step"] in bad)
        assert math.isfinite(line["ce"])
    assert all(value.isfinite().all() for value in run.tensors().values())
    state = json.loads((run.checkpoints[-1] / "state.json").read_text())
    assert (state["step"], state["skipped"]) == (6, 2)


def test_a_step_that_is_left_out_changes_nothing(poisoned: Any) -> None:
    poisoned.rows = poisoned.rows[-1:]
    one_stage(poisoned, 3, 1, weights={"audio": 1.0, "poison": 1.0})
    start = build(poisoned.load(), "cpu").state_dict()
    run = poisoned.train()
    assert run.result.position.skipped == 3
    assert all(torch.equal(value, start[name]) for name, value in run.tensors().items())


def test_too_many_steps_with_nan_stop_the_run(poisoned: Any) -> None:
    poisoned.spec["optimizer"] = {"max_skipped": 1}
    poisoned.spec["checkpoint"]["every"] = 1
    with pytest.raises(RunError, match=r"2 steps gave NaN or Inf .*optimizer.max_skipped: 1.*skipped\.jsonl"):
        poisoned.train()
    folder = poisoned.folder / "run"
    last = checkpoint.complete(folder / "checkpoints")[-1]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] is None
    assert checkpoint.load_position(last).step == metrics[-1]["step"] - 1
    model = build(poisoned.load(), "cpu")
    names = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    checkpoint.load_model(last, model, names)
    assert all(p.isfinite().all() for p in model.parameters())


# Bad rows


@pytest.fixture
def damaged(project: Any) -> Any:
    """One file is no sound at all, which shows at once; one breaks off, which shows when it is decoded."""
    project.add_clip("noise", np.zeros(4000))
    (project.folder / "clips/noise.wav").write_bytes(b"no sound at all")
    project.add_clip("cut", np.random.default_rng(0).uniform(-0.5, 0.5, 9000), suffix="flac")
    path = project.folder / "clips/cut.flac"
    path.write_bytes(path.read_bytes()[:9000])
    one_stage(project, 9, 7)
    return project


def test_a_bad_row_is_refused_before_training(damaged: Any) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:21 \(row noise\): .*noise\.wav: cannot be opened as sound"):
        damaged.train()
    assert not (damaged.folder / "run").exists()


def test_a_row_that_breaks_off_is_refused_by_name(damaged: Any) -> None:
    del damaged.rows[-2]
    with pytest.raises(DataError, match=r"train\.jsonl:21 \(row cut\): .*cut\.flac: (cannot be decoded|truncated)"):
        damaged.train()


def test_bad_rows_are_set_aside_and_written_down_once(damaged: Any, capsys: pytest.CaptureFixture[str]) -> None:
    damaged.spec["data"]["on_bad_row"] = "quarantine"
    damaged.spec["data"]["max_bad_rows"] = 2
    damaged.spec["checkpoint"]["every"] = 1
    run = damaged.train()
    assert run.result.finished
    assert "1 bad rows set aside" in capsys.readouterr().err
    assert sorted({line["rows"] for line in run.metrics}) == [6, 7]  # three epochs, so the row comes up three times
    assert values(run, "rows").count(6) == 3

    def written() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]

    assert ["row noise" in written()[0]["reason"], "row cut" in written()[1]["reason"]] == [True, True]
    assert len(written()) == 2
    for path in run.checkpoints[2:]:
        shutil.rmtree(path)
    assert damaged.train(resume=True).result.finished
    assert len(written()) == 2


def test_more_bad_rows_than_allowed_stop_the_run(damaged: Any) -> None:
    damaged.spec["data"].update(on_bad_row="quarantine", max_bad_rows=1)
    with pytest.raises(DataError, match=r"2 bad rows are more than data\.max_bad_rows: 1; they are listed in"):
        damaged.train()


# Stopping


def test_ctrl_c_saves_after_the_step(project: Any) -> None:
    (project.folder / "signalling.py").write_text(SIGNALLING)
    project.spec["experts"] = {"signalling": {"use": "./signalling.py:Signalling"}}
    one_stage(project, 6, 7, weights={"signalling": 1.0})
    before = signal.getsignal(signal.SIGINT)
    run = project.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert not run.result.finished
    assert run.result.position.step == 2
    assert [path.name for path in run.checkpoints] == ["step-00000002"]
    again = project.train(resume=True)
    assert again.result.finished
    assert [line["step"] for line in again.metrics] == [1, 2, 3, 4, 5, 6]


# What a run is tied to


def test_code_of_the_users_expert_changed_since_is_refused(project: Any) -> None:
    project.train()
    code = project.folder / "level.py"
    code.write_text(code.read_text() + "\n# changed\n")
    with pytest.raises(RunError, match=r"changed since: .*experts\.level\.fingerprint"):
        project.train(resume=True)


def test_other_weights_of_the_backbone_are_refused(project: Any) -> None:
    from coatkit_backbone_mini.tiny import tiny_folder

    import coatkit

    tiny_folder(project.folder / "w", seed=1)
    project.spec["backbone"]["weights"] = "./w"
    run = project.train()
    assert coatkit.load(run.folder, device="cpu").ask(None, "Hello?", max_new_tokens=2) is not None
    shutil.rmtree(project.folder / "w")
    tiny_folder(project.folder / "w", seed=2)
    with pytest.raises(RunError, match="backbone's weights are not those"):
        coatkit.load(run.folder, device="cpu")
    with pytest.raises(RunError, match=r"changed since: .*backbone\.fingerprint"):
        project.train(resume=True)


def test_an_expert_that_hears_only_part_must_say_so(project: Any) -> None:
    code = project.folder / "level.py"
    code.write_text(code.read_text().replace("-(-audio.lengths // hop)", "-(-audio.lengths // hop // 4)"))
    with pytest.raises(PluginError, match="hears_all = False"):
        project.train()
    text = code.read_text().replace(
        "sample_rate, frame_rate, dim", "hears_all = False\n    sample_rate, frame_rate, dim"
    )
    code.write_text(text)
    assert project.train("output=other").result.finished


def test_a_full_disk_is_told_and_leaves_earlier_checkpoints(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coatkit import checkpoint

    saved = []

    def full(tensors: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) > 2:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"step-00000006: cannot be written: .*No space left on device"):
        project.train()
    assert os.listdir(project.folder / "run/checkpoints") == ["step-00000003"]
