"""Answers rated by a judge, against a real HTTP server on this machine that speaks chat completions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coatkit.analysis.ablate_table import score_arms
from coatkit.cli import cli
from coatkit.errors import CoatkitError, PluginError, RunError, SpecError
from coatkit.evaluation.compare import compare
from coatkit.evaluation.judge import FILE, Ratings, _rate
from coatkit.evaluation.judge_client import JudgeClient, JudgeError
from coatkit.evaluation.metrics import Answer, cannot_score, judge
from coatkit.evaluation.rubric import prompt, read_rating, rubric
from coatkit.evaluation.suite import JudgeSpec, read_judge, read_options, read_suite
from coatkit.infer import AudioThinker

KEY = "sk-test-0123456789abcdef"
Reply = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


def completion(text: Any, **choice: Any) -> Reply:
    """What a server says when all is well."""
    message = {"role": "assistant", "content": text}
    body = {"object": "chat.completion", "model": "stand-in-0", "choices": [{"message": message, **choice}]}
    return 200, {}, json.dumps(body).encode()


def refusal(status: int, message: str = "no", **headers: str) -> Reply:
    """What a server says when it will not."""
    return status, headers, json.dumps({"error": {"message": message}}).encode()


class StandIn:
    """The server, and what it was asked.

    Attributes:
        answer: From a prompt and the number of requests before to a reply; may wait for `released`.
        asked: Path, headers, body and time in seconds of each request.
        most: Most requests that were in the server at once.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Reply] = lambda prompt, number: completion("Fine.\nRating: 3")
        self.asked: list[tuple[str, dict[str, str], dict[str, Any], float]] = []
        self.released, self.most, self.inside, self.lock = threading.Event(), 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are sent apart, and would wait for one another

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.asked)
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    outer.asked.append((self.path, headers, body, time.monotonic()))
                    outer.inside += 1
                    outer.most = max(outer.most, outer.inside)
                try:
                    status, headers, text = outer.answer(body["messages"][0]["content"], number)
                finally:
                    with outer.lock:
                        outer.inside -= 1
                try:
                    self.send_response(status)
                    for item in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(text)),
                        **headers,
                    }.items():
                        self.send_header(*item)
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:  # whoever asked did not wait
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def spec(self, **more: Any) -> JudgeSpec:
        return JudgeSpec.model_validate({"model": "stand-in", "base_url": self.url, "max_retries": 0, **more})

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must not be asked for what is on this machine
    made = StandIn()
    yield made
    made.close()


# The rubric


RATINGS: dict[str, int | str] = {
    "Good.\nRating: 4": 4,
    "rating:0": 0,
    "**Rating:** 5": 5,
    "**Rating: 2**\n": 2,
    "Rating: (3).": 3,
    "Rating:\n1\r\nThat is all.": 1,
    "<think>Rating: 1? No.</think>\nIt fits.\nRating: 4": 4,
    "Rating: 4.5": "the rating '4.5' is no whole number from 0 to 5",
    "Rating: 10": "the rating '10' is",
    "Rating: 7": "the rating '7' is",
    "Rating: -1": "the rating '-1' is",
    "Rating: 4/5": "the rating '4/5' is",
    "Rating: 3 or 4": "the rating '3 or 4' is",
    "Rating: four": "the rating 'four' is",
    "Rating: ٣": "the rating '٣' is",
    "Rating:": "the rating '' is",
    "Rating: 2\nRating: 3": "2 ratings in one reply",
    "I would say Rating: 2. Rating: 2": "2 ratings",
    "I give it a 4.": "no rating in the reply",
    "Overrating: 3": "no rating",
    " \n": "an empty reply",
}


@pytest.mark.parametrize(("reply", "wanted"), RATINGS.items(), ids=map(repr, RATINGS))
def test_a_rating_is_read_strictly(reply: str, wanted: int | str) -> None:
    found = read_rating(reply)
    assert found == wanted if isinstance(wanted, int) else str(found).startswith(wanted)


