"""Time to the first token of vLLM with the thinking block and without it, by length of sound: the default backbone.

    make bench-server

Runs in coatkit's environment, two servers in vLLM's (.vllm). `coatkit latency --server` has vLLM's own benchmark ask
them in turn. Writes its table in docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import soundfile
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".vllm/bench"
VLLM = ROOT / ".vllm/bin/python"
COATKIT = [sys.executable, "-m", "coatkit"]
PAGE = ROOT / "docs/serving.md"
MARKS = ("<!-- server: written by `make bench-server` -->\n", "<!-- end of server -->")
SECONDS = (2, 5, 10, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2, help="Sounds of each length.")
    given = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    make_rows(given.rows)
    for name, thinking in (("block", "response_prefix"), ("none", "off")):
        make_model(name, thinking)
    servers = {name: start(name) for name in ("block", "none")}
    try:
        for url, process in servers.values():
            wait_for(url, process)
        bench = f"env PYTHONPATH={ROOT / 'tests/vllm/startup'} {VLLM} {ROOT / 'tests/vllm/bench.py'}"
        command = [
            *COATKIT,
            "latency",
            str(WORK / "block"),
            "--data",
            str(WORK / "rows.jsonl"),
            "--out",
            str(WORK / "out"),
        ]
        command += ["--ranges", "0-3,3-6,6-12,12-31", "--rows", str(given.rows), "--repeats", str(given.repeats)]
        command += ["--max-new-tokens", "8", "--exactly", "--bench", bench]
        command += ["--server", servers["block"][0], "--server", f"vanilla={servers['none'][0]}"]
        subprocess.run(command, check=True)
    finally:
        for _, process in servers.values():
            process.terminate()
            process.wait(60)
    write(given.rows, given.repeats)


def make_rows(count: int) -> None:
    """Noise: what is measured does not depend on what is heard."""
    with (WORK / "rows.jsonl").open("w", encoding="utf-8") as file:
        for seconds in SECONDS:
            for number in range(count):
                name = f"{seconds}-{number}.wav"
                samples = 0.1 * np.random.default_rng([seconds, number]).standard_normal(16_000 * seconds)
                soundfile.write(WORK / name, samples, 16_000)
                talk = [{"role": "user", "content": "<audio>What is heard?"}, {"role": "assistant", "content": "noise"}]
                file.write(json.dumps({"id": name, "audio": name, "messages": talk}) + "\n")


def make_model(name: str, thinking: str) -> None:
    """One step of training, exported: the default weights in their real sizes."""
    spec = {
        "name": name,
        "backbone": {"use": "mini"},
        "thinking": "off" if thinking == "off" else {"placement": thinking},
        "data": {"train": "rows.jsonl"},
        "stages": [{"name": "one", "steps": 1, "lr": 1e-6, "batch": {"rows": 1}}],
        "output": name,
    }
    (WORK / f"{name}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    for command in (["train", f"{name}.yaml"], ["export", name, "--to", f"{name}-model", "--merge"]):
        subprocess.run([*COATKIT, *command], cwd=WORK, check=True, stdout=subprocess.DEVNULL)


def start(name: str) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", str(WORK / f"{name}-model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "4096"]
    command += ["--enforce-eager", "--max-num-seqs", "1", "--served-model-name", name]
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/vllm/startup"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    log = (WORK / f"{name}.log").open("w")
    return f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"a server ended; see the logs in {WORK}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"a server did not start; see the logs in {WORK}")


def write(rows: int, repeats: int) -> None:
    table = (WORK / "out/latency.md").read_text(encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    version = subprocess.run(
        [VLLM, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"],
        capture_output=True,
        text=True,
    )
    said = (
        f"\nmini in float32, vLLM {version.stdout.strip()} on {os.cpu_count()} cores ({platform.machine()}),"
        f" {rows} sounds of each length, {repeats} repeats.\n"
    )
    PAGE.write_text(f"{before}{MARKS[0]}{table}{said}{MARKS[1]}{after}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
