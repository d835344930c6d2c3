"""Two processes on this machine: the same losses as one, nothing that hangs, one writer, sharded or not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coatkit.errors import RunError
from coatkit.parallel import Team
from coatkit.spec_file import load_spec
from coatkit.trainer import train

sys.path.insert(0, str(Path(__file__).parent / "crash"))
from harness import half_written


def launch(
    spec: Path, *overrides: str, processes: int = 2, resume: bool = False, first: str = "", **environment: str
) -> Any:
    """`coatkit train` under torchrun, as a process to wait for; `first` is code that each process runs before."""
    code = f"import torch; torch.set_num_threads(1)\n{first}\nfrom coatkit.cli import main; main()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += [f"--nproc-per-node={processes}", sys.executable, "-c", code, "train", str(spec)]
    command += [word for override in overrides for word in ("--set", override)] + (["--resume"] if resume else [])
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env = {**os.environ, **quiet, **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tasks(spec: Path, *overrides: str, resume: bool = False, first: str = "", **environment: str) -> list[Any]:
    """Started as Slurm does: a task for each of two processes, its place in the environment, no launcher over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{first}\nfrom coatkit.cli import main; main()", "train", str(spec)]
    command += [word for override in overrides for word in ("--set", override)] + (["--resume"] if resume else [])
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **place, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


