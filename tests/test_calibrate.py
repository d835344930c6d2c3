"""Loss weights in units of what predicting an expert's mean costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coatkit.errors import RunError, SpecError
from coatkit.spec_file import load_spec


def losses(run: Any) -> dict[str, float]:
    found: dict[str, float] = yaml.safe_load((run.folder / "spec.yaml").read_text())["calibrate"]["losses"]
    return found


@pytest.fixture
def calibrated(project: Any) -> Any:
    project.spec["calibrate"] = {"rows": 100}
    return project


def test_an_mses_is_its_targets_variance(calibrated: Any) -> None:
    """By hand: level's two features are power and minus power, at 50 Hz, moved to 25 positions a second."""
    from coatkit.build import build
    from coatkit.data.sources import open_data
    from coatkit.data.steps import load_batch

    calibrated.spec["stages"] = [
        {"name": "one", "steps": 4, "lr": 1e-3, "batch": {"rows": 20}, "weights": {"level": 1}}
    ]
    run = calibrated.train()
    loaded = load_spec(run.folder / "spec.yaml")
    model = build(loaded, "cpu")
    rows = open_data(loaded.rows_of(loaded.spec.stages[0]))
    batch = load_batch([rows[i] for i in range(16)], model.backbone.preparer, (8_000,), 30.0, train=True)
    (target,) = model.targets(batch, ["level"]).values()
    positions = target[batch.inputs.think_mask]
    variance = (positions - positions.mean(0)).square().mean()
    assert losses(run)["level"] == pytest.approx(float(variance), rel=1e-4)


def test_weights_are_divided_by_what_the_runs_spec_says(calibrated: Any) -> None:
    run = calibrated.train()
    found = losses(run)
    assert set(found) == {"audio", "level"}
    for line in run.metrics:
        weights = {"one": {"audio": 1.0}, "two": {"audio": 0.5, "level": 2.0}}[line["stage"]]
        expected = line["ce"] + sum(w / found[name] * line[f"{name}.mse"] for name, w in weights.items())
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_runs_own_spec_gives_the_same_run(calibrated: Any) -> None:
    run = calibrated.train()
    again = yaml.safe_load((run.folder / "spec.yaml").read_text())
    calibrated.spec["calibrate"] = again["calibrate"]
    same = calibrated.train("output=again")
    assert all(torch.equal(tensor, same.tensors()[name]) for name, tensor in run.tensors().items())


def test_it_resumes_with_what_was_measured_then(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = calibrated.train()
    calibrated.spec["checkpoint"] = {"every": 2, "keep": 100}
    other = calibrated.train("output=other")
    for checkpoint in other.checkpoints[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()

    def never(*args: Any) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr("coatkit.calibrate.measure", never)
    resumed = calibrated.train("output=other", resume=True)
    assert resumed.metrics[-1]["step"] == 6
    assert all(torch.equal(tensor, resumed.tensors()[name]) for name, tensor in run.tensors().items())


def test_what_is_given_is_not_measured(calibrated: Any) -> None:
    calibrated.spec["calibrate"] = {"rows": 5, "losses": {"audio": 4.0}}
    run = calibrated.train()
    assert losses(run)["audio"] == 4.0
    assert losses(run)["level"] not in (1.0, 4.0)


def test_measuring_leaves_the_random_state(project: Any) -> None:
    """Training with the measured losses' weights put in by hand gives the very same run."""
    project.spec["calibrate"] = {"rows": 8}
    run = project.train()
    found = losses(run)
    del project.spec["calibrate"]
    for stage in project.spec["stages"]:
        stage["weights"] = {name: weight / found[name] for name, weight in stage["weights"].items()}
    by_hand = project.train("output=by-hand")
    assert all(torch.equal(tensor, by_hand.tensors()[name]) for name, tensor in run.tensors().items())


def test_targets_that_do_not_vary_are_refused(calibrated: Any) -> None:
    calibrated.spec["experts"]["level"]["gain"] = 0.0
    with pytest.raises(RunError, match="calibrate: predicting the mean of 'level' costs 0 over"):
        calibrated.train()
    assert not (calibrated.folder / calibrated.spec["output"] / "run.json").exists()


def test_rows_without_sound_are_refused(calibrated: Any) -> None:
    calibrated.rows = [row for row in calibrated.rows if "audio" not in row]
    with pytest.raises(RunError, match="calibrate: none of the rows has sound"):
        calibrated.train()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"losses": {"levle": 1.0}}, "no expert of this name; did you mean 'level'"),
        ({"losses": {"level": 0}}, "greater than 0"),
        ({"rows": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_values_are_told(project: Any, value: Any, said: str, tmp_path: Path) -> None:
    project.spec["calibrate"] = value
    with pytest.raises(SpecError, match=said):
        project.train()
