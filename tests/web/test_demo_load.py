"""The page of `coatkit demo` under two hundred requests at once, most of them bad: they are refused, others answered.

`python -m pytest -m web -s tests/web/test_demo_load.py` prints the figures that docs/reliability.md has.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent))

from test_demo_page import Demo

pytestmark = pytest.mark.web

httpx = pytest.importorskip("httpx", reason="httpx is not installed: make test-web")
FIRST_MB, AGAIN_MB = 300, 30
"""Bounds on what the server's memory grows by with the first two hundred, and with two hundred more."""
BUSY = 503
"""What is said beyond the connections that are served at once; whoever means well tries again."""
JOIN, UPLOAD, DATA = "gradio_api/queue/join", "gradio_api/upload", "gradio_api/queue/data"


def wav() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, (0.3 * np.sin(np.arange(8_000) * 0.1)).astype(np.float32), 16_000, format="WAV")
    return out.getvalue()


def question(path: Any, session: str, **more: Any) -> dict[str, Any]:
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [given, "What is heard?", "nothing"], "fn_index": 0, "session_hash": session, "event_data": None}
    return {**body, **more}


class Crowd:
    """Everyone who asks at once.

    Attributes:
        told: By kind, how often which status (or what the page said) came back.
    """

    def __init__(self, demo: Demo) -> None:
        self.demo, self.told = demo, Counter[tuple[str, Any]]()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # No proxy of this machine's environment: it is the server itself that is asked.
        self.client = httpx.AsyncClient(base_url=demo.url, timeout=60, limits=limits, trust_env=False)

    async def patiently(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """Ask again where the server says that it is busy."""
        for _ in range(400):
            try:
                answer = await send()
                if answer.status_code != BUSY:
                    return answer
                self.told["told to come again", BUSY] += 1
            except httpx.TransportError:  # said, and hung up, before all was sent: the client cannot read it then
                self.told["told to come again", "hung up"] += 1
            await asyncio.sleep(0.3)
        raise AssertionError("it is busy for ever")

    async def ask(self, kind: str, number: int, name: str, content: bytes) -> None:
        """Upload, ask, and wait for what the page shows; told as `answered`, or as the page's message."""
        files = {"files": (name, content)}
        answer = await self.patiently(lambda: self.client.post(UPLOAD, files=files))
        (path,) = answer.json()
        for attempt in range(40):
            session = f"{kind}{number}x{attempt}"
            joined = await self.patiently(lambda: self.client.post(JOIN, json=question(path, session)))  # noqa: B023
            if joined.status_code != 200:
                self.told[kind, joined.status_code] += 1
                return
            try:
                found = await self.shown(session)
            except httpx.TransportError:
                found = None
            if found is not None:
                self.told[kind, found] += 1
                return
            await asyncio.sleep(0.5)
        self.told[kind, "never answered"] += 1

    async def shown(self, session: str) -> str | None:
        """What the page shows a session in the end; None where its place in the queue was refused or lost."""
        async with self.client.stream("GET", DATA, params={"session_hash": session}) as answer:
            async for line in answer.aiter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if event.get("msg") != "process_completed":
                    continue
                if not event.get("success"):
                    return None
                message = event["output"]["data"][0]
                return "told why" if isinstance(message, dict) and message.get("visible") else "answered"
        return None

    async def good(self, number: int) -> None:
        await self.ask("a sound and a question", number, "a.wav", wav())

    async def no_sound(self, number: int) -> None:
        content = (b"%PDF-1.7 " * 99, b"", wav()[:50], os.urandom(3_000))[number % 4]
        await self.ask("what is no sound", number, "../../a.wav", content or b"x")

    async def once(self, kind: str, send: Callable[[], Awaitable[Any]]) -> None:
        for _ in range(400):  # the bad ones come again too, so that it is not the limit alone that refuses them
            try:
                status = (await send()).status_code
            except httpx.TransportError:  # it may be told, and hung up on, before all is sent
                status = "hung up"
            if status != BUSY:
                break
            self.told["told to come again", BUSY] += 1
            await asyncio.sleep(0.3)
        self.told[kind, status] += 1

    async def large(self, number: int) -> None:
        files = {"files": ("large.wav", b"x" * 5_000_000)}
        await self.once("5 MB where 0.5 are taken", lambda: self.client.post(UPLOAD, files=files))

    async def elsewhere(self, number: int) -> None:
        path = ("/etc/hostname", f"{self.demo.folder}/../connections", "http://127.0.0.1:1/a", "\0", "a" * 9_000)[
            number % 5
        ]
        asked = question(path, f"elsewhere{number}")
        await self.once("a path in a question", lambda: self.client.post(JOIN, json=asked))

    async def elsewhere_read(self, number: int) -> None:
        path = ("/etc/hostname", f"{self.demo.folder}/../connections", "../../../../etc/hostname")[number % 3]
        await self.once("a path in an address", lambda: self.client.get(f"gradio_api/file={path}"))

    async def wrong(self, number: int) -> None:
        kinds: list[Any] = [[], 7, "x", None, {"data": 7}, {"data": [[], {}, 7]}, {"fn_index": "x", "data": []}]
        kinds += [{"fn_index": 999, "data": [], "session_hash": "w"}, question(None, "w"), question({"path": 7}, "w")]
        kinds += [question("x", "w", data={}), question(["x"], "w", session_hash=7)]
        await self.once("wrong types", lambda: self.client.post(JOIN, json=kinds[number % len(kinds)]))

    async def no_json(self, number: int) -> None:
        content = (b"{", b"[" * 30_000, b"\xff\xfe", b"")[number % 4]
        await self.once("what is no JSON", lambda: self.client.post(JOIN, content=content))

    async def stranger(self, number: int) -> None:
        headers = ({"host": "example.org"}, {"origin": "http://example.org"})[number % 2]
        await self.once("another name or page", lambda: self.client.post(JOIN, json={}, headers=headers))

    async def unknown(self, number: int) -> None:
        async def send() -> Any:
            async with self.client.stream("GET", DATA, params={"session_hash": f"nobody{number}"}) as answer:
                return answer

        await self.once("a session that nobody has", send)

    async def reader(self, number: int) -> None:
        await self.once("the page itself", lambda: self.client.get(("", "config")[number % 2]))

    async def leaving(self, number: int) -> None:
        """Says that a lot will come, sends a little, and goes."""
        place = urlsplit(self.demo.url)
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        length = (400_000, 10**15)[number % 2]
        head = f"POST /{UPLOAD} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {length}\r\n"
        writer.write(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode() + b"x" * 5_000)
        await writer.drain()
        writer.close()
        self.told["gone before the end", "-"] += 1

    async def come(self) -> None:
        """All two hundred at once."""
        kinds = {self.good: 30, self.no_sound: 20, self.large: 20, self.elsewhere: 20, self.elsewhere_read: 15}
        kinds |= {
            self.wrong: 24,
            self.no_json: 12,
            self.stranger: 10,
            self.unknown: 15,
            self.reader: 14,
            self.leaving: 20,
        }
        everyone = [kind(number) for kind, count in kinds.items() for number in range(count)]
        assert len(everyone) == 200
        await asyncio.wait_for(asyncio.gather(*everyone), 400)


def memory(demo: Demo, what: str) -> float:
    """Of the server, in MB: `VmRSS` now or `VmHWM` at its highest."""
    lines = Path(f"/proc/{demo.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def files(demo: Demo) -> int:
    return len(os.listdir(f"/proc/{demo.process.pid}/fd"))


@pytest.fixture
def demo(thinking_run: Any, tmp_path: Path) -> Iterator[Demo]:
    pytest.importorskip("gradio", reason="gradio is not installed: make test-web")
    started = Demo(thinking_run.run.folder, tmp_path)
    yield started
    started.process.kill()
    started.process.wait()


async def crowded(demo: Demo) -> tuple[Crowd, dict[str, float]]:
    crowd = Crowd(demo)
    await crowd.good(1_000)  # the first answer brings what every later one uses
    crowd.told.clear()
    figures = {"before": memory(demo, "VmRSS"), "files before": files(demo)}
    began = time.monotonic()
    await crowd.come()
    figures["seconds"] = time.monotonic() - began
    await asyncio.sleep(6)
    figures |= {"once": memory(demo, "VmRSS"), "files once": files(demo)}
    await crowd.come()  # what grows now, would grow for ever
    answer = await crowd.client.get("")
    assert answer.status_code == 200
    for number in range(3):
        await crowd.ask("afterwards", number, "a.wav", wav())
    await crowd.client.aclose()
    await asyncio.sleep(6)  # longer than a connection is kept
    figures |= {"highest": memory(demo, "VmHWM"), "after": memory(demo, "VmRSS"), "files after": files(demo)}
    return crowd, figures


def test_two_hundred_at_once_and_it_keeps_answering(demo: Demo) -> None:
    crowd, figures = asyncio.run(crowded(demo))
    for (kind, what), count in sorted(crowd.told.items(), key=str):
        print(f"{kind}: {what} {count}")
    print(figures)
    told = {kind: {what for k, what in crowd.told if k == kind} for kind, _ in crowd.told}
    assert told["a sound and a question"] == {"answered"}
    assert crowd.told["a sound and a question", "answered"] == 60
    assert crowd.told["what is no sound", "told why"] == 40
    assert crowd.told["afterwards", "answered"] == 3
    assert told["5 MB where 0.5 are taken"] <= {413, BUSY, "hung up"}
    assert told["a path in a question"] <= {403, BUSY}
    assert told["a path in an address"] <= {404, BUSY}
    assert told["what is no JSON"] <= {400, BUSY}
    assert told["wrong types"] <= {200, 400, 403, 422, BUSY}
    assert told["another name or page"] <= {403, BUSY}
    assert told["the page itself"] <= {200, BUSY}
    assert not {what for (kind, what) in crowd.told if isinstance(what, int) and what >= 500} - {BUSY}
    assert figures["once"] - figures["before"] < FIRST_MB
    assert figures["highest"] - figures["once"] < AGAIN_MB
    assert figures["files after"] <= figures["files before"] + 2
    assert "Traceback" not in demo.errors.read_text()
    assert "hostname" not in demo.errors.read_text()
    assert demo.end() == 0
    assert not list(demo.folder.glob("coatkit-demo-*"))
