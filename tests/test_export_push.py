"""Uploading an export, to a local server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from coatkit.errors import RunError
from coatkit.export.hub import push

TOKEN = "hf_this_is_a_secret"


class Hub(ThreadingHTTPServer):
    """What was asked of it, and the files it was given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.there: list[str] = []
        self.deleted: set[str] = set()
        self.refuses = 0
        self.private = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            return self.give({"error": "You may not."}, self.server.refuses)
        if self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "deletedFile":
                    self.server.deleted.add(entry["value"]["path"])
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.give({"commitUrl": f"{self.server.address}/me/model/commit/abc", "commitOid": "abc"})
        data = json.loads(body or b"{}")
        self.server.asked.append((self.path, data))
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in data["files"]]
            return self.give({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        return self.give({"url": f"{self.server.address}/me/model", "errors": [], "warnings": []})

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            return self.give([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.there])
        return self.give({"id": "me/model", "sha": "0" * 40, "siblings": [], "private": self.server.private})

    def give(self, answer: Any, status: int = 200) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (made / "adapter_config.json").write_text("{}")
    return made


def test_every_file_is_uploaded(hub: Hub, folder: Path) -> None:
    assert push(folder, "me/model", private=True) == f"{hub.address}/me/model/commit/abc"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    created = next(data for path, data in hub.asked if path == "/api/repos/create")
    assert created["name"] == "model"
    assert created["organization"] == "me"
    assert created["visibility"] == "private"


def test_weights_of_an_earlier_export_do_not_stay(hub: Hub, folder: Path) -> None:
    hub.there = [
        "README.md",
        "notes.md",
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors",
        "config.json",
    ]
    push(folder, "me/model")
    assert hub.deleted == {"adapter_model.safetensors", "model-00001-of-00002.safetensors", "config.json"}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_names_the_remedy_and_no_secret(hub: Hub, folder: Path, status: int) -> None:
    hub.refuses = status
    with pytest.raises(RunError, match="the hub refused") as raised:
        push(folder, "me/model")
    assert f"hf upload me/model {folder}" in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert (folder / "README.md").exists()


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, folder: Path) -> None:
    hub.private = False
    with pytest.raises(RunError, match="is a public repository already"):
        push(folder, "me/model", private=True)
    assert not hub.files


def test_a_wrong_name_is_told(hub: Hub, folder: Path) -> None:
    for name in ("a/b/c", "model", "-me/model"):
        with pytest.raises(RunError, match=f"--push {name}:"):
            push(folder, name)


def test_no_hub_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RunError, match="the hub cannot be reached"):
        push(folder, "me/model")