def test_what_a_judge_is_asked_holds_the_texts_as_they_are() -> None:
    text = prompt("What {answer}?", ["a {question}"], "b\\1 {reference}")
    assert all(part in text for part in ("<question>\nWhat {answer}?\n</", "<reference>\na {question}\n</"))
    assert "<answer>\nb\\1 {reference}\n</answer>" in text
    assert "\n1. one\n2. two\n" in prompt("q", ["one", "two"], "a")
    shown = CliRunner().invoke(cli, ["eval", "--show-rubric"])
    assert (shown.exit_code, shown.output) == (0, rubric())


def test_the_score_is_the_mean_rating_times_twenty() -> None:
    found = judge([Answer("a", ("b",), rating=one) for one in (5, None, 2, 0)])
    assert found.value == pytest.approx(20 * 7 / 3)
    assert found.kept.tolist() == [True, False, True, True]
    assert found.read_as == ["5", None, "2", "0"]
    assert found.details["ratings"] == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 0, "5": 1}
    assert cannot_score("judge", Answer("", (" ",)))
    assert not cannot_score("judge", Answer("", ("a", "b")))


# One question


def test_a_question_and_its_rating(server: StandIn) -> None:
    found = JudgeClient(server.spec()).ask("How good?")
    assert (found.rating, found.reply, found.served) == (3, "Fine.\nRating: 3", "stand-in-0")
    (path, headers, body, _), *_ = server.asked
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "stand-in",
        "messages": [{"role": "user", "content": "How good?"}],
        "temperature": 0,
        "max_tokens": 1024,
    }
    JudgeClient(server.spec(temperature=None, max_tokens=None)).ask("How good?")
    assert set(server.asked[1][2]) == {"model", "messages"}


def test_a_busy_server_is_asked_again_when_it_said(server: StandIn) -> None:
    server.answer = lambda prompt, n: (
        refusal(429, "slow down", **{"Retry-After": "1"}) if n == 0 else completion("Rating: 5")
    )
    assert JudgeClient(server.spec(max_retries=1)).ask("x").rating == 5
    assert len(server.asked) == 2
    assert server.asked[1][3] - server.asked[0][3] > 0.95  # without Retry-After it waits half a second at most


BAD: dict[str, tuple[Reply, str, bool]] = {
    "busy": (refusal(429, "slow down"), "HTTP 429: .*slow down", False),
    "error": (refusal(500, "boom"), "HTTP 500: .*boom", False),
    "a page": ((502, {"Content-Type": "text/html"}, b"<html>Bad gateway"), "HTTP 502", False),
    "a refused question": (refusal(400, "too long"), "HTTP 400: .*too long", True),
    "elsewhere": (refusal(302, Location="https://example.invalid/"), "HTTP 302", False),
    "no JSON": ((200, {}, b'{"choices": [{"mess'), "the reply is not JSON: .*mess", False),
    "a page instead": ((200, {"Content-Type": "text/html"}, b"<html>Log in"), "not JSON: <html>Log in", False),
    "other JSON": ((200, {}, b"[1]"), r"no chat completion: \[1\]", False),
    "deep JSON": ((200, {}, b"[" * 100_000), "not JSON", False),
    "no choices": ((200, {}, b'{"choices": []}'), "no chat completion", False),
    "no message": ((200, {}, b'{"choices": [{"message": null}]}'), "no chat completion", False),
    "no text": (completion(None), "an empty reply", True),
    "parts for text": (completion([{"type": "text", "text": "Rating: 3"}]), "no chat completion", False),
    "no such rating": (completion("Rating: 7"), "the rating '7' is no whole number", True),
    "two ratings": (completion("Rating: 1\nRating: 2"), "2 ratings in one reply", True),
    "cut off": (completion("Rating: 4", finish_reason="length"), "cut off at max_tokens 1024", True),
    "stopped by a filter": (completion("Rating: 4", finish_reason="content_filter"), "cut off: content_filter", True),
}


@pytest.mark.parametrize(("reply", "reason", "reached"), BAD.values(), ids=BAD)
def test_what_is_no_rating_is_a_failure_with_a_reason(
    server: StandIn, reply: Reply, reason: str, reached: bool
) -> None:
    server.answer = lambda prompt, number: reply
    found = JudgeClient(server.spec()).ask("x")
    assert (found.rating, found.reached) == (None, reached)
    assert re.search(reason, found.reason), found.reason
    assert len(server.asked) == 1


