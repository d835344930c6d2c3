"""DeepSpeed's ZeRO 1 and 2 on two processes; needs deepspeed (`make test-deepspeed`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these in an environment that has deepspeed")


def train(project: Any, *overrides: str, stage: int, processes: int = 2, resume: bool = False) -> Any:
    """A run on processes of its own, under DeepSpeed unless `stage` is 0; read like one of this process's."""
    code = "import torch; torch.set_num_threads(1); from coatkit.cli import main; main()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += [f"--nproc-per-node={processes}", sys.executable, "-c", code, "train", str(project.folder / "spec.yaml")]
    command += [word for override in overrides for word in ("--set", override)] + (["--resume"] if resume else [])
    settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if stage:
        settings |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def same_curves(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "stage"}:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), (name, a["step"])


@pytest.fixture(scope="module")
def project(new_project: Callable[[], Any]) -> Any:
    """Text-only rows, parts without rows, a head that sleeps through the second of three stages, moments kept."""
    made = new_project()
    both = {"audio": 0.5, "level": 2.0}
    made.spec["stages"] = [
        {"name": name, "steps": 2, "lr": 2e-3, "batch": {"rows": 7, "accumulate": 2}, "weights": weights}
        for name, weights in (("one", both), ("two", {"audio": 1.0}), ("three", both))
    ]
    made.spec["checkpoint"] = {"every": 1, "keep": 100}
    made.spec["optimizer"] = {"between_stages": "keep", "clip_norm": 0.5, "weight_decay": 0.1}
    made.write()
    return made


@pytest.fixture(scope="module")
def alone(project: Any) -> Any:
    """The run of one process, without DeepSpeed."""
    return project.train("output=alone")


@pytest.fixture(scope="module", params=[1, 2])
def run(request: pytest.FixtureRequest, project: Any, alone: Any) -> tuple[int, Any]:
    train(project, f"output=zero{request.param}", stage=request.param)
    return request.param, type(alone)(project.folder / f"zero{request.param}", None)


def test_two_processes_give_one_processes_losses(run: tuple[int, Any], alone: Any) -> None:
    same_curves(run[1].metrics, alone.metrics)


def test_checkpoints_are_those_of_any_run(run: tuple[int, Any], alone: Any) -> None:
    """The same tensors at every step, the sleeping head's moments among them, and the same step counts."""
    _, ours = run
    assert [path.name for path in ours.checkpoints] == [path.name for path in alone.checkpoints]
    for i in range(len(ours.checkpoints)):
        for file in ("model.safetensors", "optimizer.safetensors"):
            found, expected = ours.tensors(i, file), alone.tensors(i, file)
            names = {name for name in expected if not name.startswith("random|")}
            assert {name for name in found if not name.startswith("random|")} == names
            for name in names:
                # A key's bias has no true gradient (softmax does not see it); Adam makes a step of any rounding.
                if "in_proj_bias" not in name:
                    scale = float(expected[name].float().abs().max())
                    assert found[name].shape == expected[name].shape
                    close = {"rtol": 0, "atol": 2e-3 * scale + 1e-6}
                    torch.testing.assert_close(found[name], expected[name], **close, msg=f"{i} {name}")


@pytest.mark.parametrize(("processes", "under"), [(2, True), (2, False), (1, True)])
def test_a_run_goes_on_with_it_or_without(
    project: Any, run: tuple[int, Any], alone: Any, processes: int, under: bool
) -> None:
    """From the second stage, where a head sleeps, into the third, where it wakes."""
    stage, ours = run
    left = project.folder / f"left-{stage}-{processes}-{under}"
    (left / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "spec.yaml", "metrics.jsonl"):
        (left / name).write_bytes((ours.folder / name).read_bytes())
    os.symlink(ours.folder / "checkpoints/step-00000003", left / "checkpoints/step-00000003")
    train(project, f"output={left.name}", stage=stage if under else 0, processes=processes, resume=True)
    same_curves(type(alone)(left, None).metrics, alone.metrics)


LOUD = '''

class Loud(Level):
    """Gives NaN for a batch of short sounds, so that some steps are skipped."""

    def loss(self, predicted, target, mask):
        short = target.shape[1] < 7
        terms = super().loss(predicted, target, mask)
        return {name: value * (float("nan") if short else 1.0) for name, value in terms.items()}
'''


def test_a_step_that_is_not_finite_is_skipped_as_ever(project: Any) -> None:
    (project.folder / "loud.py").write_text((project.folder / "level.py").read_text() + LOUD)
    change = ("experts.level.use=./loud.py:Loud", "optimizer.max_skipped=100", "stages.0.batch={rows: 2}")
    expected = project.train("output=loud-alone", *change)
    train(project, "output=loud", *change, stage=2)
    found = type(expected)(project.folder / "loud", None)
    skipped = [line["step"] for line in expected.metrics if line["loss"] is None]
    assert [line["step"] for line in found.metrics if line["loss"] is None] == skipped
    assert [line["step"] for line in found.metrics if line["grad_norm"] is None] == skipped
    assert 0 < len(skipped) < len(expected.metrics)
    ours = found.tensors()
    for name, tensor in expected.tensors().items():
        if "in_proj_bias" not in name:
            size = float(tensor.abs().max())
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-3 * size + 1e-6, msg=name)
