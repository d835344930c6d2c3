"""What stands before the page of `coatkit demo`: what is let through to gradio, and what is not."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from coatkit.demo.guard import HEADERS, Guard

QUESTION = "What is heard?"


class Asked:
    """What came through a guard, and what was answered."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, bytes]] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        self.reached.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOWALL")]})
        await send({"type": "http.response.body", "body": b"let through"})

    def status(self, guard: Guard, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        given = {"host": "127.0.0.1:7860", **{k.replace("_", "-"): v for k, v in headers.items() if v}}
        if method == "POST" and "content_length" not in headers:
            given["content-length"] = str(len(body))
        pairs = [(k.encode(), v.encode()) for k, v in given.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": pairs}
        parts, sent = [body[:7], body[7:]], []

        async def receive() -> dict[str, Any]:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(guard(scope, receive, send))
        told = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        assert HEADERS.items() <= told.items()
        return int(sent[0]["status"])


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    (folder / "ab12").mkdir(parents=True)
    (folder / "ab12/a.wav").write_bytes(b"x" * 100)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.wav").symlink_to(tmp_path / "secret.txt")
    return folder


@pytest.fixture
def through() -> Asked:
    return Asked()


@pytest.fixture
def guard(through: Asked, uploads: Path) -> Guard:
    return Guard(through.app, uploads, 1_000_000, frozenset(["127.0.0.1:7860", "localhost:7860"]))


def test_what_the_page_needs_is_let_through(guard: Guard, through: Asked, uploads: Path) -> None:
    for path in ("/", "/config", "/assets/a.js", f"/gradio_api/file={uploads}/ab12/a.wav"):
        assert through.status(guard, "GET", path) == 200
    upload = b"the sound" * 1000
    assert through.status(guard, "POST", "/gradio_api/upload", upload) == 200
    assert through.reached[-1] == ("/gradio_api/upload", upload)
    body = json.dumps({"data": [{"path": f"{uploads}/ab12/a.wav"}, QUESTION], "fn_index": 0}).encode()
    headers = {"origin": "http://127.0.0.1:7860"}
    assert through.status(guard, "POST", "/gradio_api/queue/join", body, **headers) == 200
    assert through.reached[-1] == ("/gradio_api/queue/join", body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=http://example.org/"),
        ("GET", "/gradio_api/custom_component/1/client/component/x"),
        ("GET", "/gradio_api/vibe-code/"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/reply"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/stream/a/b/1/playlist.m3u8"),
        ("PUT", "/gradio_api/upload"),
        ("OPTIONS", "/gradio_api/queue/join"),
        ("GET", "/../etc/hostname"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(guard: Guard, through: Asked, method: str, path: str) -> None:
    assert through.status(guard, method, path) == 404
    assert through.reached == []


@pytest.mark.parametrize(
    "path",
    ["/etc/hostname", "{}/../secret.txt", "{}/link.wav", "{}", "http://example.org/a.wav", "a\0b", "{}/none.wav"],
)
def test_a_path_reaches_no_file_but_uploads(guard: Guard, through: Asked, uploads: Path, path: str) -> None:
    path = path.format(uploads)
    assert through.status(guard, "GET", f"/gradio_api/file={path}") == 404
    for data in ({"path": path}, [{"a": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}], {"path": [path]}):
        body = json.dumps({"data": [data, QUESTION]}).encode()
        assert through.status(guard, "POST", "/gradio_api/queue/join", body) == 403
    assert through.reached == []


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/gradio_api/upload", {"content_length": "1064001"}, 413),
        ("/gradio_api/queue/join", {"content_length": "64001"}, 413),
        ("/gradio_api/upload", {"content_length": ""}, 411),
        ("/gradio_api/upload", {"content_length": "-1"}, 411),
        ("/gradio_api/upload", {"content_length": "10", "transfer_encoding": "chunked"}, 411),
        ("/gradio_api/upload", {"origin": "http://example.org"}, 403),
        ("/gradio_api/upload", {"origin": "null"}, 403),
        ("/gradio_api/upload", {"host": "example.org:7860"}, 403),
        ("/gradio_api/queue/join", {}, 400),
    ],
)
def test_what_is_wrong_with_a_request_is_told_before_it_is_read(
    guard: Guard, through: Asked, path: str, headers: dict[str, str], status: int
) -> None:
    assert through.status(guard, "POST", path, b"[" * 20_000, **headers) == status
    assert through.reached == []


def test_uploads_are_bounded_in_all(guard: Guard, through: Asked, uploads: Path) -> None:
    with (uploads / "large").open("wb") as file:
        os.truncate(file.fileno(), 40_000_001)
    assert through.status(guard, "POST", "/gradio_api/upload", b"x") == 507


@pytest.mark.parametrize("number", [999, "0", True, 0.0, None, [0], {}])
def test_a_function_that_the_page_has_not_is_refused(through: Asked, uploads: Path, number: Any) -> None:
    guard = Guard(through.app, uploads, 1_000_000, None, frozenset([0, 1]))
    for asked in ({"data": [], "fn_index": number}, [number], {"data": []}):
        assert through.status(guard, "POST", "/gradio_api/queue/join", json.dumps(asked).encode()) == 400
    assert through.reached == []
    assert through.status(guard, "POST", "/gradio_api/queue/join", b'{"data": [], "fn_index": 1}') == 200


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_breaks_ends_and_one_that_never_began_is_an_error(
    uploads: Path, capsys: pytest.CaptureFixture[str], begun: bool
) -> None:
    sent: list[Any] = []

    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("no such session")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/gradio_api/queue/data", "headers": []}
    asked = Guard(breaks, uploads, 1_000_000, None)(scope, receive, send)
    if begun:
        asyncio.run(asked)
        assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert capsys.readouterr().err == "note: a stream of events was ended: RuntimeError: no such session\n"
    else:
        with pytest.raises(RuntimeError, match="no such session"):
            asyncio.run(asked)


def test_a_web_socket_is_refused(guard: Guard) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(guard({"type": "websocket", "path": "/"}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
