"""Asking a server: what is sent, and what its troubles are called. The servers are real; no model is behind them."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from click.testing import CliRunner

from coatkit.cli import cli
from coatkit.errors import DataError, RunError
from coatkit.serving import ask_server

MakeSound = Callable[..., np.ndarray]


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.reply: tuple[int, Any] = (
            200,
            {"choices": [{"index": 0, "message": {"role": "assistant", "content": " a dog "}}]},
        )
        self.wait = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.give(200, {"object": "list", "data": [{"id": "mine", "object": "model"}]})

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(self.server.wait)
        self.give(*self.server.reply)

    def give(self, status: int, data: Any) -> None:
        text = data.encode() if isinstance(data, str) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def clip(tmp_path: Path, sound: MakeSound) -> Path:
    """Stereo at 44.1 kHz: to be made mono and resampled here."""
    two = np.stack([sound(0.5, 1, 44_100), sound(0.5, 2, 44_100)], 1)
    soundfile.write(tmp_path / "clip.wav", two, 44_100, subtype="FLOAT")
    return tmp_path / "clip.wav"


def test_a_question_is_asked_as_in_training(server: Server, clip: Path) -> None:
    assert ask_server(server.url, clip, "What is heard?", max_new_tokens=9) == "a dog"
    (asked,) = server.asked
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("mine", 9, 0)
    assert "chat_template_kwargs" not in asked
    heard, said = asked["messages"][0]["content"]
    assert said == {"type": "text", "text": "What is heard?"}
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(heard["input_audio"]["data"])), dtype="float32")
    both, _ = soundfile.read(clip, dtype="float32")
    assert rate == 16_000
    np.testing.assert_allclose(samples, soxr.resample(both.mean(1), 44_100, 16_000), atol=1e-6)


def test_the_length_of_the_block_goes_along_when_it_is_given(server: Server, clip: Path) -> None:
    ask_server(f"{server.url}/v1/", clip, "What?", audio_think_len=12, model="other")
    assert server.asked[0]["chat_template_kwargs"] == {"audio_think_len": 12}
    assert server.asked[0]["model"] == "other"


def test_a_conversation_goes_along_turn_by_turn(server: Server, clip: Path) -> None:
    history = [(clip, "What is heard?", "A dog."), (None, "Sure?", "Yes.")]
    ask_server(server.url, clip, "And now?", history=history, audio_think_len=[12, 12])
    (asked,) = server.asked
    assert asked["chat_template_kwargs"] == {"audio_think_len": [12, 12]}
    said = [
        (m["role"], m["content"] if m["role"] == "assistant" else [p.get("text", p["type"]) for p in m["content"]])
        for m in asked["messages"]
    ]
    assert said == [
        ("user", ["input_audio", "What is heard?"]),
        ("assistant", "A dog."),
        ("user", ["Sure?"]),
        ("assistant", "Yes."),
        ("user", ["input_audio", "And now?"]),
    ]


@pytest.mark.parametrize(
    ("turn", "said"),
    [((" ", "Yes."), "a question of the history is empty"), (("Sure?", ""), "an answer of the history is empty")],
)
def test_an_empty_turn_is_told_before_anything_is_sent(server: Server, turn: tuple[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        ask_server(server.url, None, "And now?", history=[(None, *turn)])
    assert not server.asked


def test_the_command_asks_a_server_with_earlier_turns(server: Server, clip: Path) -> None:
    turns = ["--turn", str(clip), "What?", "A dog.", "--turn", "-", "Sure?", "Yes."]
    done = CliRunner().invoke(
        cli, ["ask", "--server", server.url, str(clip), "And?", *turns, "--think-len", "5", "--think-len", "7"]
    )
    assert (done.exit_code, done.output) == (0, "a dog\n")
    (asked,) = server.asked
    assert [len(m["content"]) for m in asked["messages"] if m["role"] == "user"] == [2, 1, 2]
    assert asked["chat_template_kwargs"] == {"audio_think_len": [5, 7]}


def test_text_alone_can_be_asked(server: Server) -> None:
    ask_server(server.url, None, "What is 1 plus 2?")
    assert [part["type"] for part in server.asked[0]["messages"][0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((400, {"error": {"message": "a sound of 700.00 s is too long"}}), r"refused \(400\): a sound of 700.00 s"),
        ((401, {"error": {"message": "who are you?"}}), r"refused \(401\): who are you"),
        ((200, {"choices": []}), "does not answer as OpenAI's API does"),
        ((200, "not json"), "does not answer as OpenAI's API does"),
    ],
)
def test_a_servers_trouble_is_named(server: Server, clip: Path, reply: Any, said: str) -> None:
    server.reply = reply
    with pytest.raises(RunError, match=said):
        ask_server(server.url, clip, "What?")


def test_no_server_and_one_that_never_answers(server: Server, clip: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be reached: .*; is the server running\?"):
        ask_server("http://127.0.0.1:9", clip, "What?")
    server.wait = 1.0
    with pytest.raises(RunError, match=r"gave no answer within 0\.2 s"):
        ask_server(server.url, clip, "What?", timeout=0.2)


def test_what_cannot_be_asked_is_told_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the question is empty"):
        ask_server(server.url, None, " ")
    with pytest.raises(DataError, match="there is no such file"):
        ask_server(server.url, tmp_path / "none.wav", "What?")
    assert not server.asked


def test_the_command_asks_a_server(server: Server, clip: Path) -> None:
    done = CliRunner().invoke(cli, ["ask", "--server", server.url, str(clip), "What?", "--think-len", "5"])
    assert (done.exit_code, done.output) == (0, "a dog\n")
    assert server.asked[0]["chat_template_kwargs"] == {"audio_think_len": 5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--server", "http://x", "run", "a.wav", "q"], "with --server: give AUDIO QUESTION"),
        (["a.wav", "q"], "give RUN AUDIO QUESTION"),
        (["--server", "http://x", "a.wav", "q", "--untrained"], "a server has one model"),
        (["run", "a.wav", "q", "--think-len", "3"], "--think-len: goes with --server"),
        (["run", "a.wav", "q", "--model", "m"], "--model: goes with --server"),
        (["run", "a.wav", "q", "--stream", "--cot"], "--stream: not with --cot or --server"),
    ],
)
def test_words_that_do_not_go_together(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["ask", *arguments])
    assert done.exit_code == 2
    assert said in done.output
