"""What a person sees while training, where there is a terminal and where there is none."""

import io

import pytest
from rich.console import Console

from coatkit import progress
from coatkit.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock to set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    """Where everything is printed."""
    out = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda stderr, quiet: Console(file=out, quiet=quiet, force_terminal=terminal, width=150)
    )
    return out


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    out = shown(monkeypatch, terminal=False)
    with TrainingProgress(total=60, done=0) as bar:
        for step in range(1, 61):
            clock[0] = step * 2.0
            bar.step(step, "warm-up", {"ce": 2.0, "loss": 1 / step})
    lines = out.getvalue().splitlines()
    assert len(lines) == 8  # one per 16 seconds of 120, and the last step
    assert lines[0] == "warm-up: step 8/60, 2.0 s/step, 1.7 min left   ce 2.000  loss 0.125"
    assert lines[-1].startswith("warm-up: step 60/60, 2.0 s/step, 0.0 min left")


def test_the_rate_counts_only_the_steps_since_resuming(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    out = shown(monkeypatch, terminal=False)
    with TrainingProgress(total=200, done=100) as bar:
        clock[0] = 20.0
        bar.step(140, "two", {})
    assert "step 140/200, 2.00 steps/s, 0.5 min left" in out.getvalue()


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    out = shown(monkeypatch, terminal=True)
    with TrainingProgress(total=10, done=4) as bar:
        clock[0] = 100.0
        bar.step(5, "one", {"loss": 0.5})
    text = out.getvalue()
    assert "5/10" in text
    assert "loss 0.500" in text
    assert "min left" not in text


def test_other_devices_say_nothing(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    out = shown(monkeypatch, terminal=False)
    with TrainingProgress(total=1, done=0, quiet=True) as bar:
        bar.say("hello")
        bar.step(1, "one", {"loss": 0.5})
    assert out.getvalue() == ""


def test_text_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(monkeypatch, terminal=False)
    TrainingProgress(total=1, done=0).say("bad rows: [bold]x[/bold] [1]")
    assert out.getvalue() == "bad rows: [bold]x[/bold] [1]\n"
