"""vLLM's OpenAI-compatible server with an exported run: many clients, bad sounds, and `coatkit ask --server`."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soundfile

if "COATKIT_VLLM_WORK" not in os.environ:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)
WORK = Path(os.environ["COATKIT_VLLM_WORK"])
COATKIT = os.environ["COATKIT_VLLM_COMMAND"]
"""The command `coatkit`, of the environment that coatkit is installed in."""


class Server:
    """A server of a backbone's exported run.

    Attributes:
        cases: What was asked of transformers, and what it answered.
    """

    def __init__(self, use: str, **environment: str) -> None:
        self.folder = WORK / use
        self.cases = {case["name"]: case for case in json.loads((self.folder / "cases.json").read_text())["cases"]}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        # What `vllm serve` starts; that command looks for a package named vllm, which the build for CPUs is not.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder / "model")]
        command += ["--port"]
        command += [self.url.rpartition(":")[2], "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "4096"]
        command += ["--enforce-eager", "--max-num-seqs", "4", "--served-model-name", "tiny"]
        command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
        self.log = (WORK / f"server-{use}.log").open("w")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        for _ in range(240):
            assert self.process.poll() is None, f"the server ended; see {self.log.name}"
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail(f"the server did not start; see {self.log.name}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()

    def post(self, case: dict[str, Any], sounds: list[bytes] | None = None, **more: Any) -> tuple[int, dict[str, Any]]:
        """The status, and what the server says of a case; `sounds` in place of the case's own."""
        waiting = [wav(self.folder / name) for name in case["sounds"]] if sounds is None else list(sounds)
        messages = []
        for message in case["messages"]:
            parts = []
            for part in message["content"]:
                if part["type"] == "audio":
                    data = base64.b64encode(waiting.pop(0)).decode()
                    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
                parts.append(part)
            messages.append({"role": message["role"], "content": parts})
        body = {
            "model": "tiny",
            "messages": messages,
            "max_tokens": 24,
            "temperature": 0,
            "return_token_ids": True,
            **more,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")


def wav(path: Path) -> bytes:
    samples, rate = soundfile.read(path, dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def check(case: dict[str, Any], status: int, reply: dict[str, Any]) -> None:
    assert status == 200, (case["name"], reply)
    assert reply["prompt_token_ids"] == case["prompt"], case["name"]
    assert reply["choices"][0]["token_ids"] == case["answer"], case["name"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server("mini")
    yield made
    made.stop()


def test_every_case_is_answered_as_by_transformers(server: Server) -> None:
    for case in server.cases.values():
        check(case, *server.post(case))


def test_many_clients_at_once_bad_ones_among_them(server: Server) -> None:
    good = [case for case in server.cases.values() if case["name"] != "33.3 s"]
    one = server.cases["1.3 s"]
    bad = [b"", b"no sound at all", wav(server.folder / "1.wav")[:30]]
    work: list[tuple[dict[str, Any], list[bytes] | None]] = [(good[i % len(good)], None) for i in range(24)]
    work += [(one, [bad[i % len(bad)]]) for i in range(12)]
    work = work[::2] + work[1::2]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda job: server.post(*job), work))
    for (case, sounds), (status, reply) in zip(work, replies, strict=True):
        if sounds is None:
            check(case, status, reply)
        else:
            assert 400 <= status < 500, reply
    check(one, *server.post(one))


def test_a_length_from_the_client(server: Server) -> None:
    case = server.cases["4 s"]
    check(case, *server.post(case, chat_template_kwargs={"audio_think_len": case["blocks"][0]}))
    status, reply = server.post(case, chat_template_kwargs={"audio_think_len": 3})
    assert status == 400
    assert "audio_think_len is 3" in json.dumps(reply)


def test_what_is_too_long_is_refused(server: Server) -> None:
    samples, rate = soundfile.read(server.folder / "1.wav", dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, samples.repeat(130)[: 151 * rate], rate, format="WAV", subtype="FLOAT")
    status, reply = server.post(server.cases["1.3 s"], [file.getvalue()])
    assert status == 400, reply
    assert "too long" in json.dumps(reply)


def asked(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([COATKIT, "ask", "--server", server.url, *words], capture_output=True, text=True, env=clean)


def test_coatkit_ask(server: Server) -> None:
    case = server.cases["1.3 s"]
    _, reply = server.post(case)
    done = asked(server, str(server.folder / "1.wav"), "What is heard?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == reply["choices"][0]["message"]["content"].strip()
    long = asked(server, str(server.folder / "1.wav"), "What is heard?", "--think-len", "5")
    assert long.returncode == 3
    assert "refused (400)" in long.stderr
    assert "audio_think_len is 5" in long.stderr
    assert "Traceback" not in long.stderr


def test_latency_by_vllms_own_benchmark(server: Server, tmp_path: Path) -> None:
    place = Path(__file__).parent
    bench = f"env PYTHONPATH={place / 'startup'} {sys.executable} {place / 'bench.py'}"
    command = [COATKIT, "latency", str(server.folder / "run"), "--data", str(server.folder / "train.jsonl")]
    command += ["--ranges", "0-2,2-10", "--rows", "2", "--repeats", "1", "--max-new-tokens", "8", "--exactly"]
    command += ["--server", server.url, "--bench", bench, "--out", str(tmp_path / "out")]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    assert {line["range"] for line in lines} == {"0-2", "2-10"}
    for line in lines:
        case = server.cases[f"{line['sound_s']:g} s"]
        assert line["prompt_tokens"] == len(case["prompt"])
        assert line["forced_prefix"] == case["blocks"][0] + 2
        assert line["decoded_tokens"] == 8
        assert line["ttft_s"] > 0
        assert line["decode_s"] > 0
    assert "CoAT" in (tmp_path / "out/latency.md").read_text()
    wrong = subprocess.run(
        [*command[:-1], str(tmp_path / "two"), "--bench", "no-such-thing"], capture_output=True, text=True, env=clean
    )
    assert wrong.returncode == 3
    assert "no-such-thing: cannot be started" in wrong.stderr


def test_a_stock_server_gives_the_same_when_the_client_gives_the_length() -> None:
    """Without the plugin: the template alone writes the block, and transformers' ids come out."""
    stock = Server("qwen2-audio", VLLM_PLUGINS="none")
    try:
        for name in ("1.3 s", "9.7 s"):
            case = stock.cases[name]
            check(case, *stock.post(case, chat_template_kwargs={"audio_think_len": case["blocks"][0]}))
        case = stock.cases["1.3 s"]
        _, reply = stock.post(case)
        assert len(reply["prompt_token_ids"]) == len(case["prompt"]) - case["blocks"][0] + 1  # nobody expanded it
    finally:
        stock.stop()
