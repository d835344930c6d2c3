"""`ablate`: every arm of a study trained and asked for each seed, over as many sittings as it takes.

    OUT/results.json        how far each run is, and the scores; written anew after every change
    OUT/table.md            the table
    OUT/arms/ARM/seed-N/    an ordinary run folder, with its evaluations
    OUT/logs/               what each run printed

What is done is read from the run folders; results.json only tells it, so that losing it loses nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from coatkit import __version__
from coatkit.analysis.ablate_arms import Arm, arms_of
from coatkit.analysis.ablate_job import Ended, Job, work
from coatkit.analysis.ablate_processes import Pool
from coatkit.analysis.ablate_runs import Run, controls_made_of, refuse_changed, runs_of, trained_so_far
from coatkit.analysis.ablate_study import Study
from coatkit.analysis.ablate_table import markdown, score_arms
from coatkit.errors import RunError
from coatkit.evaluation.bootstrap import DRAWS
from coatkit.evaluation.items import refuse_bad, tasks_of_suite
from coatkit.files import from_json, read_text, write_atomic
from coatkit.optimization import Stop

FORMAT = 1
_LINE_EVERY = 60.0
"""Seconds between lines of progress."""


def ablate(
    study: Study,
    *,
    jobs: int = 1,
    in_process: bool = False,
    max_minutes: float | None = None,
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Do what is left of a study, and write its table.

    Args:
        jobs: Runs trained and asked at once, each in a process of its own.
        in_process: One after another in this process: no start-up for each, but one that is killed ends the sitting.
        max_minutes: Begin nothing after so many minutes, and have runs of other processes save and stop.
        restart: Throw away answers that are there; trained runs stay.
        say: Called with lines of progress.

    Returns:
        What is in results.json.

    Raises:
        SpecError: If study, base, suite or an arm is wrong.
        DataError: If rows of the suite are bad.
        RunError: If another process works on the study, or a run in its folder was made from something else.
    """
    if in_process and jobs > 1:
        raise RunError(f"{jobs} jobs need processes of their own; leave out --in-process, or take one job")
    arms, notes = arms_of(study)
    for note in notes:
        say(f"note: {note}")
    tasks = tasks_of_suite(study.suite, study.spec.limit)
    refuse_bad(tasks, skip=False)
    with _alone(study.output) as lock:
        before = _read_results(study.output)
        runs = runs_of(study, arms, tasks, before)
        refuse_changed(runs)
        progress = _Progress(study, arms, runs, before)
        todo = [run for run in runs if run.ended.state != "done" or restart]
        say(f"{study.name}: {len(arms)} arms, {len(study.spec.seeds)} seeds: {len(runs)} runs, {len(todo)} to do")
        progress.write()
        sitting = _Sitting(study, progress, restart, say, max_minutes)
        if in_process:
            sitting.one_by_one(todo)
        else:
            sitting.at_once(todo, jobs, lock)
        return progress.finish()


