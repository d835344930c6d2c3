"""Spoiled rows in every format of text, and spoiled tables, folders of tables and mixtures."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import soundfile
import yaml
from harness import Case, shell

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<audio>What is heard?"},
    {"role": "assistant", "content": "Rain.", "learn": True},
]
SAID = [{"from": "human", "value": "<audio>What?"}, {"from": "gpt", "value": "Rain."}]
GOOD: dict[str, dict[str, Any]] = {
    "coatkit": {
        "id": "a",
        "messages": TURNS,
        "audios": [{"path": "a.wav", "start": 0.1, "end": 0.4}],
        "category": "x",
        "duration": 0.3,
        "language": "en",
    },
    "ms-swift": {"messages": [TURNS[1], {**TURNS[2], "loss": True}], "audios": ["a.wav"]},
    "ms-swift old": {"query": "<audio>What?", "response": "Rain.", "history": [["a", "b"]], "audios": ["a.wav"]},
    "sharegpt": {"system": "Be brief.", "conversations": SAID, "audios": ["a.wav"]},
    "nemo": {"audio_filepath": "a.wav", "duration": 0.5, "offset": 0.1, "text": "hello", "lang": "en"},
    "lhotse": {
        "id": "c",
        "start": 0.1,
        "duration": 0.5,
        "channel": 0,
        "supervisions": [{"id": "s", "start": 0.0, "duration": 0.5, "text": "hello", "speaker": "x"}],
        "recording": {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "transforms": []},
        "custom": {"question": "What?"},
        "type": "MonoCut",
    },
}


def _sound(path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    soundfile.write(path, 0.1 * noise, 16_000)


def _read(path: Path, format: str = "auto") -> None:
    """Every row is looked at; the first that is wrong is told once the rest has been."""
    from coatkit.data.audio import duration
    from coatkit.data.readers import open_rows
    from coatkit.errors import DataError

    rows = open_rows(path, format)
    rows.fingerprint()
    first: DataError | None = None
    for index in range(len(rows)):
        try:
            for ref in rows[index].audios:
                duration(ref)
        except DataError as error:
            first = first or error
    if first is not None:
        raise first


def rows(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Text files of rows: read whole, and every tenth through `coatkit data`."""
    _sound(folder / "a.wav")
    for number in range(1, 1 << 30):
        name = draw.choice(list(GOOD))
        several = [mutate.value(draw, GOOD[name]) if draw.random() < 0.6 else GOOD[name] for _ in range(4)]
        way = draw.random()
        content = "\n".join(map(mutate.dumps, several)) if way < 0.7 else mutate.dumps(several)
        if way > 0.97:
            content = mutate.text(draw, content)
        data = content.encode("utf-8", "surrogatepass")
        if draw.random() < 0.2:
            data = mutate.raw(draw, data)
        if draw.random() < 0.1:
            data = gzip.compress(data)
            data = mutate.raw(draw, data) if draw.random() < 0.5 else data
        path = folder / draw.choice(("rows.jsonl", "rows.json", "rows"))
        path.write_bytes(data)
        if number % 10:
            format = "auto" if draw.random() < 0.7 else name.partition(" ")[0]
            yield f"{name} {number}", lambda path=path, format=format: _read(path, format)
        else:
            spec = _spec(folder, path, draw.random() < 0.5)
            words = ["data", spec, *draw.choice(((), ("--headers",), ("--html", folder / "page.html")))]
            yield f"coatkit data {name} {number}", lambda words=words: shell(*words)


def _spec(folder: Path, data: Path, refuse: bool) -> Path:
    spec = {
        "name": "fuzz",
        "backbone": {"use": "mini", "weights": "random"},
        "thinking": None,
        "data": {"train": str(data), "on_bad_row": "refuse" if refuse else "quarantine"},
        "stages": [{"name": "one", "steps": 1, "lr": 0.001, "batch": {"rows": 1}}],
        "output": str(folder / "run"),
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def tables(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Tables of Parquet and Arrow, folders of `datasets`, mixtures and their sidecars."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _sound(folder / "a.wav")
    sound = (folder / "a.wav").read_bytes()
    columns = {
        "audio": [{"bytes": sound, "path": None}, {"bytes": None, "path": "a.wav"}] * 3,
        "question": ["What?", None] * 3,
        "answer": ["Rain.", "Wind."] * 3,
        "id": [f"r{i}" for i in range(6)],
        "label": [1, 2, None] * 2,
    }
    whole = pa.table(columns)
    pq.write_table(whole, folder / "good.parquet", row_group_size=2)
    with pa.ipc.new_stream(str(folder / "good.arrow"), whole.schema) as writer:
        writer.write_table(whole, max_chunksize=2)
    parquet, arrow = (folder / "good.parquet").read_bytes(), (folder / "good.arrow").read_bytes()
    saved = folder / "saved"
    saved.mkdir()
    state = {"_data_files": [{"filename": "data-0.arrow"}], "_fingerprint": "x", "_format_type": None}
    mixed, sidecar, mix = _mixture(folder)
    for number in range(1, 1 << 30):
        kind = draw.randrange(5)
        if kind == 0:
            (folder / "t.parquet").write_bytes(mutate.raw(draw, parquet))
            yield f"parquet {number}", lambda: _read(folder / "t.parquet", draw.choice(("auto", "parquet")))
        elif kind == 1:
            (folder / "t.arrow").write_bytes(mutate.raw(draw, arrow))
            yield f"arrow {number}", lambda: _read(folder / "t.arrow", draw.choice(("auto", "datasets")))
        elif kind == 2:
            (saved / "data-0.arrow").write_bytes(mutate.raw(draw, arrow) if draw.random() < 0.3 else arrow)
            (saved / "state.json").write_text(mutate.dumps(mutate.value(draw, state)))
            yield f"folder {number}", lambda: _read(saved)
        elif kind == 3:
            table = {k: v for k, v in columns.items() if draw.random() < 0.8}
            for name in list(table):
                if draw.random() < 0.3:
                    table[name] = [draw.choice((None, "", "x" * 100, b"\xff\xfe", "../../a", "\u202e"))] * 6
            if table:
                pq.write_table(pa.table(table), folder / "v.parquet")
                yield f"columns {number}", lambda: _read(folder / "v.parquet")
        else:
            path, side = folder / "mix.parquet", folder / "mix.json"
            path.write_bytes(mutate.raw(draw, mixed) if draw.random() < 0.6 else mixed)
            changed = mutate.dumps(mutate.value(draw, sidecar)).encode("utf-8", "surrogatepass")
            side.write_bytes(changed if draw.random() < 0.7 else mutate.raw(draw, json.dumps(sidecar).encode()))
            yield f"mixture {number}", partial(mix if draw.random() < 0.5 else _read, path)


def _mixture(folder: Path) -> tuple[bytes, dict[str, Any], Any]:
    """A mixture's bytes, its sidecar, and what draws it again."""
    from coatkit.data.mixture import mix
    from coatkit.spec_data import MixtureSpec

    lines = [json.dumps({"id": f"m{i}", "messages": TURNS[1:], "audio": "a.wav"}) for i in range(8)]
    (folder / "source.jsonl").write_text("\n".join(lines))
    categories = {"one": {"share": 1.0, "sources": [str(folder / "source.jsonl")]}}
    spec = MixtureSpec.model_validate({"rows": 6, "seed": 3, "categories": categories})
    path = mix(spec, folder / "good-mix.parquet").path
    return path.read_bytes(), json.loads(path.with_suffix(".json").read_text()), lambda out: mix(spec, out)
