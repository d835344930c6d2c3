"""Latency of servers, measured by vLLM's own `vllm bench serve`, one request at a time, range by range.

Start the servers with `--no-enable-prefix-caching --mm-processor-cache-gb 0`: else a row asked twice is read once.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from coatkit.analysis.latency import Request
from coatkit.analysis.latency_local import Candidate, Limits, Pool, Say, in_turn, plan_of
from coatkit.errors import RunError
from coatkit.serving import RATE, api_of, ask_ids, wav
from coatkit.thinking import TOKENS

BENCH = "vllm bench serve"
_SHOWN = 600


@dataclass(frozen=True)
class Server:
    """A model that a server serves.

    Attributes:
        url: Without `/v1`.
        name: By which the server knows the model.
        root: Folder or hub name of the model, whose tokenizer the benchmark reads.
        think: Id of the thinking token; None where the model has none.
    """

    url: str
    name: str
    root: str
    think: int | None

    @classmethod
    def at(cls, url: str) -> Server:
        """Ask a server what it serves.

        Raises:
            RunError: If it cannot be reached, or is not vLLM's.
        """
        base = api_of(url).removesuffix("/v1")
        try:
            with urllib.request.urlopen(f"{base}/v1/models", timeout=30) as reply:
                model = json.load(reply)["data"][0]
            body = {"model": model["id"], "prompt": "".join(TOKENS), "add_special_tokens": False}
            request = urllib.request.Request(
                f"{base}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as reply:
                ids = json.load(reply)["tokens"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(f"{base}: is no vLLM server that answers: {error}") from None
        return cls(base, model["id"], model.get("root") or model["id"], ids[1] if len(ids) == len(TOKENS) else None)


def anything() -> Any:
    """In place of a preparer: what a server can hear, it says itself."""
    return SimpleNamespace(sample_rate=RATE, cannot_hear=lambda seconds: "")


def measure(
    servers: Mapping[str, Server],
    pool: Pool,
    limits: Limits,
    *,
    per: int = 8,
    repeats: int = 3,
    warmup: int = 1,
    command: Sequence[str] = tuple(BENCH.split()),
    say: Say = lambda done, total: None,
) -> Iterator[Request]:
    """Have each server asked about the rows of each range, in each repeat, and read what the benchmark wrote.

    Args:
        servers: By arm.
        pool: From `latency_local.gather`; rows of several sounds or turns are asked by their first sound and last text.
        per: Rows of a range in one repeat.
        warmup: Requests before each measurement that do not count.
        command: What starts the benchmark.

    Raises:
        RunError: If the benchmark cannot be started or fails, or a request of it does; says what it said.
        DataError: If a sound cannot be read.
    """
    done, total = 0, sum(len(plan_of(pool, per, repeat)) for repeat in range(repeats)) * len(servers)
    say(done, total)
    with TemporaryDirectory() as kept:
        folder = Path(kept)
        for repeat in range(repeats):
            plan = plan_of(pool, per, repeat)
            for place, span in enumerate(dict.fromkeys(name for name, _ in plan)):
                rows = [one for name, one in plan if name == span]
                data = _written(rows, folder)
                for arm in in_turn(servers, place + repeat):
                    found = _bench(servers[arm], data, len(rows), limits, warmup, command, folder)
                    for i, one in enumerate(rows):
                        ids = ask_ids(servers[arm].url, one.row.audios[0], one.row.question)
                        yield Request(
                            arm=arm,
                            range=span,
                            repeat=repeat,
                            row=one.row.id,
                            sound_s=one.seconds,
                            prompt_tokens=len(ids),
                            forced_prefix=_block(ids, servers[arm].think),
                            decoded_tokens=int(found["output_lens"][i]),
                            ttft_s=float(found["ttfts"][i]),
                            decode_s=float(sum(found["itls"][i])),
                            made=one.made,
                        )
                        done += 1
                        say(done, total)


def _written(rows: Sequence[Candidate], folder: Path) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, one in enumerate(rows):
            sound = folder / f"{number}.wav"
            sound.write_bytes(wav(one.row.audios[0]))
            file.write(json.dumps({"prompt": one.row.question, "audio": str(sound)}) + "\n")
    return path


def _bench(
    server: Server, data: Path, rows: int, limits: Limits, warmup: int, command: Sequence[str], folder: Path
) -> dict[str, Any]:
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    options = {
        "backend": "openai-chat",
        "base-url": server.url,
        "endpoint": "/v1/chat/completions",
        "model": server.root,
        "served-model-name": server.name,
        "dataset-name": "custom_audio",
        "dataset-path": str(data),
        "num-prompts": str(rows),
        "custom-output-len": str(limits.max_new_tokens),
        "max-concurrency": "1",
        "num-warmups": str(warmup),
        "temperature": "0",
        "result-dir": str(folder),
        "result-filename": result.name,
    }
    words = [*command, *(word for name, value in options.items() for word in (f"--{name}", value))]
    words += ["--enable-multimodal-chat", "--disable-shuffle", "--no-oversample", "--save-result", "--save-detailed"]
    words += ["--disable-tqdm", *(["--ignore-eos"] if limits.exactly else [])]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunError(
            f"{command[0]}: cannot be started: {error.strerror}; name vLLM's benchmark with --bench"
        ) from None
    try:
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = " ".join((ended.stderr or ended.stdout).split())[-_SHOWN:]
        raise RunError(f"{' '.join(command)}: wrote no result (exit {ended.returncode}): ...{said}") from None
    if wrong := [error for error in found["errors"] if error]:
        raise RunError(
            f"{server.url}: {len(wrong)} of {rows} requests failed: {' '.join(str(wrong[0]).split())[:_SHOWN]}"
        )
    if len(found["ttfts"]) != rows:
        raise RunError(f"{server.url}: the benchmark asked {len(found['ttfts'])} requests, not {rows}")
    return found


def _block(ids: Sequence[int], think: int | None) -> int:
    """Tokens of the thinking blocks in a prompt, with the two at their ends."""
    if think is None or think not in ids:
        return 0
    return ids.count(think) + 2 * ids.count(think - 1)