def test_errors_of_the_server_are_tried_again_so_often(server: StandIn) -> None:
    server.answer = lambda prompt, number: refusal(500)
    assert JudgeClient(server.spec(max_retries=1)).ask("x").rating is None
    assert len(server.asked) == 2


def test_a_server_that_does_not_reply_is_not_waited_for(server: StandIn) -> None:
    def wait(prompt: str, number: int) -> Reply:
        server.released.wait(60)
        return completion("Rating: 3")

    server.answer = wait
    found = JudgeClient(server.spec(timeout=0.3)).ask("x")
    assert (found.rating, found.reason, found.reached) == (None, "no reply within 0.3 s", False)


def test_nobody_there(server: StandIn) -> None:
    spec = server.spec()
    server.close()
    found = JudgeClient(spec).ask("x")
    assert (found.rating, found.reached) == (None, False)
    assert "refused" in found.reason


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_other_question_would_mend_stops_at_once_and_hides_the_key(server: StandIn, status: int) -> None:
    server.answer = lambda prompt, number: refusal(status, f"not with {KEY}")
    with pytest.raises(JudgeError) as stopped:
        JudgeClient(server.spec(max_retries=5)).ask("x")
    said = str(stopped.value)
    assert f"HTTP {status}" in said
    assert KEY not in said
    assert "***" in said
    assert ("base_url" if status == 404 else "OPENAI_API_KEY") in said
    assert len(server.asked) == 1


def test_half_a_character_in_a_reply_can_be_written(server: StandIn, tmp_path: Path) -> None:
    server.answer = lambda prompt, number: completion("\ud83d Rating: 2")
    found = JudgeClient(server.spec()).ask("x")
    Ratings(tmp_path / FILE).add("k", found, "stand-in")
    assert Ratings(tmp_path / FILE).found["k"]["reply"] == "? Rating: 2"


# The key


