"""What docs/data.md shows of formats is read by them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from coatkit.data import audio
from coatkit.data.formats.columns import USUAL
from coatkit.data.readers import READERS, detect, open_rows
from coatkit.data.rows import parse_row

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"\n##+ ", PAGE.split(f"\n### {title}\n")[1])[0]


EXAMPLES = [
    (name, block)
    for name in READERS
    if f"\n### {name}\n" in PAGE
    for block in re.findall(r"```json\n(.+?)\n```", section(name), re.S)
]


def test_every_format_has_its_line() -> None:
    assert re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \| (?:yes|no) \|", PAGE, re.M) == list(READERS)
    assert {name for name, _ in EXAMPLES} == {"coatkit", "ms-swift", "sharegpt", "nemo", "lhotse"}


@pytest.mark.parametrize(("format", "example"), EXAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)])
def test_the_example_of_a_format_is_a_row_of_it(format: str, example: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(example + "\n")
    assert detect(path) == format
    row = open_rows(path)[0]
    assert row.audios[0].path == tmp_path / "a.flac"
    assert row.messages[-1].role == "assistant"


def test_the_row_of_a_table(tmp_path: Path) -> None:
    [example] = re.findall(r"```json\n(.+?)\n```", section("datasets and parquet"), re.S)
    cell = json.loads(example)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {key: pa.array([value], kind if key == "audio" else None) for key, value in cell.items()}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    row = open_rows(tmp_path / "t.parquet")[0]
    assert (row.messages[1].content, row.labels["language"]) == ("good morning", "en")


def test_the_columns_that_are_looked_for() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`.+) \|$", section("datasets and parquet"), re.M)
    listed = {
        part: tuple(re.findall(r"`(\w+)`", names.partition("; else")[0].partition("; or")[0])) for part, names in rows
    }
    assert listed == {part: names for part, names in USUAL.items() if part not in ("id", "start", "end")}


def test_the_numbers_of_a_tar_file(
    tmp_path: Path,
    sound: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, sound(0.25), 16_000, format="FLAC")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        member = tarfile.TarInfo("a.flac")
        member.size = len(stream.getvalue())
        tar.addfile(member, io.BytesIO(stream.getvalue()))
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.+?)\n```", section("Sounds inside other files"), re.S)
    exec(code, {})
    name, _, place = capsys.readouterr().out.strip().partition(": ")
    assert name == "a.flac"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A tone."}]
    [ref] = parse_row({"messages": turns, "audio": place}, "rows.jsonl:1", tmp_path).audios
    assert audio.duration(ref) == pytest.approx(0.25)


def test_the_picture_is_there() -> None:
    assert "![A conversation of two turns](conversation.svg)" in PAGE
    assert (DOCS / "conversation.svg").read_text(encoding="utf-8").startswith("<svg")
