"""The soak finds what it is there to find: each fault planted in a short run, and lines through made-up memory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from soak import KB_PER_STEP, Watch, soak

STEPS = 40


def test_a_short_run_is_sound(tmp_path: Path) -> None:
    watch, found = soak(tmp_path, STEPS)
    assert found == []
    assert watch.epochs == 10
    assert watch.reads == 160
    assert len(watch.stored) == 16


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        ("files", "more files are open at the end"),
        ("rows", "2 of 10 epochs have a row twice"),  # in both stages
        ("store", "reads of the feature store gave something else"),
    ],
)
def test_what_is_planted_is_found(tmp_path: Path, plant: str, told: str) -> None:
    _, found = soak(tmp_path, STEPS, plant)
    assert [problem for problem in found if told in problem], found


@pytest.mark.parametrize("growth", [0.0, KB_PER_STEP / 2, KB_PER_STEP * 2])
def test_memory_is_judged_by_its_second_half(growth: float) -> None:
    watch = Watch(10)
    noise = np.random.default_rng(0).normal(0, 200, 200)
    for i, more in enumerate(noise):
        watch.steps.append(20 * i)
        watch.memory.append(500_000 + min(i, 60) * 5_000 + growth * 20 * i + more)  # it warms up in the first half
        watch.files.append(12)
    assert watch.slope() == pytest.approx(growth, abs=0.15)
    found = watch.problems(0)
    assert [problem for problem in found if "memory" in problem] == (
        [f"memory grows by {watch.slope():.2f} kB a step; 2 are allowed"] if growth > KB_PER_STEP else []
    )
