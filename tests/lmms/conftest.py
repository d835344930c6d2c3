"""A stand-in for a judge: a real HTTP server on this machine that speaks chat completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class StandIn:
    """What it is asked, and what it says.

    Attributes:
        answer: From a prompt to a reply; `None` is a server's error.
        asked: Prompts, as they came.
        settings: What COATKIT_LMMS_JUDGE is set to.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str], str | None] = lambda prompt: "Rating: 3"
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body["messages"][0]["content"])
                said = outer.answer(outer.asked[-1])
                self.send_response(200 if said is not None else 500)
                self.end_headers()
                message = {"role": "assistant", "content": said}
                self.wfile.write(json.dumps({"model": "stand-in", "choices": [{"message": message}]}).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.settings = f"model=stand-in base_url=http://127.0.0.1:{self.server.server_port}/v1 max_retries=0"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def judge() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()
