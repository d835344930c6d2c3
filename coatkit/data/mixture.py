"""Mixtures as files: rows drawn from many sources, shuffled, in one Parquet file; a sidecar says what was drawn.

The file holds the rows' text, not their sounds; its metadata names each source and the folder its paths start from.
What is made is named by all it depends on, so that it is made once and used again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coatkit.assets import cache_dir
from coatkit.data.pools import File, OnBadRow, Pool, as_data, check_bad, draw, find_pools, open_files, set_budgets
from coatkit.data.rows import Row, Rows, parse_row
from coatkit.errors import DataError
from coatkit.files import from_json, read_text, write_atomic, written_beside
from coatkit.spec_data import MixtureSpec

FORMAT = 1
_METADATA = b"coatkit.mixture"
_DIGEST = b"coatkit.mixture.sha256"
_GROUP = 1024
"""Rows of a row group: what is decompressed to read one row."""
_KEPT = 8
"""Row groups kept decompressed."""
_NAMED = ("id", "messages", "audio", "audios", "start", "end")


@dataclass(frozen=True)
class Mixture:
    """A mixture as a file.

    Attributes:
        path: The Parquet file; the sidecar is beside it, with the suffix `.json`.
        data: What the sidecar holds.
        made: Whether it was made now.
        there: Whether it is there; false of one that was only worked out.
    """

    path: Path
    data: dict[str, Any]
    made: bool
    there: bool = True


def materialise(spec: MixtureSpec) -> Path:
    """The mixture's Parquet file in coatkit's cache, made when it is not there.

    Raises:
        DataError: As `mix`.
    """
    return mix(spec).path


def mix(
    spec: MixtureSpec,
    out: Path | None = None,
    *,
    on_bad_row: OnBadRow = "refuse",
    max_bad_rows: int = 100,
    dry: bool = False,
) -> Mixture:
    """Draw a mixture and write it, or find the one that was made from the same spec and inputs.

    Args:
        spec: With absolute paths and a seed (`LoadedSpec.rows_of`).
        out: Where to write it; in coatkit's cache when left out.
        on_bad_row: What to do with bad rows of sources that are looked at: refuse, or draw without them.
        max_bad_rows: With quarantine: refuse when there are more.
        dry: Work out the numbers and write nothing.

    Raises:
        DataError: If a source cannot be opened, gives no row or bad ones, or caps allow too few; or if the file
            cannot be written.
    """
    files, of_source = open_files(spec)
    means = [FORMAT, spec.model_dump(mode="json"), [file.sha256 for file in files]]
    digest = hashlib.sha256(json.dumps(means).encode()).hexdigest()
    path = cache_dir() / "mixtures" / f"{digest[:32]}.parquet" if out is None else Path(os.path.abspath(out))
    sidecar = path.with_suffix(".json")
    if out is not None:
        _refuse_foreign(path, sidecar)

    def found() -> Mixture | None:
        data = _read_sidecar(sidecar, digest, path)
        if data is None:
            return None
        check_bad([bad["reason"] for bad in data["bad_rows"]], on_bad_row, max_bad_rows)
        return Mixture(path, data, made=False)

    if there := found():
        return there
    pools = find_pools(spec, files, of_source, on_bad_row, max_bad_rows)
    set_budgets(spec, pools)
    data = _sidecar_of(spec, digest, pools, files)
    if dry:
        return Mixture(path, data, made=False, there=False)
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if there := found():  # another process was faster
                return there
            for partial in path.parent.glob(f".{path.name}.*.partial"):
                partial.unlink()  # of a process that was killed
            sidecar.unlink(missing_ok=True)
            with written_beside(path) as partial:
                data["content_sha256"] = _write(partial, spec, pools, files, path.parent if out is not None else None)
            # Last: a mixture without its sidecar is not there.
            told = {**data, "sidecar_sha256": _sha256(data)}
            write_atomic(sidecar, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(
            f"{path}: the mixture cannot be written: {error.strerror or error}.\n"
            "  COATKIT_CACHE=FOLDER puts the cache elsewhere; coatkit mix --out FILE writes to a file of yours."
        ) from None
    return Mixture(path, data, made=True)


class MixtureRows(Rows):
    """Rows of a mixture file. A row has the labels `category`, and `source` unless it has one of its own.

    Raises:
        DataError: If the file cannot be read or is no mixture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        text, category, source, place = self._cells(index)
        where = self._say(index, source, place)
        try:
            data = from_json(text)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        row = parse_row(data, where, self._folders[source])
        row.labels["category"] = category
        row.labels.setdefault("source", str(self._paths[source]))
        return row

    def where(self, index: int) -> str:
        _, _, source, place = self._cells(index)
        return self._say(index, source, place)

    def fingerprint(self) -> str:
        """Digest of the rows in their order; the same whatever version of pyarrow wrote them."""
        return str(self._digest)

    def _say(self, index: int, source: int, place: str) -> str:
        return f"{self.path} row {index + 1}, {self._paths[source]}{place}"

    def _open(self) -> None:
        self._process = os.getpid()
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        # Checksums of pages: what the disk spoils is an error here, not a row that was never written.
        self._file = _reading(self.path, lambda: pq.ParquetFile(self.path, page_checksum_verification=True))
        found = self._file.metadata.metadata or {}
        try:
            said, self._digest = from_json(found[_METADATA]), found[_DIGEST].decode()
        except (KeyError, ValueError):
            said = None
        if not isinstance(said, dict):
            raise DataError(f"{self.path}: is no mixture; coatkit mix makes one")
        if said.get("version") != FORMAT:
            raise DataError(
                f"{self.path}: a mixture of format {said.get('version')}, but this coatkit reads format {FORMAT};"
                " make it anew with coatkit mix"
            )
        here = Path(os.path.abspath(self.path)).parent
        self._paths = [_normal(here, source["path"]) for source in said["sources"]]
        self._folders = [_normal(here, source["folder"]) for source in said["sources"]]
        groups = range(self._file.metadata.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def _cells(self, index: int) -> tuple[bytes, str, int, str]:
        """Text, category, number of the source, and place in it of one row."""
        if self._process != os.getpid():
            self._open()  # a forked worker reads with a file of its own
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        table = self._kept.get(group)
        if table is None:
            table = _reading(self.path, lambda: self._file.read_row_group(group, use_threads=False))
            self._kept[group] = table
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(group)
        at = index - int(self._starts[group])
        return tuple(table[name][at].as_py() for name in ("row", "category", "source", "place"))


def to_data(row: Row, folder: Path) -> dict[str, Any]:
    """A row as `parse_row` reads it, with paths relative to `folder` where they lie in it. The inverse of `parse_row`.

    Labels that bear the name of a part of a row are left out.
    """
    data: dict[str, Any] = {"id": row.id, "messages": []}
    for message in row.messages:
        own = {} if message.learn else {"learn": False}
        data["messages"].append({"role": message.role, "content": message.content, **own})
    if row.audios:
        data["audios"] = []
    for ref in row.audios:
        path = ref.path.relative_to(folder) if ref.path.is_relative_to(folder) else ref.path
        entry: dict[str, Any] = {"path": f"{path}#{ref.part}" if ref.part else str(path)}
        times = {"start": ref.start, "end": ref.end}
        data["audios"].append(entry | {key: time for key, time in times.items() if time is not None})
    return data | {key: value for key, value in row.labels.items() if key not in _NAMED}


def _write(path: Path, spec: MixtureSpec, pools: Sequence[Pool], files: Sequence[File], beside: Path | None) -> str:
    """Write the rows; gives their digest, which does not depend on how Parquet is written.

    Args:
        beside: The folder of a mixture that may be moved together with its sources; their paths are relative to it.
    """
    of, indices = draw(spec, pools)
    names = list(spec.categories)
    numbers = np.array([names.index(pool.category) for pool in pools], np.int32)
    said = {"version": FORMAT, "sources": [_place(pool, files, beside) for pool in pools], "categories": names}
    schema = pa.schema(
        [
            ("row", pa.binary()),
            ("category", pa.dictionary(pa.int32(), pa.string())),
            ("source", pa.int32()),
            ("index", pa.int64()),
            ("place", pa.string()),
        ],
        metadata={_METADATA: json.dumps(said, ensure_ascii=False)},
    )
    read = [_reader(files[pool.file]) for pool in pools]
    digest = hashlib.sha256(json.dumps(names).encode())
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=["category", "source"],
        write_statistics=False,
        write_page_checksum=True,
        store_schema=True,
    ) as writer:
        for start in range(0, len(of), _GROUP):
            sources, places = of[start : start + _GROUP], indices[start : start + _GROUP]
            pairs = list(zip(sources.tolist(), places.tolist(), strict=True))
            texts = [read[source](index) for source, index in pairs]
            for column in (sources, places, np.array([len(text) for text in texts])):
                digest.update(column.astype("<i8").tobytes())
            digest.update(b"".join(texts))
            columns = [
                pa.array(texts, pa.binary()),
                pa.DictionaryArray.from_arrays(pa.array(numbers[sources]), pa.array(names, pa.string())),
                pa.array(sources),
                pa.array(places),
                pa.array([_line(files[pools[source].file].rows, index) for source, index in pairs], pa.string()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=_GROUP)
        writer.add_key_value_metadata({_DIGEST: digest.hexdigest()})
    return digest.hexdigest()


def _reader(file: File) -> Callable[[int], bytes]:
    """From an index to a row's text: coatkit's own as it is, any other converted."""
    rows = file.rows
    if file.own:
        text: Callable[[int], bytes] = rows.text  # type: ignore[attr-defined]
        return text
    folder = _folder(rows.path)
    return lambda index: json.dumps(to_data(rows[index], folder), ensure_ascii=False, default=str).encode()


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _line(rows: Rows, index: int) -> str:
    """Where a row is within its source: `:17`."""
    return rows.where(index).removeprefix(str(rows.path))


def _place(pool: Pool, files: Sequence[File], beside: Path | None) -> dict[str, str]:
    path = Path(os.path.abspath(files[pool.file].rows.path))
    folder = _folder(path)
    # What has no folder in common is not moved together.
    near = beside is not None and os.path.commonpath([beside, folder]) != os.path.sep
    return {
        "path": os.path.relpath(path, beside) if near else str(path),
        "folder": os.path.relpath(folder, beside) if near else str(folder),
    }


def _normal(folder: Path, text: str) -> Path:
    return Path(os.path.normpath(folder / text))


def _sidecar_of(spec: MixtureSpec, digest: str, pools: Sequence[Pool], files: Sequence[File]) -> dict[str, Any]:
    categories = as_data(spec, pools, files)
    return {
        "version": FORMAT,
        "hash": digest,
        "content_sha256": None,
        "seed": spec.seed,
        "rows": sum(category["actual"] for category in categories),
        "requested": spec.rows,
        "categories": categories,
        "bad_rows": [{"file": str(f.rows.path), "reason": reason} for f in files for reason in f.bad],
        "spec": spec.model_dump(mode="json"),
    }


def _read_sidecar(sidecar: Path, digest: str, path: Path) -> dict[str, Any] | None:
    """The sidecar of a mixture that is whole and was made from the same spec and inputs; None of any other."""
    try:
        data: dict[str, Any] = from_json(read_text(sidecar))
        if data.pop("sidecar_sha256") != _sha256(data):  # somebody changed it: what it tells is not what was drawn
            return None
        if data["hash"] == digest and MixtureRows(path).fingerprint() == data["content_sha256"]:
            return data
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        pass
    return None


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _refuse_foreign(path: Path, sidecar: Path) -> None:
    """A file of the user's is not written over; a mixture is."""
    if path.suffix == sidecar.suffix:
        raise DataError(f"{path}: the sidecar takes this name; name the mixture .parquet")
    which = path
    try:
        if path.exists():
            MixtureRows(path)
        which = sidecar
        if sidecar.exists() and "content_sha256" not in from_json(read_text(sidecar)):
            raise ValueError
    except (DataError, ValueError, OSError, TypeError):
        raise DataError(f"{which}: is there and is no mixture; name another file, or remove it") from None


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, pa.ArrowException) as error:
        if not path.exists():
            raise DataError(f"{path}: there is no such file") from None
        raise DataError(f"{path}: cannot be read as a mixture: {error}. Delete it and make it anew") from None