def test_a_key_comes_from_the_environment_alone(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_API_KEY", "another-key-of-mine")
    JudgeClient(server.spec(key_env="OTHER_API_KEY")).ask("x")
    monkeypatch.delenv("OPENAI_API_KEY")
    JudgeClient(server.spec()).ask("x")  # a server on this machine may want none
    assert [asked[1]["authorization"] for asked in server.asked] == ["Bearer another-key-of-mine", "Bearer none"]
    with pytest.raises(JudgeError, match="set the environment variable OPENAI_API_KEY"):
        JudgeClient(JudgeSpec(model="m"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nsk-two")
    with pytest.raises(JudgeError, match="such as a line break") as stopped:
        JudgeClient(server.spec())
    assert "sk-one" not in str(stopped.value)


def test_what_is_for_the_librarys_own_service_goes_nowhere_else(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "my-organization")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "my-project")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: abc-def\nX-Other: ghi-jkl")
    assert JudgeClient(server.spec()).ask("x").rating is not None
    sent = str(server.asked[0][1]).lower()
    assert not [word for word in ("my-organization", "my-project", "abc-def", "ghi-jkl") if word in sent]


SECRET = "sk-very-secret"
WRONG: dict[str, tuple[str, str]] = {
    "a key": (f"model: m, api_key: {SECRET}", "a key does not belong here: set the environment variable"),
    "a token": (f"model: m, token: {SECRET}", "a key does not belong here"),
    "a secret that is no key of a judge": ("model: m, key_env: AWS_SECRET_ACCESS_KEY", "does not end in API_KEY"),
    "a key for its name": (f"model: m, key_env: {SECRET}", "name of an environment variable, not the key itself"),
    "a password": (f"model: m, base_url: 'https://me:{SECRET}@host/v1'", "takes no user, password or query"),
    "a query": (f"model: m, base_url: 'https://host/v1?key={SECRET}'", "takes no user, password or query"),
    "http": ("model: m, base_url: http://host/v1", "allow_http: true"),
    "http to a name like ours": ("model: m, base_url: http://localhost.example.com/v1", "allow_http"),
    "ftp": ("model: m, base_url: ftp://host", "must be the address of an endpoint"),
    "a wrong port": ("model: m, base_url: https://host:x/v1", "must be the address of an endpoint"),
    "no model": ("temperature: 0", "judge.model: missing"),
    "a near name": ("model: m, max_token: 3", "did you mean 'max_tokens'?"),
    "no tries": ("model: m, concurrency: 0", "judge.concurrency: input should be greater than or equal to 1"),
}
SUITE = "tasks:\n  - {name: open, data: test.jsonl, metric: judge, max_new_tokens: 6}\n"


@pytest.mark.parametrize(("keys", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_judge_is_told_by_line_and_no_key_repeated(tmp_path: Path, keys: str, reason: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(f"{SUITE}judge: {{{keys}}}\n")
    with pytest.raises(SpecError) as stopped:
        read_suite(path)
    said = str(stopped.value)
    assert f"{path}:3: judge" in said
    assert reason in said
    assert SECRET not in said
    given = [pair.strip().replace(": ", "=", 1).replace("'", "") for pair in keys.split(",")]
    with pytest.raises(SpecError) as stopped:
        read_judge(read_options(given))
    assert "--judge" in str(stopped.value)
    assert SECRET not in str(stopped.value)
    if reason.startswith(("a key", "name", "takes")):
        assert reason in str(stopped.value)


def test_a_suite_and_its_judge_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    with pytest.raises(SpecError, match=r"judge: missing; task 'open' has the metric judge"):
        read_suite(path)
    put = read_options(["model=m", "base_url=http://localhost:1/v1", "max_tokens=null", "concurrency=2"])
    found = read_suite(path, put).judge
    assert found is not None
    assert (found.max_tokens, found.concurrency) == (None, 2)
    assert found == read_judge(put)
    path.write_text(f"{SUITE}judge: {{model: m, temperature: 1}}\n")
    found = read_suite(path, {"model": "n"}).judge
    assert found is not None
    assert (found.model, found.temperature) == ("n", 1)
    with pytest.raises(SpecError, match=r"--judge: judge\.modle: unknown key; did you mean 'model'"):
        read_suite(path, {"modle": "n"})
    path.write_text(path.read_text().replace("metric: judge", "metric: exact"))
    with pytest.raises(SpecError, match="no task has the metric judge"):
        read_suite(path)
    with pytest.raises(SpecError, match=r"number 1: expected KEY=VALUE") as stopped:
        read_options([SECRET])
    assert SECRET not in str(stopped.value)
    ours = ["http://localhost:8/v1", "http://127.0.0.2/v1", "HTTP://[::1]:80/v1"]
    assert all(JudgeSpec(model="m", base_url=url) for url in ours)
    assert JudgeSpec(model="m", base_url="http://host/v1", allow_http=True)


def test_without_the_library_the_extra_is_named(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(PluginError, match=r"pip install 'coatkit\[judge\]'"):
        JudgeClient(server.spec())


# Many questions


def many(server: StandIn, count: int, folder: Path, **more: Any) -> tuple[dict[str, str], Ratings]:
    """The failures of so many questions `0`, `1`, ..., and the ratings."""
    ratings = Ratings(folder / FILE)
    return _rate(
        server.spec(**more), {str(i): str(i) for i in range(count)}, ratings, lambda done, total: None
    ), ratings


def test_no_more_are_asked_at_once_than_allowed(server: StandIn, tmp_path: Path) -> None:
    three = threading.Barrier(3, timeout=30)

    def together(prompt: str, number: int) -> Reply:
        three.wait()  # goes on when three are here, and fails if they never are
        time.sleep(0.1)  # for a fourth to be seen
        return completion("Rating: 3")

    server.answer = together
    failed, ratings = many(server, 12, tmp_path, concurrency=3)
    assert (failed, len(ratings.found), server.most) == ({}, 12, 3)


def test_a_judge_out_of_reach_is_given_up(server: StandIn, tmp_path: Path) -> None:
    server.answer = lambda prompt, number: completion("Rating: 3") if number < 5 else refusal(500, "boom")
    with pytest.raises(JudgeError, match=r"(?s)gave no rating 20 times in a row:\n  20 x HTTP 500.*boom.*goes on"):
        many(server, 100, tmp_path, concurrency=2)
    assert 25 <= len(server.asked) < 50  # two at once, and those that were on their way when it was noticed
    assert len(Ratings(tmp_path / FILE).found) == 5
    server.answer = lambda prompt, number: completion("Rating: 3")
    failed, ratings = many(server, 100, tmp_path)
    assert (failed, len(ratings.found)) == ({}, 100)


def test_a_judge_that_never_rates_is_given_up_but_not_one_that_sometimes_does(server: StandIn, tmp_path: Path) -> None:
    server.answer = lambda prompt, number: completion("It is fine.")
    with pytest.raises(JudgeError, match="20 x no rating in the reply"):
        many(server, 100, tmp_path, concurrency=1)
    assert len(server.asked) <= 21
    server.answer = lambda prompt, number: completion("Rating: 0" if prompt == "0" else "It is fine.")
    failed, ratings = many(server, 60, tmp_path, concurrency=1)
    assert (len(failed), list(ratings.found)) == (59, ["0"])
    server.asked.clear()
    failed, _ = many(server, 60, tmp_path, concurrency=1)  # rated before: all that failed are asked again
    assert (len(failed), len(server.asked)) == (59, 59)


def test_a_refused_key_stops_the_others(server: StandIn, tmp_path: Path) -> None:
    server.answer = lambda prompt, number: completion("Rating: 3") if number < 3 else refusal(401)
    with pytest.raises(JudgeError, match="refuses the key"):
        many(server, 500, tmp_path, concurrency=4)
    assert len(server.asked) < 50
    assert len(Ratings(tmp_path / FILE).found) <= 3


def test_a_damaged_line_is_named_and_a_cut_off_one_dropped(tmp_path: Path) -> None:
    path, good = tmp_path / FILE, '{"key": "a", "rating": 3}\n'
    path.write_text(good + '{"key": "b", "rati')
    assert list(Ratings(path).found) == ["a"]
    assert path.read_text() == good
    path.write_text('{"key": "b", "rati')
    assert not Ratings(path).found
    for damage in ("{", "[]", '{"key": "b"}', '{"key": "b", "rating": 6}', '{"key": "b", "rating": true}'):
        path.write_text(f"{good}{damage}\n{good}")
        with pytest.raises(RunError, match=rf"{FILE}:2: damaged; take the line out"):
            Ratings(path)


# Evaluations


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Any:
    """A project with a run that learnt next to nothing, and five rows to ask: about four clips, and one in words."""
    project = new_project()
    project.spec["stages"] = [{"name": "one", "steps": 1, "lr": 1e-3, "batch": {"rows": 2}, "weights": {"audio": 0.1}}]
    project.spec["experts"] = {"audio": {}}
    project.run = project.train()
    rows = [*project.rows[:4], project.rows[-1]]
    (project.folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project.folder / "suite.yaml").write_text(SUITE + "judge: {model: stand-in, base_url: http://localhost:1/v1}\n")
    return project


CLIP = re.compile(r"<reference>\nclip (\d)")


def by_clip(*ratings: Any) -> Callable[[str, int], Reply]:
    """Replies with the rating of each clip, and 5 where there is none; a reply in place of a rating is sent as is."""

    def answer(prompt: str, number: int) -> Reply:
        clip = CLIP.search(prompt)
        rating = ratings[int(clip[1])] if clip else 5
        return rating if isinstance(rating, tuple) else completion(f"So so.\nRating: {rating}")

    return answer


@pytest.fixture
def evaluate(trained: Any, server: StandIn) -> Callable[..., str]:
    """Runs `coatkit eval` on the suite with the stand-in; what it said. An error it foresaw is raised."""

    def run(out: Path, *words: str, data: str = "suite.yaml") -> str:
        command = ["eval", trained.run.folder, "--data", trained.folder / data, "--out", out, "--batch", 5]
        command += ["--judge", f"base_url={server.url}", "--judge", "max_retries=0", *words]
        result = CliRunner().invoke(cli, [str(one) for one in command])
        assert KEY not in result.output
        if isinstance(result.exception, CoatkitError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return str(result.output)

    return run


def results_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text())["tasks"]["open"])


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_answers_are_rated_and_not_twice(
    server: StandIn, evaluate: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = by_clip(0, 1, 4, completion(f"Your key is {KEY}.\nRating: 5"))
    said = evaluate(tmp_path)
    assert re.search(r"open +judge +5 +60\.0", said)
    assert "asking the judge about 5 answers" in said
    found = results_of(tmp_path)
    assert (found["score"], found["rows"], found["judge_failures"], found["empty_references"]) == (60, 5, 0, 0)
    assert found["low"] < 60 < found["high"]
    assert found["details"]["ratings"] == {"0": 1, "1": 1, "2": 0, "3": 0, "4": 1, "5": 2}
    assert found["judge"]["model"] == "stand-in"
    lines = lines_of(tmp_path)
    assert [(line["rating"], line["score"]) for line in lines] == [(0, 0), (1, 20), (4, 80), (5, 100), (5, 100)]
    assert lines[3]["judge_reply"] == "Your key is ***.\nRating: 5"
    prompts = [body["messages"][0]["content"] for _, _, body, _ in server.asked]
    assert sorted(prompts) == sorted(prompt(x["question"], x["references"], x["answer"]) for x in lines)
    before = files_of(tmp_path)
    assert not [name for name, content in before.items() if KEY.encode() in content]
    assert {"judge.jsonl", "predictions.jsonl", "results.json", "eval.json"} <= before.keys()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "5 rated already" in evaluate(tmp_path)
    assert len(server.asked) == 5
    assert files_of(tmp_path) == before


def test_failures_are_counted_left_out_and_asked_again(
    server: StandIn, evaluate: Callable[..., str], tmp_path: Path
) -> None:
    server.answer = by_clip(3, refusal(400, f"cannot with {KEY}"), completion("Rating: 7"), 1)
    said = evaluate(tmp_path)
    assert "open: 2 answers have no rating and do not count; the same command asks for them again" in said
    found = results_of(tmp_path)
    assert (found["score"], found["rows"], found["judge_failures"]) == (60, 3, 2)
    assert len(found["judge_failure_reasons"]) == 2
    assert found["empty_references"] == 0
    lines = lines_of(tmp_path)
    assert [line.get("rating") for line in lines] == [3, None, None, 1, 5]
    assert [line["score"] for line in lines] == [60, None, None, 20, 100]
    assert "HTTP 400" in lines[1]["judge_failure"]
    assert not [name for name, content in files_of(tmp_path).items() if KEY.encode() in content]
    server.asked.clear()
    server.answer = by_clip(9, 0, 2, 9)
    evaluate(tmp_path)
    assert len(server.asked) == 2
    found = results_of(tmp_path)
    assert (found["score"], found["rows"], found["judge_failures"]) == (pytest.approx(100 * 11 / 25), 5, 0)
    assert "judge_failure" not in (tmp_path / "predictions.jsonl").read_text()


def test_a_judge_that_rates_nothing_is_an_error_and_the_answers_are_kept(
    server: StandIn, evaluate: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda prompt, number: completion("Fine.") if number else refusal(503)
    with pytest.raises(
        JudgeError, match=r"task 'open': the judge rated no answer of 5:\n  4 x no rating in the reply\n"
    ):
        evaluate(tmp_path)
    assert len(lines_of(tmp_path)) == 5
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(RunError, match="not finished"):
        compare(tmp_path, tmp_path)
    monkeypatch.setattr(AudioThinker, "answer", lambda *a, **k: pytest.fail("asked again"))
    server.answer = by_clip(1, 1, 1, 1)
    evaluate(tmp_path)
    assert results_of(tmp_path)["rows"] == 5


def test_another_judge_or_rubric_rates_anew_but_not_another_address(
    server: StandIn, evaluate: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = by_clip(1, 1, 1, 1)
    counts = []

    def count(*words: str) -> None:
        server.asked.clear()
        evaluate(tmp_path, *words)
        counts.append(len(server.asked))

    count()
    monkeypatch.setattr(AudioThinker, "answer", lambda *a, **k: pytest.fail("asked again"))
    count("--judge", f"base_url={server.url}/", "--judge", "concurrency=2")
    count("--judge", "model=other")
    count("--judge", "temperature=1")
    count()
    assert counts == [5, 0, 5, 5, 0]
    text = rubric()
    monkeypatch.setattr("coatkit.evaluation.rubric.rubric", lambda: text.replace("5: it is", "5: it is all"))
    count()
    assert counts[-1] == 5


def test_rows_alike_are_rated_once(trained: Any, server: StandIn, evaluate: Callable[..., str], tmp_path: Path) -> None:
    row = trained.rows[-1]
    rows = "".join(json.dumps({**row, "id": f"same{i}", "metric": "judge"}) + "\n" for i in range(3))
    (trained.folder / "alike.jsonl").write_text(rows)
    evaluate(tmp_path, "--judge", "model=m", data="alike.jsonl")
    assert len(server.asked) == 1
    assert [line["rating"] for line in lines_of(tmp_path)] == [3, 3, 3]
    with pytest.raises(SpecError, match="--judge model: missing"):
        evaluate(tmp_path, data="alike.jsonl")
    with pytest.raises(SpecError, match="no row has the metric judge"):
        evaluate(tmp_path, "--judge", "model=m", "--metric", "exact", data="alike.jsonl")


def test_what_is_missing_is_told_before_the_model_is_loaded(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("coatkit.infer.load", lambda *a, **k: pytest.fail("loaded"))
    command = ["eval", str(trained.run.folder), "--data", str(trained.folder / "test.jsonl"), "--metric", "judge"]
    for words, said in (([], "needs a judge"), (["--judge", "model=m"], "set the environment variable OPENAI_API_KEY")):
        result = CliRunner().invoke(cli, [*command, *words, "--out", str(tmp_path)])
        assert isinstance(result.exception, JudgeError)
        assert said in str(result.exception)


def test_killed_in_the_middle_it_goes_on(
    trained: Any, server: StandIn, evaluate: Callable[..., str], tmp_path: Path
) -> None:
    server.answer = ratings = by_clip(0, 1, 4, 2)
    evaluate(tmp_path / "whole", "--judge", "concurrency=1")
    server.asked.clear()
    out, alive = tmp_path / "out", threading.Event()

    def kill(prompt: str, number: int) -> Reply:
        if number == 3:
            alive.wait(60)
            process.kill()
            process.wait()
        return ratings(prompt, number)

    server.answer = kill
    command = [sys.executable, "-m", "coatkit", "eval", trained.run.folder, "--data", trained.folder / "suite.yaml"]
    command += ["--out", out, "--batch", "5", "--judge", f"base_url={server.url}", "--judge", "max_retries=0"]
    command += ["--judge", "concurrency=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(one) for one in command], env=environment, stderr=subprocess.PIPE)
    alive.set()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    kept = len((out / FILE).read_text().splitlines())
    assert kept <= 3  # what came in just before the end may not have been written yet
    with (out / FILE).open("a") as file:  # as if it had died while writing
        file.write('{"key": "0')
    server.asked.clear()
    server.answer = ratings
    evaluate(out, "--judge", "concurrency=1")
    assert len(server.asked) == 5 - kept
    for name in (FILE, "predictions.jsonl", "results.json", "eval.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_judged_evaluations_are_compared_on_what_both_have(
    server: StandIn, evaluate: Callable[..., str], tmp_path: Path
) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    server.answer = by_clip(0, refusal(400), 2, 2)
    evaluate(one)
    server.answer = by_clip(1, 5, 2, completion("no"))
    evaluate(two)
    metric, pair = compare(one, two)["open"]
    assert (metric, pair.rows, pair.left_out) == ("judge", 3, 2)
    assert (pair.first, pair.second) == (pytest.approx(20 * 7 / 3), pytest.approx(20 * 8 / 3))
    said = CliRunner().invoke(cli, ["compare", str(one), str(two)]).output
    assert "open: 2 rows left out that the judge did not rate in both" in said
    arms = score_arms({"a": {0: one}, "b": {0: two}}, {"a": "a", "b": "a"}, 100)["open"]["arms"]
    assert arms["a"]["score"] == pytest.approx(pair.first)
    assert arms["b"]["difference"]["points"] == pytest.approx(pair.difference)
    evaluate(other, "--judge", "model=m")
    with pytest.raises(RunError, match=r"differ in judge: .*'stand-in'.*'m'"):
        compare(one, other)
    server.answer = by_clip(refusal(400), refusal(400), refusal(400), 1)
    evaluate(tmp_path / "little")
    server.answer = lambda prompt, number: completion("Rating: 1") if "clip 0" in prompt else refusal(400)
    evaluate(tmp_path / "less")
    with pytest.raises(RunError, match="no row was rated by the judge in all evaluations"):
        compare(tmp_path / "little", tmp_path / "less")
