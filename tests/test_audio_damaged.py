"""Some three hundred damaged files: each gives sane samples or an error that names it, at once and in little memory."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from coatkit.data.audio import read
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError

RATE = 16_000
LIMIT = 10.0
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
MEMORY = 300 << 20
"""Bytes that reading all of them may add to the process; the longest sound allowed has 1.3 MB."""


def tone(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).normal(size=time.size)
    return (0.3 * np.sin(2 * np.pi * 440 * time) + 0.02 * noise).astype(np.float32)


def little(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def header_fields(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A WAV file's header, one field wrong at a time."""
    fields = {
        "riff size": (4, 4, (0, 1, 2**31, 2**32 - 1)),
        "fmt size": (16, 4, (0, 1, 14, 2**31, 2**32 - 1)),
        "format tag": (20, 2, (0, 2, 3, 0x55, 0xFFFE, 0xFFFF)),
        "channels": (22, 2, (0, 2, 3, 63, 65, 1000, 0xFFFF)),
        "rate": (24, 4, (0, 1, 7, 999, 15_999, 768_001, 2**31 - 1, 2**31, 2**32 - 1)),
        "bytes a second": (28, 4, (0, 1, 2**32 - 1)),
        "block align": (32, 2, (0, 1, 3, 4, 0xFFFF)),
        "bits": (34, 2, (0, 1, 8, 15, 17, 24, 32, 33, 0xFFFF)),
        "data size": (40, 4, (0, 1, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)),
    }
    for name, (at, size, values) in fields.items():
        for value in values:
            yield f"{name} {value}", content[:at] + little(value, size) + content[at + size :]