class _Sitting:
    """Runs worked on until all are done, time is up, or a signal comes."""

    def __init__(
        self,
        study: Study,
        progress: _Progress,
        restart: bool,
        say: Callable[[str], None],
        max_minutes: float | None,
    ) -> None:
        self.study, self.progress, self.restart, self.say = study, progress, restart, say
        self.end = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    @property
    def late(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def one_by_one(self, todo: Sequence[Run]) -> None:
        for run in todo:
            if self.late:
                self.say("time is up; run this again to go on")
                break
            self._begin(run)
            try:
                ended = work(self._job(run), partial(self._take, run))
            except KeyboardInterrupt:
                ended = Ended("stopped")
            self._end(run, ended)
            if ended.state == "stopped":
                break

    def at_once(self, todo: Sequence[Run], jobs: int, lock: int) -> None:
        waiting = list(todo)
        with Stop() as stop, Pool(self.study.output / "logs", jobs, lock) as pool:
            told, line_at = False, time.monotonic() + _LINE_EVERY
            while waiting or pool.running:
                stopping = stop.asked or self.late
                if stopping and not told:
                    why = "stopping" if stop.asked else "time is up"
                    self.say(f"{why}: {len(pool.running)} runs save what they have; run this again to go on")
                    pool.stop()
                    told = True
                if stopping and not pool.running:
                    break
                while waiting and not stopping and len(pool.running) < jobs:
                    run = waiting.pop(0)
                    self._begin(run)
                    pool.start(run.name, self._job(run))
                if time.monotonic() >= line_at:
                    line_at += _LINE_EVERY
                    self.say(", ".join(self._where(run) for run in self.progress.runs if run.name in pool.running))
                for name, ended, running in pool.look():
                    run = next(run for run in self.progress.runs if run.name == name)
                    if running:
                        self._take(run, ended)
                    else:
                        self._end(run, ended)

    def _where(self, run: Run) -> str:
        step, steps = trained_so_far(run.folder)[0], run.arm.spec.total_steps
        return f"{run.name} " + (f"is at step {step} of {steps}" if step < steps else "is asked")

    def _job(self, run: Run) -> Job:
        name = run.name.replace("/", ".")
        return Job(
            base=str(run.arm.base),
            overrides=list(run.arm.overrides[run.seed]),
            suite=str(self.study.suite_path),
            limit=self.study.spec.limit,
            batch=self.study.spec.batch,
            asks=run.asks if self.restart else run.left(),
            restart=self.restart,
            result=str(self.study.output / "logs" / f"{name}.json"),
        )

    def _begin(self, run: Run) -> None:
        step, _ = trained_so_far(run.folder)
        where = f" after step {step} of {run.arm.spec.total_steps}" if step else ""
        self.say(f"{run.name}: begins{where}")
        run.sittings += 1
        run.ended.state, run.ended.reason = "running", ""
        for ask in self._job(run).asks:  # until it is asked, there are no answers of this kind
            run.ended.asked.pop(ask.arm, None)
        self.progress.write()

    def _take(self, run: Run, ended: Ended) -> None:
        """What a run has reached while it goes on."""
        run.ended.asked.update(ended.asked)
        self.progress.write()

    def _end(self, run: Run, ended: Ended) -> None:
        run.minutes += ended.minutes
        run.ended.state, run.ended.reason = ended.state, ended.reason
        run.ended.asked.update(ended.asked)
        self.progress.write()
        left = sum(one.ended.state != "done" for one in self.progress.runs)
        why = f": {ended.reason.splitlines()[0]}" if ended.reason else ""
        self.say(f"{run.name}: {ended.state}{why}; {left} of {len(self.progress.runs)} left")


class _Progress:
    """results.json and table.md."""

    def __init__(self, study: Study, arms: Sequence[Arm], runs: Sequence[Run], before: dict[str, Any]) -> None:
        self.study, self.arms, self.runs = study, arms, runs
        self.tasks: dict[str, Any] = before.get("tasks", {})

    def write(self) -> dict[str, Any]:
        """What is known now; the scores are those of the last sitting until `finish`."""
        study, runs = self.study, {run.name: run.told() for run in self.runs}
        by_name = {arm.name: arm for arm in self.arms}
        about = {arm.name: self._about(arm, by_name[arm.baseline], runs) for arm in self.arms}
        results = {
            "format": FORMAT,
            "coatkit": __version__,
            "name": study.name,
            "base": os.path.relpath(study.base, study.output),
            "suite": os.path.relpath(study.suite_path, study.output),
            "seeds": list(study.spec.seeds),
            "draws": DRAWS,
            "arms": about,
            "controls": {
                name: one for arm in self.arms for name, one in controls_made_of(study, self.arms, arm).items()
            },
            "runs": runs,
            "tasks": self.tasks,
        }
        write_atomic(study.output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        return results

    def finish(self) -> dict[str, Any]:
        """Score what is there, and write the table."""
        evaluations: dict[str, dict[int, Path]] = {}
        baselines: dict[str, str] = {}
        for run in self.runs:
            for ask in run.asks:
                if ask not in run.left():
                    folder = Path(run.ended.asked[ask.arm]["folder"])
                    evaluations.setdefault(ask.arm, {})[run.seed] = folder
                    baselines[ask.arm] = run.arm.baseline
        self.tasks = score_arms(evaluations, baselines)
        results = self.write()
        write_atomic(self.study.output / "table.md", markdown(results))
        return results

    def _about(self, arm: Arm, baseline: Arm, runs: dict[str, Any]) -> dict[str, Any]:
        spec, differs = arm.spec, arm.parts_from(baseline)
        seen = []
        for seed in self.study.spec.seeds:
            mine, its = runs[f"{arm.name}/seed-{seed}"], runs[f"{baseline.name}/seed-{seed}"]
            if mine["step"] == mine["steps"]:
                seen.append(mine["rows"])
                if its["step"] == its["steps"]:
                    differs += [f"{key} with seed {seed}" for key in ("rows", "data") if mine[key] != its[key]]
        return {
            "changes": list(arm.changes),
            "baseline": arm.baseline,
            "experts": list(spec.experts),
            "steps": spec.total_steps,
            "rows": round(sum(seen) / len(seen)) if seen else arm.rows,
            "differs": list(dict.fromkeys(f"{part} ({arm.baseline} has others)" for part in differs)),
        }


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Keep others out of a study's folder; gives the lock's descriptor.

    Processes that train inherit it: a study whose own process was killed stays locked while one of them goes on.

    Raises:
        RunError: If another process has it, or the folder cannot be written.
    """
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{folder}: another process works on this study, or a run that it began still goes on; wait for it"
            ) from None
        yield lock
    finally:
        os.close(lock)


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        data = from_json(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}\n  Remove it: what is done is found again.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{path}: this coatkit reads studies of format {FORMAT}; take another folder with --out")
    return data
