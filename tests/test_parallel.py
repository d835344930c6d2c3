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


def launch(spec: Path, *overrides: str, processes: int = 2, resume: bool = False, **environment: str) -> Any:
    """`coatkit train` under torchrun, as a process to wait for."""
    code = "import torch; torch.set_num_threads(1); from coatkit.cli import main; main()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += [f"--nproc-per-node={processes}", sys.executable, "-c", code, "train", str(spec)]
    command += [word for override in overrides for word in ("--set", override)] + (["--resume"] if resume else [])
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    env = {**os.environ, **quiet, **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: Any, expected: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("it hangs") from None
    assert (process.returncode == 0) == (expected == 0), output
    return str(output)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), (name, a["step"])


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


def test_a_taken_folder_is_refused_by_both(project: Any, alone: Any) -> None:
    output = finish(launch(project.folder / "spec.yaml", f"output={alone.folder.name}"), expected=3)
    assert "holds a run already" in output


def test_a_signal_to_one_process_saves_and_ends_both(project: Any) -> None:
    """Started as Slurm does: a task for each process, with its place in the environment, and no launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "coatkit", "train", str(project.folder / "spec.yaml")]
    command += ["--set", "output=asked", "--set", "stages.0.steps=400", "--resume"]
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 120
    while not (project.folder / "asked/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    tasks[1].send_signal(signal.SIGUSR1)
    outputs = [finish(task) for task in tasks]
    assert "stopped at step" in outputs[1]
    steps = len(metrics(project.folder / "asked"))
    assert 0 < steps < 400
    assert f"stopped at step {steps}; continue with --resume" in outputs[0]
    newest = sorted((project.folder / "asked/checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == steps


def test_deepspeed_is_refused_with_what_to_use(project: Any) -> None:
    process = launch(project.folder / "spec.yaml", "output=zero", processes=1, ACCELERATE_USE_DEEPSPEED="true")
    assert "accelerate launch --use_fsdp" in finish(process, expected=3)


def test_the_spec_is_written_whole(shared: tuple[str, Path, str], alone: Any) -> None:
    _, folder, _ = shared
    one, other = (yaml.safe_load((place / "spec.yaml").read_text()) for place in (folder, alone.folder))
    assert {**one, "output": ""} == {**other, "output": ""}


def test_what_a_launcher_sets_changes_no_number(project: Any, alone: Any) -> None:
    """`accelerate launch` exports its own precision and accumulation; the spec alone decides."""
    settings = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    finish(launch(project.folder / "spec.yaml", "output=set", processes=1, **settings))
    same_curves(metrics(project.folder / "set"), alone.metrics)
