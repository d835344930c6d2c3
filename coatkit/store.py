"""The feature store: what experts and the frozen audio tower make of each sound, computed once and kept.

A sound is known by what was decoded, so a renamed or losslessly re-encoded file is the same sound. What is kept is what
training needs: an expert's features aligned to the thinking positions (`coatkit.align` gives each position alone, so a
backbone that hears a position less takes the first ones), or the tower's frames at the audio tokens.

    FOLDER/panns-3f2a.../about.json        what these features are
                         0001ab.safetensors   shards: written beside and renamed; each says its own checksum
                         index-9c1d....npy    made from the shards whenever they changed; never the only truth
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from coatkit.errors import RunError, other_format
from coatkit.files import from_json, read_text, write_atomic, written_beside

FORMAT = 1
Dtype = Literal["float32", "float16", "int8"]
SHARD_BYTES = 64 << 20
"""Size of a shard: what is lost when the process that fills it is killed."""
_RECORD = np.dtype(
    [("key", "S32"), ("shard", "<u4"), ("offset", "<u8"), ("frames", "<u4"), ("dim", "<u4"), ("scale", "<u8")]
)
INTACT = "What was stored before is intact; make room if it is full, and give the same command again to go on."
_SUM = 16
"""Bytes of the digest behind an index."""
_SIZES = {"F32": 4, "F16": 2, "I8": 1}
_NUMPY = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def sound_key(samples: NDArray[np.float32], rate: int) -> str:
    """What a sound is known by: a digest of its mono samples [N] at its file's own rate (Hz), in hex."""
    digest = hashlib.blake2b(f"{rate} {samples.size} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples, np.float32).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class About:
    """What the features in one folder are.

    Attributes:
        name: The expert, as its plugin or file is called; or `tower`.
        identity: All that the values depend on besides the sound: fingerprint, positions per second, ...
        dtype: How values are kept.
        source: For an expert that was run in another interpreter: what it was made from, by which it is found.
    """

    name: str
    identity: Mapping[str, Any]
    dtype: Dtype
    source: Mapping[str, Any] | None = None

    def folder(self, root: Path) -> Path:
        digest = hashlib.sha256(json.dumps([dict(self.identity), self.dtype], sort_keys=True).encode()).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name.rpartition("/")[2])[:40].strip("-.") or "expert"
        return root / f"{readable}-{self.dtype}-{digest[:16]}"

    def write(self, folder: Path) -> None:
        data = {
            "format": FORMAT,
            "name": self.name,
            "identity": self.identity,
            "dtype": self.dtype,
            "source": self.source,
        }
        write_atomic(folder / "about.json", json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> About:
        """What a folder says of itself.

        Raises:
            RunError: If it is no feature folder, or of another format.
        """
        try:
            data = from_json(read_text(folder / "about.json"))
            if data["format"] != FORMAT:
                raise RunError(f"{folder}: {other_format(data['format'], FORMAT)}")
            if not (isinstance(data["name"], str) and isinstance(data["identity"], dict) and data["dtype"] in _NUMPY):
                raise ValueError("about.json is damaged")
            return cls(data["name"], data["identity"], data["dtype"], data["source"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder}: is no folder of a feature store: {error}") from None


class Store:
    """Features of one kind, for reading; may be sent to data workers.

    Attributes:
        folder: Where the shards are.
        about: What they hold.
        damaged: Shards that are cut off or no shards, which are left aside.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.about = folder, About.read(folder)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "about": self.about}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        self._files: dict[int, Any] = {}
        shards = _shards(self.folder)
        digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:24]
        self._names = [name for name, _ in shards]
        index = self.folder / f"index-{digest}.npy"
        self.damaged: list[str] = []
        try:
            _check_index(index)
            self._index: NDArray[Any] = np.load(index, mmap_mode="r", allow_pickle=False)
            if self._index.dtype != _RECORD:
                raise ValueError("another layout")
        except (OSError, ValueError, EOFError):
            self._index, self.damaged = _make_index(self.folder, self._names)
            if not self.damaged:
                _keep_index(self.folder, index, self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def keys(self) -> set[str]:
        """Keys of all sounds."""
        return {key.decode() for key in self._index["key"]}

    def frames(self, key: str) -> Tensor | None:
        """Values [P, dim] of a sound, float32; None when it is not here."""
        record = self._find(key)
        if record is None:
            return None
        dtype = np.dtype(_NUMPY[self.about.dtype])
        frames, dim = int(record["frames"]), int(record["dim"])
        shard = int(record["shard"])
        raw = self._read(shard, int(record["offset"]), frames * dim * dtype.itemsize)
        values = np.frombuffer(raw, dtype).reshape(frames, dim).astype(np.float32)
        if self.about.dtype == "int8":
            values *= np.frombuffer(self._read(shard, int(record["scale"]), 4 * frames), "<f4")[:, None]
        return torch.from_numpy(values)

    def _find(self, key: str) -> Any:
        wanted = np.bytes_(key.encode())
        at = int(np.searchsorted(self._index["key"], wanted))
        return self._index[at] if at < len(self._index) and self._index["key"][at] == wanted else None

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.folder / self._names[shard]
        try:
            if shard not in self._files:
                self._files[shard] = path.open("rb", buffering=0)
            found = os.pread(self._files[shard].fileno(), size, offset)
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
        if len(found) < size:
            raise RunError(f"{path}: is cut off; `coatkit cache SPEC --verify` finds what has to be made again")
        return found


class StoreWriter:
    """Adds sounds to a folder of the store; a context manager, one at a time.

    Raises:
        RunError: If another process is writing there, or the folder cannot be written.
    """

    def __init__(self, about: About, root: Path) -> None:
        self.about, self.folder = about, about.folder(root)
        self._held: dict[str, NDArray[Any]] = {}
        self._bytes = 0

    def __enter__(self) -> StoreWriter:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.folder}: another process is adding to it; wait for it to end") from None
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {error.strerror or error}") from None
        try:
            for partial in self.folder.glob(".*.partial"):  # of a process that was killed
                partial.unlink(missing_ok=True)
            self.about.write(self.folder)
            store = Store(self.folder)
            for name in store.damaged:
                (self.folder / name).unlink(missing_ok=True)
            self.known = store.keys()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.flush()  # what was computed is kept, whatever ended it
            if kind is None:
                Store(self.folder)  # makes the index
        finally:
            self._lock.release()

    def add(self, key: str, values: Tensor) -> None:
        """Keep the values [P, dim] of a sound; does nothing if they are known.

        Raises:
            RunError: If a value is not finite, or too large for float16.
        """
        if key in self.known:
            return
        array = values.detach().to("cpu", torch.float32).numpy()
        if not np.isfinite(array).all():
            raise RunError(f"{self.about.name}: gave NaN or infinite values for a sound; nothing of it is kept")
        if self.about.dtype == "int8":
            scale = np.abs(array).max(1, initial=0.0) / 127
            safe = np.where(scale > 0, scale, 1.0)
            self._held[f"{key}.scale"] = scale.astype(np.float32)
            array = np.round(array / safe[:, None])
        elif self.about.dtype == "float16" and np.abs(array).max(initial=0.0) > 65504:
            raise RunError(f"{self.about.name}: its values go beyond float16; store them with cache.dtype: float32")
        self._held[key] = np.ascontiguousarray(array.astype(_NUMPY[self.about.dtype]))
        self.known.add(key)
        self._bytes += self._held[key].nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a shard."""
        if not self._held:
            return
        path = self.folder / f"{uuid.uuid4().hex[:16]}.safetensors"
        metadata = {"format": str(FORMAT), "digest": _digest(self._held)}
        try:
            with written_beside(path) as partial:
                save_file(self._held, partial, metadata)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{self.folder}: cannot be written: {getattr(error, 'strerror', None) or error}.\n  {INTACT}"
            ) from None
        self._held, self._bytes = {}, 0


def verify(folder: Path) -> Iterator[tuple[str, str]]:
    """Read every shard of a folder; yields its name and what is wrong with it, empty when nothing is."""
    for name, _ in _shards(folder):
        try:
            header, start = _header(folder / name)
        except ValueError as error:
            yield name, str(error)
            continue
        content = (folder / name).read_bytes()[start:]
        arrays = {
            key: np.frombuffer(content[entry["data_offsets"][0] : entry["data_offsets"][1]], np.uint8)
            for key, entry in header.items()
            if key != "__metadata__"
        }
        yield name, "" if _digest(arrays) == header["__metadata__"].get("digest") else "its checksum is another one"


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(arrays[key]).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _shards(folder: Path) -> list[tuple[str, int]]:
    """Name and size of every finished shard."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name, e.stat().st_size) for e in entries if e.name.endswith(".safetensors"))
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A shard's header, and where its data begin.

    Raises:
        ValueError: If it is cut off or no shard.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("it is cut off or no shard")
        header = from_json(stream.read(length))
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("it is no shard")
    places = [_place(entry) for key, entry in header.items() if key != "__metadata__"]
    if size != 8 + length + max((stop for _, stop in places), default=0):
        raise ValueError("it is cut off")
    return header, 8 + length


def _place(entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise ValueError("its header is damaged")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError("its header is damaged")
    return offsets[0], offsets[1]


def _make_index(folder: Path, names: list[str]) -> tuple[NDArray[Any], list[str]]:
    """Records of all sounds by key, and the shards that are damaged."""
    records: list[NDArray[Any]] = []
    damaged = []
    for number, name in enumerate(names):
        try:
            header, start = _header(folder / name)
            found = []
            for key, entry in header.items():
                if key != "__metadata__" and not key.endswith(".scale"):
                    scale = _place(header.get(f"{key}.scale", entry))[0]
                    begin, end = _place(entry)
                    frames, dim = entry["shape"]
                    if frames * dim * _SIZES[entry["dtype"]] != end - begin:
                        raise ValueError("a shape that is not its tensor's")
                    found.append((key.encode("ascii"), number, start + begin, frames, dim, start + scale))
            records.append(np.array(found, _RECORD))  # here: a number that is too large is this shard's fault
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            damaged.append(name)
    index = np.concatenate([np.empty(0, _RECORD), *records])
    return index[np.argsort(index["key"], kind="stable")], damaged


def _sum(path: Path, end: int) -> bytes:
    """A digest of a file without its last `end` bytes."""
    digest = hashlib.blake2b(digest_size=_SUM)
    left = path.stat().st_size - end
    with path.open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()


def _check_index(path: Path) -> None:
    """An index that is not as it was written would give one sound another's features.

    Raises:
        OSError, ValueError: If it is not.
    """
    with path.open("rb") as stream:
        stream.seek(-_SUM, os.SEEK_END)
        written = stream.read()
    if written != _sum(path, _SUM):
        raise ValueError("it is damaged")


def _keep_index(folder: Path, path: Path, index: NDArray[Any]) -> None:
    """Save the index for the next that opens the folder, if it may be written; older ones are removed."""
    try:
        with written_beside(path) as partial, partial.open("wb") as stream:
            np.save(stream, index, allow_pickle=False)
            stream.flush()
            stream.write(_sum(partial, 0))
        for old in folder.glob("index-*.npy"):
            if old != path:
                old.unlink(missing_ok=True)
    except OSError:
        pass  # a folder that may only be read
