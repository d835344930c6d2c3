"""Judged tasks of lmms-eval, without lmms-eval: ratings, what failed, and what has to be there before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from coatkit_eval_lmms import readings
from coatkit_eval_lmms.scoring import metric_list, process

from coatkit import CoatkitError, PluginError

DOCS = [{"instruction": f"What is heard, {i}?", "answer": f"A dog, {i}."} for i in range(3)]


@pytest.fixture
def asked(judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The judge, with nothing asked yet and a data folder of the test's own."""
    monkeypatch.setenv("COATKIT_LMMS_DATA", str(tmp_path))
    monkeypatch.setenv("COATKIT_LMMS_JUDGE", judge.settings)
    judge.asked.clear()
    return judge


def scores(said: str) -> dict[str, float]:
    """Scores of a task whose model says the same to everything."""
    metrics = metric_list("judge", "en", "t")
    names = [one["metric"] for one in metrics]
    found = [process(doc, [said], reading=readings.answer, names=names, question="instruction") for doc in DOCS]
    return {one["metric"]: one["aggregation"]([each[one["metric"]] for each in found]) for one in metrics}


def test_the_score_is_the_mean_rating_times_twenty(asked: Any, tmp_path: Path) -> None:
    asked.answer = lambda prompt: f"So.\nRating: {prompt.count('heard, 0') + 4 * prompt.count('heard, 2')}"
    assert scores("a cat") == pytest.approx({"judge": 20 * (1 + 0 + 4) / 3, "judge_failures": 0})
    assert len(asked.asked) == 3
    assert all("a cat" in prompt and "A dog, " in prompt for prompt in asked.asked)
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 3


def test_failures_are_counted_and_are_no_zeros(asked: Any) -> None:
    asked.answer = lambda prompt: {"0": "Rating: 5", "1": None, "2": "Rating: 6"}[prompt[prompt.index("heard, ") + 7]]
    assert scores("a bird") == {"judge": 100, "judge_failures": 2}


def test_a_judge_that_fails_as_a_whole_leaves_no_score_and_says_why(
    asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked.answer = lambda prompt: None
    found = scores("a fish")
    assert math.isnan(found["judge"])
    assert found["judge_failures"] == 3
    assert "t: no ratings: " in caplog.text
    assert "HTTP 500" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("", "t: answers are rated by a judge; describe it in COATKIT_LMMS_JUDGE"),
        ("model=x modle=y", "COATKIT_LMMS_JUDGE: modle: "),
        ("model", "COATKIT_LMMS_JUDGE: .*KEY=VALUE"),
        ("model=x base_url=https://judge.invalid/v1", "needs a key"),
    ],
)
def test_a_judge_is_looked_for_before_anything_is_asked(
    settings: str, said: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_LMMS_JUDGE", settings)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(CoatkitError, match=said) as error:
        metric_list("judge", "en", "t")
    assert isinstance(error.value, PluginError) or "key" in said
