"""Sounds inside other files: slices of a tar file and cells of tables, and everything that is not one."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from coatkit.data import audio
from coatkit.data.readers import open_rows
from coatkit.data.rows import AudioRef, parse_row
from coatkit.errors import DataError

RATE = 16_000
KINDS = ["WAV", "FLAC", "OGG", "MP3"]
Sound = Callable[..., np.ndarray]


def encoded(samples: np.ndarray, kind: str = "FLAC") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format=kind)
    return stream.getvalue()


@pytest.fixture
def shard(tmp_path: Path, sound: Sound) -> tuple[Path, dict[str, str], dict[str, Path]]:
    """A tar file, where in it each sound lies, and the same sounds as files."""
    parts, files = {}, {}
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i, kind in enumerate(KINDS):
            data = encoded(sound(0.3 + 0.1 * i, i), kind)
            files[kind] = tmp_path / f"{i}.{kind.lower()}"
            files[kind].write_bytes(data)
            member = tarfile.TarInfo(f"clips/{i}.{kind.lower()}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo(f"clips/link{i}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        for member in tar:
            if member.isfile():
                kind = Path(member.name).suffix[1:].upper()
                parts[kind] = f"{member.offset_data}+{member.size}"
    return tmp_path / "shard.tar", parts, files


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_a_tar_is_the_sound_itself(shard: tuple[Path, dict[str, str], dict[str, Path]], kind: str) -> None:
    path, parts, files = shard
    inside = AudioRef(path, part=parts[kind])
    assert str(inside) == f"{path}#{parts[kind]}"
    beside = AudioRef(files[kind])
    assert audio.duration(inside) == audio.duration(beside) > 0.29
    assert np.array_equal(audio.read(inside, 10)[0], audio.read(beside, 10)[0])
    stretch = [audio.read(AudioRef(ref.path, 0.1, 0.2, ref.part), 10)[0] for ref in (inside, beside)]
    assert stretch[0].size == 1600
    assert np.array_equal(*stretch)


def test_rows_name_slices_relative_to_their_file(
    shard: tuple[Path, dict[str, str], dict[str, Path]], tmp_path: Path
) -> None:
    _, parts, _ = shard
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A tone."}]
    row = {
        "messages": turns,
        "audios": [f"shard.tar#{parts['WAV']}", {"path": f"shard.tar#{parts['MP3']}", "end": 0.2}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    one, two = open_rows(tmp_path / "rows.jsonl")[0].audios
    assert one == AudioRef(tmp_path / "shard.tar", part=parts["WAV"])
    assert audio.duration(one) == pytest.approx(0.3)
    assert audio.duration(two) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["a#1.wav", "a#2+3", "#", "b.parquet#audio[1]"])
def test_names_that_look_like_parts_and_are_files(tmp_path: Path, sound: Sound, name: str) -> None:
    (tmp_path / name).write_bytes(encoded(sound(0.2)))
    row = parse_row({"messages": [{"role": "user", "content": ""}], "audio": name}, "rows.jsonl:1", tmp_path)
    assert row.audios == (AudioRef(tmp_path / name),)
    assert audio.duration(row.audios[0]) == pytest.approx(0.2)


def test_names_that_are_parts(tmp_path: Path) -> None:
    def ref(name: str) -> AudioRef:
        turns = [{"role": "user", "content": ""}]
        return parse_row({"messages": turns, "audio": name}, "rows.jsonl:1", tmp_path).audios[0]

    assert ref("a#b.tar#10+20") == AudioRef(tmp_path / "a#b.tar", part="10+20")
    assert ref("t.parquet#audio[3]") == AudioRef(tmp_path / "t.parquet", part="audio[3]")
    assert ref("/t/x.arrow#audios[3][1]") == AudioRef(Path("/t/x.arrow"), part="audios[3][1]")
    assert ref("table#audio[3]") == AudioRef(tmp_path / "table", part="audio[3]")
    assert ref("a.wav#take[b]") == AudioRef(tmp_path / "a.wav#take[b]")
    assert ref("a.tar#-1+5") == AudioRef(tmp_path / "a.tar#-1+5")


def reading(path: Path, part: str) -> str:
    """What is said of a part by both ways to open it."""
    said = []
    for way in (audio.duration, lambda ref: audio.read(ref, 10)):
        with pytest.raises(DataError) as caught:
            way(AudioRef(path, part=part))
        said.append(str(caught.value))
    assert said[0].split(":")[0] == said[1].split(":")[0]
    return said[0]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("0+0", "a slice of 0 bytes"),
        ("0+99999999", "the slice ends after byte 30000, where the file ends"),
        ("29999+2", "the slice ends after byte 30000"),
        ("30000+1", "the slice ends after byte 30000"),
        ("1" * 18 + "+1", "the slice ends after byte 30000"),
        ("1+" + "9" * 5000, "there is no place 99999"),
        ("0+30000", "cannot be opened as sound"),
        ("five", "a part of a file is OFFSET+LENGTH in bytes, or COLUMN[ROW] of a table"),
        ("1+2+3", "a part of a file is OFFSET+LENGTH"),
        ("a[-1]", "a part of a file is OFFSET+LENGTH"),
        ("audio[1]", "shard.tar: cannot be read: "),
    ],
)
def test_parts_that_are_none(tmp_path: Path, part: str, reason: str) -> None:
    (tmp_path / "shard.tar").write_bytes(np.random.default_rng(0).bytes(30_000))
    said = reading(tmp_path / "shard.tar", part)
    assert said.startswith(f"{tmp_path}/shard.tar")
    assert reason in said
    assert len(said) < 400


def test_a_slice_shows_nothing_outside_it(tmp_path: Path, sound: Sound) -> None:
    """A cut-off sound is not read on into its neighbour."""
    data = encoded(sound(0.5), "WAV")
    (tmp_path / "shard.tar").write_bytes(data + data)
    part = f"0+{len(data) // 2}"
    try:
        found = audio.read(AudioRef(tmp_path / "shard.tar", part=part), 10)[0].size
    except DataError:
        found = 0
    assert found <= len(data) // 4


@pytest.mark.parametrize("part", ["0+10", "audio[0]"])
def test_containers_that_are_no_files(tmp_path: Path, part: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "no file" in reading(tmp_path / "pipe", part)
    assert "no file" in reading(tmp_path, part)
    assert "no file" in reading(Path("/dev/zero"), part)
    assert "cannot be read: No such file" in reading(tmp_path / "gone", part)
    assert "cannot be read: Too many levels" in reading(tmp_path / "loop", part)
    assert "cannot be read: " in reading(tmp_path / ("a" * 300), part)


def test_no_descriptor_is_left_open(shard: tuple[Path, dict[str, str], dict[str, Path]]) -> None:
    path, parts, _ = shard
    audio.duration(AudioRef(path, part=parts["WAV"]))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        audio.duration(AudioRef(path, part=parts["WAV"]))
        for part in ("0+0", "0+999999999", "0+50"):
            with pytest.raises(DataError):
                audio.duration(AudioRef(path, part=part))
    assert len(os.listdir("/proc/self/fd")) == before


# Cells of tables

SOUND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(folder: Path, suffix: str, columns: dict[str, pa.Array], group: int = 3) -> Path:
    """A table as Parquet, an Arrow file or an Arrow stream, in groups of rows."""
    made, path = pa.table(columns), folder / f"table.{suffix}"
    if suffix == "parquet":
        pq.write_table(made, path, row_group_size=group)
        return path
    make = pa.ipc.new_stream if suffix == "arrow" else pa.ipc.new_file
    with make(str(path), made.schema) as writer:
        for batch in made.to_batches(max_chunksize=group):
            writer.write_batch(batch)
    return path


SUFFIXES = ["parquet", "arrow", "feather"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cells_in_any_order(tmp_path: Path, sound: Sound, suffix: str) -> None:
    seconds = [0.1 + 0.01 * i for i in range(40)]
    sounds = [encoded(sound(s, i)) for i, s in enumerate(seconds)]
    columns = {
        "audio": pa.array([{"bytes": data, "path": "x.flac"} for data in sounds], SOUND),
        "raw": pa.array(sounds, pa.large_binary()),
        "pairs": pa.array([[{"bytes": sounds[i]}, {"bytes": sounds[i - 39]}] for i in range(40)], pa.list_(SOUND)),
    }
    path = table(tmp_path, suffix, columns, group=13)
    for i in [*range(40), *np.random.default_rng(0).permutation(40), 39, 0, 39]:
        for part, wanted in ((f"audio[{i}]", i), (f"raw[{i}]", i), (f"pairs[{i}][1]", (i + 1) % 40)):
            assert audio.duration(AudioRef(path, part=part)) == pytest.approx(seconds[wanted])
    one, same = (audio.read(AudioRef(path, part=part), 9)[0] for part in ("raw[7]", "pairs[6][1]"))
    assert np.array_equal(one, same)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("audio[3]", "#audio[3]: the table has 3 rows"),
        ("sound[0]", "#sound[0]: the table has no such column"),
        ("audio[1]", "#audio[1]: holds neither the bytes of a sound nor a path"),
        ("audio[0][0]", "#audio[0][0]: the cell holds no list"),
        ("audio[2]", "#audio[2]: holds 0 bytes"),
        ("text[0]", "#text[0]: holds neither the bytes"),
        ("list[0][2]", "#list[0][2]: the list has 2 sounds"),
        ("list[0]", "#list[0]: holds neither the bytes"),
        ("list[1][0]", "#list[1][0]: the list has 0 sounds"),
        ("list[2][0]", "#list[2][0]: holds neither the bytes"),
        ("list[0][0]", "#list[0][0]: cannot be opened as sound: "),
        ("list[0][1]", "#list[0][1]: holds no bytes but the path 'gone.wav', and there is no such file"),
        ("audio[" + "9" * 30 + "]", "there is no place 999"),
    ],
)
def test_cells_that_hold_no_sound(tmp_path: Path, suffix: str, part: str, reason: str) -> None:
    columns = {
        "audio": pa.array([{"bytes": b"x"}, None, {"bytes": b""}], SOUND),
        "text": pa.array(["a", "b", "c"]),
        "list": pa.array([[{"bytes": b"noise"}, {"path": "gone.wav"}], [], None], pa.list_(SOUND)),
    }
    said = reading(table(tmp_path, suffix, columns), part)
    assert reason in said


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_that_changes_is_opened_again(tmp_path: Path, sound: Sound, suffix: str) -> None:
    for i, seconds in enumerate((0.2, 0.4)):
        made = tmp_path / str(i)
        made.mkdir()
        path = table(made, suffix, {"audio": pa.array([encoded(sound(seconds))])})
        os.replace(path, tmp_path / f"t.{suffix}")
        assert audio.duration(AudioRef(tmp_path / f"t.{suffix}", part="audio[0]")) == pytest.approx(seconds)


def test_offsets_that_lead_out_of_a_table_are_not_followed(tmp_path: Path) -> None:
    path = table(tmp_path, "arrow", {"audio": pa.array([b"a" * 100, b"b" * 100]), "n": pa.array([1, 2])})
    whole = path.read_bytes()
    offsets = np.array([0, 100, 200], np.int32).tobytes()
    assert whole.count(offsets) == 1
    path.write_bytes(whole.replace(offsets, np.array([0, 100, 2**30], np.int32).tobytes()))
    for part in ("audio[0]", "audio[1]"):
        assert "table.arrow#audio" in (said := reading(path, part))
        assert "cannot be read: " in said


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_tables_are_errors_that_name_the_file(tmp_path: Path, sound: Sound, suffix: str) -> None:
    sounds = [encoded(sound(0.05, i), "WAV") for i in range(8)]
    columns = {
        "audio": pa.array([{"bytes": data, "path": "x"} for data in sounds], SOUND),
        "text": pa.array(list("abcdefgh")),
    }
    path = table(tmp_path, suffix, columns)
    whole, random = path.read_bytes(), np.random.default_rng(1)
    wrong = []
    for i in range(60):
        data = bytearray(whole)
        if i % 3 == 0:
            data = data[: int(random.integers(0, len(data)))]
        else:
            ends = random.random() < 0.7  # where the structure is
            for at in random.integers(0, 400 if ends else len(data), 4):
                data[-1 - int(at) if ends and suffix == "parquet" else int(at)] = int(random.integers(256))
        damaged = tmp_path / f"{i}.{suffix}"
        damaged.write_bytes(data)
        for part in ("audio[0]", "audio[7]"):
            try:
                samples, rate = audio.read(AudioRef(damaged, part=part), 10)
                assert np.isfinite(samples).all()
                assert samples.size / rate < 10
            except DataError as error:
                wrong.append(str(error).startswith(f"{damaged}"))
    assert len(wrong) > 30
    assert all(wrong)
