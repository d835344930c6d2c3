"""A real YAML language server, as editors run it, on specs that name the committed schema. `make test-editor`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HEADER = "# yaml-language-server: $schema=coatkit.schema.json\n"
SPEC = """\
name: one
backbone: {use: mini}
experts:
  basic-pitch: {aux_weight: 0.5}
data: {train: a.jsonl}
stages:
  - {name: a, steps: 3, lr: 1.0e-3}
output: runs/one
"""


class Editor:
    """A client that speaks just enough of the protocol."""

    def __init__(self, server: str, folder: Path) -> None:
        self.process = subprocess.Popen([server, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.folder = folder
        self.count = 0
        self.opened = 0
        self.told: dict[str, list[dict[str, Any]]] = {}
        self.ask("initialize", processId=os.getpid(), rootUri=folder.as_uri(), capabilities={})
        self.tell("initialized")

    def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next message; what the server asks is answered on the way, and diagnostics are kept."""
        assert self.process.stdout is not None
        size = 0
        while line := self.process.stdout.readline().strip():
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        assert size, "the language server ended"
        message: dict[str, Any] = json.loads(self.process.stdout.read(size))
        if "method" in message and "id" in message:
            items = message.get("params", {}).get("items", [])
            self.send(id=message["id"], result=[{"validate": True, "completion": True} for _ in items] or None)
        if message.get("method") == "textDocument/publishDiagnostics":
            self.told[message["params"]["uri"]] = message["params"]["diagnostics"]
        return message

    def ask(self, method: str, **params: Any) -> Any:
        self.count += 1
        self.send(id=self.count, method=method, params=params)
        while True:
            message = self.receive()
            if message.get("id") == self.count and "method" not in message:
                assert "error" not in message, message
                return message["result"]

    def tell(self, method: str, **params: Any) -> None:
        self.send(method=method, params=params)

    def open(self, text: str) -> str:
        self.opened += 1
        uri = (self.folder / f"{self.opened}.yaml").as_uri()
        item = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", textDocument=item)
        return uri

    def problems(self, text: str) -> list[tuple[int, str]]:
        """Line (from 1, the header not counted) and text of what is underlined."""
        uri = self.open(text)
        until = time.monotonic() + 60
        while uri not in self.told:
            assert time.monotonic() < until
            self.receive()
        return [(found["range"]["start"]["line"], found["message"]) for found in self.told[uri]]

    def completions(self, text: str) -> list[str]:
        """What is offered at the mark `|`."""
        before, _, after = text.partition("|")
        uri = self.open(before + after)
        lines = before.split("\n")
        place = {"line": len(lines) - 1, "character": len(lines[-1])}
        found = self.ask("textDocument/completion", textDocument={"uri": uri}, position=place)
        return [item["label"] for item in found["items"]]

    def hover(self, text: str) -> str:
        before, _, after = text.partition("|")
        uri = self.open(before + after)
        lines = before.split("\n")
        place = {"line": len(lines) - 1, "character": len(lines[-1])}
        found = self.ask("textDocument/hover", textDocument={"uri": uri}, position=place)
        contents = found["contents"]
        return str(contents["value"] if isinstance(contents, dict) else contents)


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    named = os.environ.get("COATKIT_YAML_SERVER", str(ROOT / ".editor/node_modules/.bin/yaml-language-server"))
    server = shutil.which(named)
    assert server, "there is no yaml-language-server: make test-editor"
    folder = tmp_path_factory.mktemp("editor")
    shutil.copy(EXAMPLES / "coatkit.schema.json", folder)
    client = Editor(server, folder)
    yield client
    client.process.kill()
    client.process.wait()


def test_a_good_spec_is_not_underlined(editor: Editor) -> None:
    assert editor.problems(HEADER + SPEC) == []


@pytest.mark.parametrize("name", ["quickstart/spec.yaml", "paper-experts.yaml", "paper/ablation/block-only.yaml"])
def test_examples_are_not_underlined(editor: Editor, name: str) -> None:
    _, _, text = (EXAMPLES / name).read_text(encoding="utf-8").partition("\n")
    assert editor.problems(HEADER + text) == []


@pytest.mark.parametrize(
    ("right", "wrong", "line", "said"),
    [
        ("steps: 3", "stepz: 3", 7, "stepz"),
        ("steps: 3", "steps: many", 7, "integer"),
        ("aux_weight", "aux_wieght", 4, "aux_wieght"),
        ("use: mini", "use: minni", 2, "Value is not accepted"),
        ("output: runs/one", "outptu: runs/one", 8, "outptu"),
    ],
)
def test_what_is_wrong_is_underlined_in_its_line(editor: Editor, right: str, wrong: str, line: int, said: str) -> None:
    found = editor.problems(HEADER + SPEC.replace(right, wrong))
    assert [message for at, message in found if at == line and said in message], found


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("na|", {"name"}),
        ("backbone:\n  use: |", {"mini", "qwen2-audio"}),
        ("backbone:\n  use: mini\n  |", {"lora", "projector", "source"}),
        ("experts:\n  |", {"basic-pitch", "mert", "audio"}),
        ("experts:\n  basic-pitch:\n    |", {"aux_weight", "focal_gamma", "head"}),
        ("stages:\n  - name: a\n    |", {"steps", "lr", "weights"}),
        ("stages:\n  - name: a\n    schedule: |", {"constant", "linear", "cosine"}),
        ("data:\n  mixture:\n    draw: |", {"rows", "sources"}),
    ],
)
def test_keys_and_values_are_offered(editor: Editor, text: str, offered: set[str]) -> None:
    assert offered <= set(editor.completions(HEADER + text + "\n"))


def test_what_is_not_of_a_plugin_is_not_offered(editor: Editor) -> None:
    assert "aux_weight" not in editor.completions(HEADER + "experts:\n  mert:\n    |\n")


def test_a_key_is_explained_under_the_pointer(editor: Editor) -> None:
    assert "longest sound in seconds (paper: 120)" in editor.hover(HEADER + "data:\n  max_sec|onds: 30\n")