def flac_fields(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A FLAC file's STREAMINFO, a byte wrong at a time: block sizes, rate, channels, bits, number of samples, MD5."""
    for at in (*range(4, 8), *range(8, 30)):
        yield f"streaminfo {at}", content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def damaged(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Any format: cut off, flipped, doubled, zeroed, with rubbish before or in it."""
    random = np.random.default_rng(seed)
    for part in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        yield f"cut at {part}", content[: max(1, int(part * len(content)))]
    yield "a byte short", content[:-1]
    yield "twice", content + content
    yield "rubbish before", b"RUBBISH" + content
    yield "rubbish behind", content + random.bytes(500)
    yield "zeros", bytes(len(content))
    for _ in range(14):
        changed = bytearray(content)
        reach = len(content) if random.random() < 0.6 else min(200, len(content))
        for at in random.integers(0, reach, random.integers(1, 12)):
            changed[at] = random.integers(0, 256)
        yield f"flipped {random.integers(1 << 30)}", bytes(changed)
    for _ in range(5):
        start = int(random.integers(0, len(content)))
        size = int(random.integers(50, 3000))
        yield f"hole {start}", content[:start] + bytes(min(size, len(content) - start)) + content[start + size :]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is wrong to the file that has it."""
    folder = tmp_path_factory.mktemp("damaged")
    made: dict[str, Path] = {}

    def put(name: str, suffix: str, content: bytes) -> None:
        path = folder / f"{len(made):04d}.{suffix}"
        path.write_bytes(content)
        made[name] = path

    for number, (suffix, (kind, coding)) in enumerate(FORMATS.items()):
        whole = folder / f"whole.{suffix}"
        soundfile.write(whole, tone(1.5), RATE, format=kind, subtype=coding)
        content = whole.read_bytes()
        for name, changed in damaged(content, number):
            put(f"{suffix}: {name}", suffix, changed)
        for other in FORMATS:
            if other != suffix:
                put(f"{suffix} named {other}", other, content)
        if suffix == "wav":
            for name, changed in header_fields(content):
                put(f"wav: {name}", suffix, changed)
        if suffix == "flac":
            for name, changed in flac_fields(content):
                put(f"flac: {name}", suffix, changed)
    for value in (np.nan, np.inf, -np.inf):
        samples = tone(0.5)
        samples[100] = value
        path = folder / f"{len(made):04d}.wav"
        soundfile.write(path, samples, RATE, subtype="FLOAT")
        made[f"a sample of {value}"] = path
    put("text", "wav", b"this is no sound\n" * 50)
    put("nothing", "flac", b"")
    os.symlink(folder / "loop.wav", folder / "loop.wav")
    os.mkfifo(folder / "pipe.wav")
    return {**made, "a loop of links": folder / "loop.wav", "a pipe": folder / "pipe.wav", "a folder": folder}


READ = """
import json, sys
from pathlib import Path
import numpy as np
from coatkit.data import audio
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError
import pyarrow
limit = float(sys.argv[1])


def peak():
    # Not ru_maxrss, which a child takes over from a large parent.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


before = peak()
found = {}
for name, path in json.load(sys.stdin).items():
    said = []
    for act in (audio.duration, lambda ref: audio.read(ref, limit)):
        try:
            got = act(AudioRef(Path(path)))
            if isinstance(got, tuple):
                samples, rate = got
                sane = samples.dtype == np.float32 and samples.ndim == 1 and 0 < samples.size <= (limit + 0.1) * rate
                said.append("ok" if sane and np.isfinite(samples).all() else f"insane: {samples.shape} {rate}")
            else:
                said.append("ok" if 0 < got < 1e6 else f"insane: {got}")
        except DataError as error:
            said.append(f"refused: {error}")
        except BaseException as error:
            said.append(f"crashed: {type(error).__name__}: {error}")
    found[name] = said
print(json.dumps([found, 1024 * (peak() - before)]))
"""


@pytest.fixture(scope="module")
def outcome(files: dict[str, Path]) -> tuple[dict[str, list[str]], int]:
    """What `duration` and `read` made of each in a process of their own, and the memory that took."""
    named = json.dumps({name: str(path) for name, path in files.items()})
    done = subprocess.run(
        [sys.executable, "-c", READ, str(LIMIT)],
        input=named,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: tuple[dict[str, list[str]], int] = tuple(json.loads(done.stdout.splitlines()[-1]))  # type: ignore[assignment]
    return found


def test_each_is_read_or_refused_by_name(files: dict[str, Path], outcome: tuple[dict[str, list[str]], int]) -> None:
    assert len(files) >= 200
    found, _ = outcome
    wrong = {
        name: said
        for name, said in found.items()
        if any(not (one == "ok" or one.startswith(f"refused: {files[name]}: ")) for one in said)
    }
    assert not wrong
    refused = [name for name, said in found.items() if said[1] != "ok"]
    assert len(refused) > 120  # and these are no files that would have been whole


def test_no_header_takes_memory(outcome: tuple[dict[str, list[str]], int]) -> None:
    assert outcome[1] < MEMORY


NAMED = {
    "wav: channels 1000": "channels",
    "wav: rate 2147483647": "its header says 2147483647 Hz",
    "wav: rate 1": "its header says 1 Hz",
    "flac: cut at 0.5": "cannot be decoded",
    "mp3: cut at 0.5": "truncated",
    "a sample of nan": "holds NaN or infinite samples",
    "text": "Format not recognised",
    "nothing": "the file is empty",
    "a pipe": "pipe",
    "a folder": "it is a folder",
}


@pytest.mark.parametrize("name", NAMED)
def test_the_reason_is_said(outcome: tuple[dict[str, list[str]], int], name: str) -> None:
    assert NAMED[name] in outcome[0][name][1]


def test_training_sets_them_aside_and_goes_on(
    project: Any, files: dict[str, Path], outcome: tuple[dict[str, list[str]], int]
) -> None:
    talk = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "a tone"}]
    for name, path in files.items():
        project.add_row(id=name, messages=talk, audio=str(path))
    for stage in project.spec["stages"]:
        stage["batch"] = {"rows": 40}
    refused = [name for name, said in outcome[0].items() if said[1] != "ok"]
    run = project.train("data.on_bad_row=quarantine", "data.max_bad_rows=1000", "data.max_seconds=10")
    assert run.result.finished
    aside = [json.loads(line)["reason"] for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    for name in refused:
        said = [reason for reason in aside if f"(row {name}): " in reason]
        # What only decoding shows is found when the row's turn comes, which not every row's did.
        assert len(said) == 1 or (not said and outcome[0][name][0] == "ok"), name
    with pytest.raises(DataError, match=r"bad rows are more than data\.max_bad_rows: 20"):
        project.train("data.on_bad_row=quarantine", "data.max_bad_rows=20", "output=few")
    with pytest.raises(DataError, match=r"bad row\(s\)") as caught:
        project.train("output=none")
    assert f"(row {refused[0]}): {files[refused[0]]}: " in str(caught.value)


@pytest.mark.parametrize("channels", [2, 6])
def test_loudness_is_left_alone_and_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    quiet = 0.01 * tone(0.5)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([quiet * (1 + i) for i in range(channels)], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read(AudioRef(path), 1)[0], quiet * (1 + (channels - 1) / 2), rtol=1e-5)


def test_each_rate_is_resampled_once(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coatkit.data import audio
    from coatkit.data.rows import JsonlRows
    from coatkit.data.steps import load_batch
    from coatkit.infer import load_backbone

    made: list[tuple[int, int]] = []
    resample: Callable[..., Any] = audio.soxr.resample
    monkeypatch.setattr(audio.soxr, "resample", lambda x, a, b, **k: (made.append((a, b)), resample(x, a, b, **k))[1])
    project.write()
    rows = JsonlRows(project.folder / "train.jsonl")[:3]
    preparer = load_backbone("mini", weights="random").preparer
    load_batch(rows, preparer, [8_000, 24_000, 8_000, RATE], 10, train=True)
    assert sorted(made) == sorted([(RATE, 8_000), (RATE, 24_000)] * 3)
