"""Answers rated by a judge: several asked at once, every rating on disk as it comes, failures counted and no rating."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from coatkit.errors import RunError
from coatkit.evaluation.items import Key, Task
from coatkit.evaluation.judge_client import JudgeClient, JudgeError, Judgement, judge_identity, require_judge
from coatkit.evaluation.rubric import HIGHEST, prompt
from coatkit.evaluation.suite import JudgeSpec
from coatkit.files import from_json, sync, without_links

FILE = "judge.jsonl"
_GIVE_UP = 20
"""Failures after which a judge that never rated, or is out of reach, is no longer asked."""


class Ratings:
    """judge.jsonl: one line per rating, appended and synced as it comes.

    A rating is known by the digest of all that was sent: rubric, question, references, answer, model and settings. So
    it serves every row that asks the same, and nothing else.

    Raises:
        RunError: If a line is damaged; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        try:
            text = path.read_bytes() if path.exists() else b""
            whole, newline, rest = text.rpartition(b"\n")
            if rest:  # a crash cut the last line off
                with open(path, "r+b", opener=without_links) as stream:
                    stream.truncate(len(whole) + len(newline))
        except OSError as error:
            raise RunError(f"{path}: cannot be read or repaired: {error.strerror or error}") from None
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                data = from_json(line)
                good = isinstance(data["key"], str) and type(data["rating"]) is int and 0 <= data["rating"] <= HIGHEST
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise RunError(f"{path}:{number}: damaged; take the line out, and its rating is asked for again")
            self.found[data["key"]] = data

    def add(self, key: str, judgement: Judgement, model: str) -> None:
        """Write a rating down, and bring it to the disk."""
        line = {"key": key, "rating": judgement.rating, "reply": judgement.reply, "model": model}
        if judgement.served and judgement.served != model:
            line["served"] = judgement.served
        new = not self.path.exists()
        with open(self.path, "a", encoding="utf-8", opener=without_links) as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync(self.path.parent)
        self.found[key] = line


def require_judges(tasks: Sequence[Task], folder: Path) -> None:
    """Check before hours of asking the model that its judge can be asked.

    Where ratings are there already, none may be missing, and then no judge is needed: it is checked when one is.

    Raises:
        PluginError: If openai is not installed.
        JudgeError: If a task has no judge, or there is no key.
    """
    for task in judged(tasks):
        spec = _judge_of(task)
        if not (folder / FILE).exists() or not (folder / "results.json").exists():
            require_judge(spec)


def judged(tasks: Sequence[Task]) -> list[Task]:
    """The tasks whose answers a judge rates."""
    return [task for task in tasks if task.spec.metric == "judge"]


def _judge_of(task: Task) -> JudgeSpec:
    if task.judge is None:
        raise JudgeError(
            f"task {task.spec.name!r}: the metric judge needs a judge: `judge: {{model: NAME}}` in the suite, or"
            " --judge model=NAME"
        )
    return task.judge


