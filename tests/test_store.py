"""The feature store's files: what comes back, what is found damaged, and what a killed process leaves."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatkit import store as store_module
from coatkit.errors import RunError
from coatkit.store import About, Store, StoreWriter, sound_key, verify

IDENTITY = {"fingerprint": "abc", "rate": 25.0, "dim": 4}


def about(dtype: Any = "float32", **identity: Any) -> About:
    return About("./mine.py:Mine", {**IDENTITY, **identity}, dtype)


def values(seed: int, frames: int = 7) -> torch.Tensor:
    return torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed))


def key(seed: int) -> str:
    return f"{seed:032x}"


def fill(root: Path, seeds: range, dtype: Any = "float32") -> Path:
    with StoreWriter(about(dtype), root) as writer:
        for seed in seeds:
            writer.add(key(seed), values(seed, 1 + seed % 9))
    return writer.folder


def test_a_sound_is_known_by_its_samples_and_rate() -> None:
    samples = np.linspace(-1, 1, 100, dtype=np.float32)
    same = [samples.copy(), np.ascontiguousarray(samples[::1]), np.repeat(samples, 2)[::2]]
    assert {sound_key(one, 16_000) for one in same} == {sound_key(samples, 16_000)}
    quieter = np.nextafter(samples, np.float32(0))
    others = [(quieter, 16_000), (samples, 8_000), (samples[:-1], 16_000), (samples[::-1], 16_000)]
    assert len({sound_key(one, rate) for one, rate in others} | {sound_key(samples, 16_000)}) == 5


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 5e-4), ("int8", 0.004)])
def test_what_is_stored_comes_back(tmp_path: Path, dtype: Any, error: float) -> None:
    store = Store(fill(tmp_path, range(20), dtype))
    assert len(store) == 20
    for seed in range(20):
        wanted = values(seed, 1 + seed % 9)
        found = store.frames(key(seed))
        assert found is not None
        assert found.dtype == torch.float32
        worst = wanted.abs().amax(1, keepdim=True)  # each frame has a scale of its own
        assert ((found - wanted).abs() <= error * worst).all()
    assert store.frames(key(99)) is None
    assert key(99) not in store
    assert key(3) in store


def test_int8_keeps_silent_frames_silent(tmp_path: Path) -> None:
    frames = torch.stack([torch.zeros(4), torch.ones(4), 1e-20 * torch.ones(4)])
    with StoreWriter(about("int8"), tmp_path) as writer:
        writer.add(key(1), frames)
    torch.testing.assert_close(Store(writer.folder).frames(key(1)), frames, rtol=1e-6, atol=0)


def test_what_is_known_is_not_written_again(tmp_path: Path) -> None:
    folder = fill(tmp_path, range(5))
    before = sorted(folder.glob("*.safetensors"))
    with StoreWriter(about(), tmp_path) as writer:
        assert writer.known == {key(seed) for seed in range(5)}
        writer.add(key(2), values(77))
    assert sorted(folder.glob("*.safetensors")) == before
    torch.testing.assert_close(Store(folder).frames(key(2)), values(2, 3), rtol=0, atol=0)


def test_other_features_have_another_folder() -> None:
    kinds = [about(), about("float16"), about(rate=12.5), about(fingerprint="abd"), about(dim=5)]
    assert len({one.folder(Path("r")) for one in kinds}) == len(kinds)
    assert about().folder(Path("r")).name.startswith("mine.py-Mine-float32-")


def test_a_store_may_be_sent_to_a_worker(tmp_path: Path) -> None:
    store = Store(fill(tmp_path, range(3)))
    store.frames(key(0))  # a file is open
    again = pickle.loads(pickle.dumps(store))
    torch.testing.assert_close(again.frames(key(2)), values(2, 3), rtol=0, atol=0)


def test_the_index_is_made_again_from_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 200)
    folder = fill(tmp_path, range(30))
    [index] = folder.glob("index-*.npy")
    assert len(list(folder.glob("*.safetensors"))) > 5
    for content in (b"", b"\x93NUMPY nonsense", index.read_bytes()[:150]):
        index.write_bytes(content)
        assert len(Store(folder)) == 30
    index.unlink()
    torch.testing.assert_close(Store(folder).frames(key(29)), values(29, 3), rtol=0, atol=0)
    opened = Store(folder)
    fill(tmp_path, range(30, 35))
    assert len(list(folder.glob("index-*.npy"))) == 1  # older ones go
    torch.testing.assert_close(opened.frames(key(7)), values(7, 8), rtol=0, atol=0)  # who had it open reads on
    assert len(Store(folder)) == 35


DAMAGE = {
    "cut in half": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "a byte long": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "no shard": lambda content: b"hello" * 100,
    "a header that lies": lambda content: (2**60).to_bytes(8, "little") + content,
    "a header of another kind": lambda content: (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_costs_what_it_held_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 200)
    folder = fill(tmp_path, range(30))
    hurt = sorted(folder.glob("*.safetensors"))[1]
    hurt.write_bytes(DAMAGE[damage](hurt.read_bytes()))
    store = Store(folder)
    assert store.damaged == [hurt.name]
    missing = {key(seed) for seed in range(30)} - store.keys()
    assert 0 < len(missing) < 10
    assert not list(folder.glob("index-*.npy")) or len(store) < 30
    fill(tmp_path, range(30))
    assert not hurt.exists()
    again = Store(folder)
    assert again.damaged == []
    for seed in range(30):
        torch.testing.assert_close(again.frames(key(seed)), values(seed, 1 + seed % 9), rtol=0, atol=0)


def test_verifying_finds_a_single_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 200)
    folder = fill(tmp_path, range(12), "int8")
    assert {wrong for _, wrong in verify(folder)} == {""}
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert [(name, wrong) for name, wrong in verify(folder) if wrong] == [(shard.name, "its checksum is another one")]


def test_values_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    with StoreWriter(about("float16"), tmp_path) as writer:
        with pytest.raises(RunError, match=r"mine\.py:Mine: its values go beyond float16; .* cache\.dtype: float32"):
            writer.add(key(1), torch.full((2, 4), 1e5))
        with pytest.raises(RunError, match="NaN or infinite values"):
            writer.add(key(2), torch.full((2, 4), float("nan")))
        writer.add(key(3), values(3))
    assert Store(writer.folder).keys() == {key(3)}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with StoreWriter(about(), tmp_path) as first:
        first.add(key(1), values(1))
        with pytest.raises(RunError, match="another process is adding to it"), StoreWriter(about(), tmp_path):
            pass
    fill(tmp_path, range(2, 4))
    assert len(Store(first.folder)) == 3


def test_what_was_computed_is_kept_when_something_fails(tmp_path: Path) -> None:
    writer = StoreWriter(about(), tmp_path)

    def fail() -> None:
        with writer:
            writer.add(key(1), values(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(Store(writer.folder)) == 1


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no folder of a feature store"):
        Store(tmp_path)
    folder = fill(tmp_path, range(2))
    text = (folder / "about.json").read_text()
    (folder / "about.json").write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(RunError, match="format 9, but this coatkit reads format 1; a newer coatkit wrote it: upgrade"):
        Store(folder)


WRITER = """
import sys
from pathlib import Path
import torch
from coatkit import store
store.SHARD_BYTES = 400
about = store.About("./mine.py:Mine", {"fingerprint": "abc", "rate": 25.0, "dim": 4}, "float32")
with store.StoreWriter(about, Path(sys.argv[1])) as writer:
    print("ready", flush=True)
    for seed in range(400):
        values = torch.randn(1 + seed % 9, 4, generator=torch.Generator().manual_seed(seed))
        writer.add(f"{seed:032x}", values)
print("done", flush=True)
"""


def test_killed_at_any_moment_nothing_finished_is_lost(tmp_path: Path) -> None:
    random, stored, kills = np.random.default_rng(3), 0, 0
    folder = about().folder(tmp_path)
    for _ in range(60):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if kills < 5:
            time.sleep(float(random.uniform(0, 0.12)))
        if process.poll() is None and kills < 5:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            process.wait()
            now = len(Store(folder)) if (folder / "about.json").is_file() else 0
            assert now >= stored
            stored = now
            continue
        process.wait(60)
        break
    store = Store(folder)
    assert kills > 0
    assert len(store) == 400
    assert not list(folder.glob(".*.partial"))
    for seed in range(400):
        torch.testing.assert_close(store.frames(key(seed)), values(seed, 1 + seed % 9), rtol=0, atol=0)
