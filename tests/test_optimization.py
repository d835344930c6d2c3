"""What surrounds the optimizer: groups and their rates, the schedule, and stopping on a signal."""

import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch import nn

from coatkit.errors import RunError
from coatkit.optimization import Stop, group_parameters, schedule
from coatkit.spec import StageSpec


def stage(**changes: Any) -> StageSpec:
    return StageSpec.model_validate({"name": "one", "steps": 10, "lr": 1e-3, "weights": {"audio": 1.0}, **changes})


# The schedule


def test_constant_by_default() -> None:
    assert [schedule(stage(), step) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_evenly_from_above_zero_to_the_peak(kind: str) -> None:
    rates = [schedule(stage(schedule=kind, warmup_steps=4), step) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("kind", "halfway"), [("linear", 0.5), ("cosine", 0.5)])
def test_what_falls_reaches_zero_only_after_the_last_step(kind: str, halfway: float) -> None:
    rates = [schedule(stage(steps=12, schedule=kind, warmup_steps=2), step) for step in range(2, 13)]
    assert rates[0] == 1
    assert rates[5] == pytest.approx(halfway)
    assert rates[-1] == pytest.approx(0)
    assert rates[-2] > 0
    assert rates == sorted(rates, reverse=True)


def test_linear_and_cosine_differ_between() -> None:
    assert schedule(stage(schedule="cosine"), 2) > schedule(stage(schedule="linear"), 2)


def test_a_stage_of_nothing_but_warm_up_has_a_rate() -> None:
    rates = [schedule(stage(steps=3, warmup_steps=3, schedule="linear"), step) for step in range(3)]
    assert rates == [0.25, 0.5, 0.75]


# Groups


class Fake(nn.Module):
    """The parts of a model with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Linear(2, 2)
        self.tokens = nn.Parameter(torch.zeros(3, 2))
        self.heads = nn.ModuleDict({"audio": nn.Linear(2, 2), "pitch": nn.Linear(2, 2)})

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "lora": list(self.lora.parameters()),
            "tokens": [self.tokens],
            "heads.audio": list(self.heads["audio"].parameters()),
            "heads.pitch": list(self.heads["pitch"].parameters()),
        }


def rates_of(model: Fake, chosen: StageSpec, decay: float = 0.1) -> dict[str, tuple[float, float]]:
    """Peak rate and weight decay of every parameter that learns."""
    groups, named = group_parameters(model, chosen, decay)  # type: ignore[arg-type]
    of = {id(p): (g["peak"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in groups), "a parameter is in two groups"
    return {name: of[id(p)] for name, p in named.items()}


def test_heads_of_inactive_experts_are_left_out() -> None:
    found = rates_of(Fake(), stage())
    assert set(found) == {"lora.weight", "lora.bias", "tokens", "heads.audio.weight", "heads.audio.bias"}


def test_matrices_decay_and_vectors_do_not() -> None:
    found = rates_of(Fake(), stage())
    assert {name for name, (_, decay) in found.items() if decay} == {"lora.weight", "tokens", "heads.audio.weight"}
    assert {decay for _, decay in found.values()} == {0.0, 0.1}


def test_each_part_gets_its_own_rate_the_heads_or_the_default() -> None:
    chosen = stage(
        lr={"default": 1.0, "tokens": 2.0, "heads": 3.0, "heads.pitch": 4.0}, weights={"audio": 1.0, "pitch": 1.0}
    )
    found = rates_of(Fake(), chosen)
    assert {name: rate for name, (rate, _) in found.items() if not name.endswith("bias")} == {
        "lora.weight": 1.0,
        "tokens": 2.0,
        "heads.audio.weight": 3.0,
        "heads.pitch.weight": 4.0,
    }


def test_a_rate_for_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(RunError, match=r"stage 'one': lr names projecter, but what learns is: default, heads, "):
        rates_of(Fake(), stage(lr={"default": 1.0, "projecter": 2.0}))


def test_a_stage_in_which_nothing_learns_is_refused() -> None:
    class Frozen(Fake):
        def parts(self) -> dict[str, list[nn.Parameter]]:
            return {"lora": [], "heads.audio": []}

    with pytest.raises(RunError, match=r"stage 'one': nothing learns; check backbone\.train"):
        rates_of(Frozen(), stage(weights={}))


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_wish_and_handlers_come_back(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM changes nothing
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)

    def press_twice() -> None:
        with Stop():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def body() -> None:
        with Stop() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
