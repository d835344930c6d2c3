"""What stands between the network and the page of `coatkit demo`: it lets through what the page needs, and no more.

gradio serves more than this page asks for: files by path, addresses it fetches on request, a recorder, an editor of its
own source. Here each route that the page uses is named, everything else is not found. A request may name a file only
among those uploaded. Bodies say how long they are beforehand, so nothing larger than the limit is read.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coatkit.files import from_json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_API = "/gradio_api"
UPLOAD, JOIN, FILE = f"{_API}/upload", f"{_API}/queue/join", f"{_API}/file="
EVENTS = f"{_API}/queue/data"
_READ = {
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *(f"{_API}/{name}" for name in ("startup-events", "queue/data", "upload_progress", "app_id")),
}
_READ_UNDER = ("/assets/", "/static/", f"{_API}/heartbeat/", FILE)
_WRITE = {UPLOAD, JOIN, f"{_API}/cancel", f"{_API}/reset"}
_AROUND = 64_000
"""Bytes of a request's body beside the file in it."""
_UPLOADS_KEPT = 40
"""Files of the largest size that are kept at once; older ones are deleted after a while."""
_FORGOTTEN = 1_800.0
"""Seconds after which a file is deleted, whoever left it: gradio does not know of uploads that were cut off."""

HEADERS = {
    # gradio's page holds scripts of its own; nothing that people say is ever put into its markup.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
        " img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:;"
        " connect-src 'self' data: blob:; object-src 'none'; frame-src 'none'; frame-ancestors 'none';"
        " base-uri 'self'; form-action 'self'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI application around gradio's.

    Args:
        app: gradio's.
        uploads: The folder that gradio puts uploads into.
        max_bytes: Of an upload.
        hosts: Names that the page may be asked for by, with port; None for any. A page elsewhere that has its name
            point to this machine is so kept from reading answers.
        functions: Numbers of the page's functions; None for any. gradio answers 500 to others.
    """

    def __init__(
        self,
        app: App,
        uploads: Path,
        max_bytes: int,
        hosts: frozenset[str] | None,
        functions: frozenset[int] | None = None,
    ) -> None:
        self.app, self.max_bytes, self.hosts, self.functions = app, max_bytes, hosts, functions
        self._uploads = os.path.realpath(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no route of the page is a web socket
            return await send({"type": "websocket.close", "code": 1008})
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is None and scope["path"] == JOIN:
            body = await _body(receive)
            refused = self._refused_question(body)
            receive = _again(body, receive)
        if refused is not None:
            return await _say(send, *refused)
        if scope["path"] == EVENTS:
            return await self._events(scope, receive, _with_headers(send))
        await self.app(scope, receive, _with_headers(send))

    async def _events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A session's events. Of a session that it does not know, gradio says so in the stream, and then raises."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if not begun:
                raise
            print(f"note: a stream of events was ended: {type(error).__name__}: {error}"[:200], file=sys.stderr)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason where a request is not let through."""
        host, path, method = headers.get("host", ""), scope["path"], scope["method"]
        if self.hosts is not None and host.lower() not in self.hosts:
            return 403, "This page is not served by that name."
        if method in ("GET", "HEAD"):
            if path not in _READ and not path.startswith(_READ_UNDER):
                return 404, "Not found."
            if path.startswith(FILE) and not self._uploaded(path.removeprefix(FILE)):
                return 404, "Not found."
            return None
        if method != "POST" or path not in _WRITE:
            return 404, "Not found."
        if (origin := headers.get("origin")) is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "Only the page itself may ask."
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return 411, "Say how long the body is."
        limit = _AROUND + (self.max_bytes if path == UPLOAD else 0)
        if int(length) > limit:
            return 413, f"The file is too large; {self.max_bytes / 1e6:g} MB are taken."
        if path == UPLOAD:
            _forget(self._uploads)
        if path == UPLOAD and _size(self._uploads) > _UPLOADS_KEPT * self.max_bytes:
            return 507, "Too many uploads are here at the moment; try again later."
        return None

    def _refused_question(self, body: bytes) -> tuple[int, str] | None:
        try:
            asked = from_json(body)
        except ValueError:
            return 400, "That is no JSON."
        number = asked.get("fn_index") if isinstance(asked, dict) else None
        if self.functions is not None and (type(number) is not int or number not in self.functions):
            return 400, "This page has no such function."
        for path in _paths(asked):
            if not isinstance(path, str) or not self._uploaded(path):
                return 403, "Only files that were uploaded can be asked about."
        return None

    def _uploaded(self, path: str) -> bool:
        """Whether a path is that of an uploaded file, seen through links and dots."""
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):
            return False
        return real.startswith(self._uploads + os.sep) and os.path.isfile(real)


def _paths(value: Any) -> Iterator[Any]:
    """Whatever could be taken for a file's path in data from the page."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def _forget(folder: str) -> None:
    """Delete files that nobody has touched for a while."""
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gradio may be quicker
                path = os.path.join(place, name)
                if time.time() - os.stat(path).st_mtime > _FORGOTTEN:
                    os.unlink(path)


def _size(folder: str) -> int:
    """Bytes of all files in a folder; a file that goes away meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


async def _body(receive: Receive) -> bytes:
    """The whole body; the server has seen to it that it is as long as its header says."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already, and then what comes."""
    given = False

    async def give() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(key, value) for key, value in message.get("headers", ()) if key.decode().lower() not in HEADERS]
            message = {**message, "headers": [*kept, *((k.encode(), v.encode()) for k, v in HEADERS.items())]}
        await send(message)

    return sent


async def _say(send: Send, status: int, reason: str) -> None:
    answer = _with_headers(send)
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await answer({"type": "http.response.start", "status": status, "headers": headers})
    await answer({"type": "http.response.body", "body": reason.encode()})