def finish(process: Any, expected: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("it hangs") from None
    assert (process.returncode == 0) == (expected == 0), output
    return str(output)


def told(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return told(folder / "metrics.jsonl")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}


@pytest.fixture(scope="module")
def project(new_project: Callable[[], Any]) -> Any:
    """Two stages of which the second wakes a head; text-only rows, an odd number of rows a step, and two parts each.

    Seven rows for two devices in two parts: shares differ, and some parts are text alone.
    """
    made = new_project()
    for stage in made.spec["stages"]:
        stage.update(batch={"rows": 7, "accumulate": 2}, steps=4)
    made.spec["checkpoint"] = {"every": 3, "keep": 100}
    made.write()
    return made


@pytest.fixture(scope="module")
def alone(project: Any) -> Any:
    """The run of one process."""
    return project.train("output=alone")


@pytest.fixture(scope="module", params=["repeated", "sharded"])
def shared(request: pytest.FixtureRequest, project: Any, alone: Any) -> tuple[str, Path, str]:
    """The same spec on two processes, and what they printed."""
    how = {"ACCELERATE_USE_FSDP": "true"} if request.param == "sharded" else {}
    output = finish(launch(project.folder / "spec.yaml", f"output={request.param}", **how))
    return request.param, project.folder / request.param, output


def same_curves(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same terms at every step, to four digits: sums run in another order, and Adam divides by small numbers."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "stage"}:
            near = pytest.approx(b[name], rel=2e-4, abs=1e-6) if b[name] is not None else None  # None is NaN or Inf
            assert a[name] == near, (name, a["step"])


def test_two_processes_give_one_processes_losses(shared: tuple[str, Path, str], alone: Any) -> None:
    _, folder, _ = shared
    same_curves(metrics(folder), alone.metrics)


def test_two_processes_learn_what_one_does(shared: tuple[str, Path, str], alone: Any) -> None:
    _, folder, _ = shared
    ours, theirs = tensors(folder), tensors(alone.folder)
    assert {k for k in theirs if not k.startswith("random|")} == {k for k in ours if not k.startswith("random|")}
    moved = 0
    for name, expected in theirs.items():
        # The true gradient of a key's bias is zero (softmax does not see it); Adam makes a step of any rounding.
        if not name.startswith("random|") and "in_proj_bias" not in name:
            assert ours[name].shape == expected.shape
            scale = float(expected.float().abs().max())
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-3 * scale + 1e-6, msg=name)
            moved += scale > 0
    assert moved > 50


def test_what_rests_in_a_stage_rests_in_every_process(project: Any) -> None:
    """Three stages: projector and head alone, all but the projector, everything; text-only shares among them."""
    rates = ("{default: 0, projector: 2.0e-3, heads: 2.0e-3}", "{default: 2.0e-3, projector: 0}", "2.0e-3")
    one, two = project.spec["stages"]
    stages = [{**one, "steps": 2}, {**two, "steps": 2}, {**two, "name": "three", "steps": 2}]
    path = project.folder / "resting.yaml"
    path.write_text(yaml.safe_dump({**project.spec, "stages": stages, "output": "resting"}))
    changes = [f"stages.{i}.lr={rate}" for i, rate in enumerate(rates)]
    finish(launch(path, *changes))
    train(load_spec(path, [*changes, "output=resting-alone"]))
    same_curves(metrics(project.folder / "resting"), metrics(project.folder / "resting-alone"))


def test_one_process_writes(shared: tuple[str, Path, str]) -> None:
    _, folder, output = shared
    assert [line["step"] for line in metrics(folder)] == list(range(1, 9))
    assert output.count("test: mini, experts") == 1
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert [name for name in os.listdir(folder / "checkpoints") if name.startswith(".")] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_on_two_processes_or_on_one_goes_on_as_before(
    project: Any, alone: Any, shared: tuple[str, Path, str], processes: int
) -> None:
    """The rows of a step do not depend on who trains them, so the number of processes may change."""
    how, folder, _ = shared
    left = project.folder / f"left-{how}-{processes}"
    (left / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "spec.yaml", "metrics.jsonl"):
        (left / name).write_bytes((folder / name).read_bytes())
    (folder / "checkpoints/step-00000003").rename(left / "checkpoints/step-00000003")
    environment = {"ACCELERATE_USE_FSDP": "true"} if how == "sharded" else {}
    try:
        spec = project.folder / "spec.yaml"
        output = finish(launch(spec, f"output={left.name}", processes=processes, resume=True, **environment))
    finally:
        (left / "checkpoints/step-00000003").rename(folder / "checkpoints/step-00000003")
    assert "continuing from step 3 of 8" in output
    same_curves(metrics(left), alone.metrics)


WATCH = """
import gc, json, os, weakref
from torch.distributed.tensor import DTensor
from coatkit import checkpoint, trainer

def held():
    # Bytes of all plain tensors that Python can reach: a shard counts, a DTensor around it does not.
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, DTensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())

def watch(session, moments):
    gc.collect()
    before, most, sizes, gathered = held(), 0, [], []
    def whole(tensor):
        nonlocal most
        complete = true_whole(tensor)
        sizes.append(complete.nbytes)
        if isinstance(tensor, DTensor):
            gathered.append(weakref.ref(complete))
        most = max(most, sum(one() is not None for one in gathered))
        return complete
    checkpoint.whole = whole
    true_save(session, moments)
    del moments
    gc.collect()
    asleep = [t for state in session.moments.values() for k, t in state.items() if k != "step"]
    said = {"rank": session.team.rank, "most": most, "left": held() - before, "largest": max(sizes), "all": sum(sizes)}
    said |= {"asleep": len(asleep), "sharded": sum(isinstance(t, DTensor) for t in asleep)}
    with open(os.environ["WATCHED"] + str(session.team.rank), "a") as stream:
        stream.write(json.dumps(said) + "\\n")

true_whole, true_save = checkpoint.whole, trainer._save
trainer._save = watch
"""


@pytest.fixture(scope="module")
def keeping(new_project: Callable[[], Any]) -> Any:
    """Moments are kept between three stages, and a head sleeps through the second."""
    made = new_project()
    both = {"audio": 0.5, "level": 2.0}
    made.spec["stages"] = [
        {"name": name, "steps": 2, "lr": 2e-3, "batch": {"rows": 5}, "weights": weights}
        for name, weights in (("one", both), ("two", {"audio": 1.0}), ("three", both))
    ]
    made.spec["checkpoint"] = {"every": 1, "keep": 100}
    made.spec["optimizer"] = {"between_stages": "keep"}
    made.write()
    return made


def test_moments_kept_between_stages_stay_sharded_and_no_process_holds_the_whole(keeping: Any) -> None:
    """A checkpoint is gathered tensor by tensor: the process that does not write never holds two of them."""
    alone = keeping.train("output=alone")
    spec, watched = keeping.folder / "spec.yaml", keeping.folder / "watched"
    how = {"ACCELERATE_USE_FSDP": "true", "WATCHED": str(watched)}
    finish(launch(spec, "output=sharded", first=WATCH, **how))
    same_curves(metrics(keeping.folder / "sharded"), alone.metrics)
    left = keeping.folder / "left"
    (left / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "spec.yaml", "metrics.jsonl"):
        (left / name).write_bytes((keeping.folder / "sharded" / name).read_bytes())
    # In the second stage: what sleeps is read from the checkpoint, and must reach the third.
    (keeping.folder / "sharded/checkpoints/step-00000003").rename(left / "checkpoints/step-00000003")
    finish(launch(spec, "output=left", resume=True, first=WATCH, **how))
    same_curves(metrics(left), alone.metrics)
    for rank in (0, 1):
        seen = [json.loads(line) for line in Path(f"{watched}{rank}").read_text().splitlines()]
        assert len(seen) == 6 + 3
        assert {line["rank"] for line in seen} == {rank}
        assert all(line["asleep"] == line["sharded"] for line in seen)
        assert {line["asleep"] > 0 for line in seen} == {True, False}
        for line in seen:
            assert line["all"] > 10 * line["largest"]  # else this would show nothing
            assert line["left"] < line["largest"]
            assert line["most"] == 1 if rank else line["most"] > 10


def test_a_bad_row_of_one_process_stops_both_with_its_name(project: Any) -> None:
    victim = project.folder / "clips/r05.flac"
    kept = victim.read_bytes()
    victim.write_bytes(kept[: len(kept) * 2 // 3])  # the header is whole, so only reading finds it
    try:
        output = finish(launch(project.folder / "spec.yaml", "output=stopped"), expected=3)
    finally:
        victim.write_bytes(kept)
    assert "r05.flac" in output
    assert "coatkit/trainer.py" not in output  # the launcher adds a traceback of its own, we none


UNSTABLE = """
import torch
from torch import nn
from coatkit import Expert, Features, Head

class Unstable(Expert):
    # A clip's first sample says what its loss does: 0.6 makes it NaN, 0.7 its gradient alone, 0.8 makes it large.
    sample_rate, frame_rate, dim = 16_000, 25.0, 1

    def encode(self, audio):
        frames = -(-audio.lengths // 640)
        value = audio.samples[:, 0].mul(10).round()
        return Features(value[:, None, None].expand(-1, int(frames.max()), 1), frames, self.frame_rate)

    def loss(self, predicted, target, mask):
        value, kind = predicted[mask], target[mask].round()
        constant = torch.zeros_like(value)
        constant[kind == 6] = torch.nan  # of no gradient: the other process learns of it from the sums alone
        constant[kind == 8] = 300.0
        loss = 0.01 * value.square() + constant
        if (kind == 7).any():
            loss = loss + (0.0 * value).sqrt()  # 0, and its gradient NaN
        return {"mse": loss.mean()}
"""
EACH = """
import hashlib, json, os
from coatkit import trainer
from coatkit.journal import Journal

def write(**said):
    with open(os.environ["EACH"] + os.environ["RANK"], "a") as stream:
        stream.write(json.dumps(said) + "\\n")

def skip(journal, position, rows, *more):
    write(step=position.step, rows=rows)
    true_skip(journal, position, rows, *more)

def save(session, moments):
    digest = hashlib.sha256()
    for _, parameter in session.model.named_parameters():
        whole = trainer.checkpoint.whole(parameter.detach())
        digest.update(whole.float().numpy().tobytes())
    write(digest=digest.hexdigest(), skipped=session.position.skipped)
    true_save(session, moments)

true_skip, Journal.skip = Journal.skip, skip
true_save, trainer._save = trainer._save, save
"""


def test_nan_and_spikes_of_one_process_are_told_once_and_both_do_the_same(
    new_project: Callable[[], Any], sound: Callable[..., Any]
) -> None:
    """A row lies with one process: its step is left out by both, or told as a spike, as one process alone does."""
    made = new_project()
    (made.folder / "unstable.py").write_text(UNSTABLE)
    for name, first in (("nan", 0.6), ("gradient", 0.7), ("large", 0.8)):
        samples = sound(0.3, len(name)) * 0.1
        samples[0] = first
        made.add_clip(name, samples)
    made.spec["experts"] = {"audio": {}, "unstable": {"use": "./unstable.py:Unstable"}}
    made.spec["optimizer"] = {"max_skipped": 100}
    weights = {"audio": 1.0, "unstable": 1.0}
    made.spec["stages"] = [{**made.spec["stages"][0], "steps": 28, "batch": {"rows": 4}, "weights": weights}]
    alone = made.train("output=alone")
    lines = {file: told(alone.folder / f"{file}.jsonl") for file in ("skipped", "spikes")}
    assert all({"nan", "gradient"} & set(line["rows"]) for line in lines["skipped"])
    assert len(lines["skipped"]) > 5
    assert 0 < len(lines["spikes"]) < 5
    assert all("large" in line["rows"] for line in lines["spikes"])
    each = made.folder / "each"
    output = finish(launch(made.folder / "spec.yaml", "output=both", first=EACH, EACH=str(each)))
    for file, expected in lines.items():
        found = told(made.folder / f"both/{file}.jsonl")
        assert [(line["step"], sorted(line["rows"])) for line in found] == [
            (line["step"], sorted(line["rows"])) for line in expected
        ]
    same_curves(metrics(made.folder / "both"), alone.metrics)
    said = " ".join(output.split())
    for line in lines["spikes"]:
        assert said.count(f"step {line['step']}: loss ") == 1
    # Each process by itself: the same steps left out, and the same weights in the end.
    first, second = (told(Path(f"{each}{rank}")) for rank in (0, 1))
    assert first == second
    assert [line["step"] for line in first[:-1]] == [line["step"] for line in lines["skipped"]]
    assert first[-1]["skipped"] == len(lines["skipped"])


def test_a_taken_folder_is_refused_by_both(project: Any, alone: Any) -> None:
    output = finish(launch(project.folder / "spec.yaml", f"output={alone.folder.name}"), expected=3)
    assert "holds a run already" in output


def test_a_signal_to_one_process_saves_and_ends_both(project: Any) -> None:
    started = tasks(project.folder / "spec.yaml", "output=asked", "stages.0.steps=400", resume=True)
    deadline = time.monotonic() + 120
    while not (project.folder / "asked/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGUSR1)
    outputs = [finish(task) for task in started]
    assert "stopped at step" in outputs[1]
    steps = len(metrics(project.folder / "asked"))
    assert 0 < steps < 400
    assert f"stopped at step {steps}; continue with --resume" in outputs[0]
    newest = sorted((project.folder / "asked/checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == steps


REFUSED = """
import os, resource
from coatkit import checkpoint
from coatkit.journal import Journal

def small(owner, name, nth):
    # From the n-th call on, this process may write files of 8 bytes: the system refuses more, as a full disk does.
    made, calls = getattr(owner, name), []
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return made(*args, **kwargs)
    setattr(owner, name, call)

if os.environ["RANK"] == "0":
    small(*{"metrics": (Journal, "log", 5), "checkpoint": (checkpoint, "save", 2)}[os.environ["AT"]])
"""


@pytest.mark.parametrize(("at", "named"), [("metrics", "refused-metrics"), ("checkpoint", "step-00000004")])
def test_what_the_system_refuses_one_process_ends_both_in_words(project: Any, alone: Any, at: str, named: str) -> None:
    """Metrics are written by the first process alone, and the second waits for it; both know of a checkpoint's end."""
    spec, output = project.folder / "spec.yaml", f"refused-{at}"
    started = tasks(spec, f"output={output}", first=REFUSED, AT=at)
    outputs = [finish(task, expected=3) for task in started]
    assert [task.returncode for task in started] == [3, 3]
    assert not any("Traceback" in said for said in outputs)
    assert named in outputs[0]
    assert "File too large" in outputs[0]
    assert (named if at == "checkpoint" else "another process of this run ended") in outputs[1]
    assert all("continue with --resume" in said for said in outputs)
    assert half_written(project.folder / output) == []
    train(load_spec(spec, [f"output={output}"]), resume=True)
    same_curves(metrics(project.folder / output), alone.metrics)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "accelerate launch --use_fsdp"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "--zero_stage 1 or 2"),
        ({}, "pip install 'coatkit[deepspeed]'"),
    ],
)
def test_deepspeed_that_cannot_be_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], said: str
) -> None:
    """tests/test_deepspeed.py is for where it is installed."""
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **settings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(RunError) as caught:
        Team()
    assert said in str(caught.value)


def test_the_spec_is_written_whole(shared: tuple[str, Path, str], alone: Any) -> None:
    _, folder, _ = shared
    one, other = (yaml.safe_load((place / "spec.yaml").read_text()) for place in (folder, alone.folder))
    assert {**one, "output": ""} == {**other, "output": ""}


def test_what_a_launcher_sets_changes_no_number(project: Any, alone: Any) -> None:
    """`accelerate launch` exports its own precision and accumulation; the spec alone decides."""
    settings = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    finish(launch(project.folder / "spec.yaml", "output=set", processes=1, **settings))
    same_curves(metrics(project.folder / "set"), alone.metrics)