def judge_answers(
    tasks: Sequence[Task],
    lines: Mapping[Key, Mapping[str, Any]],
    folder: Path,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, dict[str, Any]]:
    """What the judge says of every answer to the tasks it rates.

    Args:
        lines: Answers by task and row, as predictions.jsonl has them.
        folder: Where judge.jsonl is kept; ratings that are there are not asked for again.
        say: Called with ratings done and ratings in all, equal questions counted once.

    Returns:
        For each row `rating` and `judge_reply`, or `judge_failure` with the reason why there is no rating.

    Raises:
        JudgeError: If the judge refuses the key or does not know the model, is out of reach, or rated no answer of a
            task. What was rated is kept.
        RunError: If judge.jsonl is damaged.
    """
    if not (todo := judged(tasks)):
        return {}
    ratings = Ratings(folder / FILE)
    asked: dict[Key, str] = {}
    prompts: dict[JudgeSpec, dict[str, str]] = {}
    for task in todo:
        spec = _judge_of(task)
        for item in task.items:
            if "answer" in (line := lines[item.key]):
                text = prompt(item.described()["question"], item.references, line["answer"])
                asked[item.key] = key = _digest(text, spec)
                prompts.setdefault(spec, {})[key] = text
    failed: dict[str, str] = {}
    for spec, texts in prompts.items():
        failed |= _rate(spec, texts, ratings, say)
    found: dict[Key, dict[str, Any]] = {}
    for row, key in asked.items():
        if key in ratings.found:
            known = ratings.found[key]
            found[row] = {"rating": known["rating"], "judge_reply": known.get("reply", "")}
        else:
            found[row] = {"judge_failure": failed[key]}
    for task in todo:
        mine = [found[item.key] for item in task.items if item.key in found]
        if mine and all("judge_failure" in one for one in mine):
            reasons = [one["judge_failure"] for one in mine]
            raise JudgeError(f"task {task.spec.name!r}: the judge rated no answer of {len(mine)}:\n{_most(reasons)}")
    return found


def _digest(text: str, spec: JudgeSpec) -> str:
    known = {"prompt": text, **judge_identity(spec)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _rate(
    spec: JudgeSpec, prompts: Mapping[str, str], ratings: Ratings, say: Callable[[int, int], None]
) -> dict[str, str]:
    """Ask for the ratings that are missing; the reasons of those that failed, by digest."""
    missing = {key: text for key, text in prompts.items() if key not in ratings.found}
    done, total = len(prompts) - len(missing), len(prompts)
    say(done, total)
    if not missing:
        return {}
    client = JudgeClient(spec)
    failed: dict[str, str] = {}
    lost: list[str] = []  # reasons since the judge was last reached
    ever = done > 0
    try:
        with closing(_side_by_side(client.ask, missing, spec.concurrency)) as judgements:
            for key, judgement in judgements:
                if judgement.rating is not None:
                    ratings.add(key, judgement, spec.model)
                    ever = True
                else:
                    failed[key] = judgement.reason
                lost = [] if judgement.reached else [*lost, judgement.reason]
                if len(lost) >= _GIVE_UP or (len(failed) >= _GIVE_UP and not ever):
                    reasons = lost if len(lost) >= _GIVE_UP else list(failed.values())
                    raise JudgeError(
                        f"the judge {spec.model!r} at {spec.base_url} gave no rating {len(reasons)} times in a row:\n"
                        f"{_most(reasons)}\n  What was rated is kept; the same command goes on from there."
                    )
                done += 1
                say(done, total)
    finally:
        client.close()
    return failed


def _side_by_side(
    ask: Callable[[str], Judgement], prompts: Mapping[str, str], most: int
) -> Generator[tuple[str, Judgement]]:
    """Judgements as they come, at most so many asked at once. What a thread raises is raised here.

    The threads are daemons: whoever stops waits for none of them, however long a server lets them wait.
    """
    todo: SimpleQueue[tuple[str, str]] = SimpleQueue()
    for pair in prompts.items():
        todo.put(pair)
    come: SimpleQueue[tuple[str, Judgement | BaseException]] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set() and not todo.empty():
            try:
                key, text = todo.get_nowait()
            except Empty:  # another thread took the last
                return
            try:
                come.put((key, ask(text)))
            except BaseException as error:
                come.put((key, error))

    for i in range(min(most, len(prompts))):
        threading.Thread(target=work, name=f"judge-{i}", daemon=True).start()
    try:
        for _ in prompts:
            key, outcome = come.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield key, outcome
    finally:
        stopped.set()


def _most(reasons: Sequence[str], many: int = 3) -> str:
    """The most frequent reasons, a line each."""
    counted = Counter(reasons).most_common()
    lines = [f"  {count} x {reason}" for reason, count in counted[:many]]
    return "\n".join(lines + ([f"  ... and {len(counted) - many} other reasons"] if len(counted) > many else []))
