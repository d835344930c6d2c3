"""Answers on disk as they are made, so that a stop loses at most one batch, and never mixed with another model's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from coatkit.errors import RunError
from coatkit.evaluation.items import Item, Key
from coatkit.files import from_json, read_text, without_links, write_atomic

FORMAT = 1


class Predictions:
    """The folder of one evaluation; used as a context manager, by one process at a time.

    predictions.jsonl  one line per answer, appended and synced batch by batch; at last in order, with scores
    eval.json          what the answers depend on
    results.json       the scores

    Args:
        folder: Made when it is not there.
        identity: What answers depend on, as plain data; what is there must have been made with the same.
        restart: Throw away what is there.

    Raises:
        RunError: If what is there was made with something else; names what.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.path, self.record, self.results = (
            folder / name for name in ("predictions.jsonl", "eval.json", "results.json")
        )
        self._restart = restart
        self.lines: dict[Key, dict[str, Any]] = {}

    def __enter__(self) -> Predictions:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"{self.folder}: another process is evaluating into this folder") from None
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written: {error.strerror or error}") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _open(self) -> None:
        if self._restart:
            for file in (self.path, self.results, self.record):
                file.unlink(missing_ok=True)
        if self.record.exists():
            before = read_record(self.folder)
            if changed := _differences(before.get("identity", {}), self.identity):
                raise RunError(
                    f"{self.folder}: holds answers made with something else; changed since: {', '.join(changed[:8])}.\n"
                    "  Change it back, write elsewhere with --out FOLDER, or throw them away with --restart."
                )
        elif self.path.exists():
            raise RunError(f"{self.path}: nothing says what it was made with; write elsewhere with --out, or --restart")
        else:
            self._write_record()
        if self.path.exists():
            self.lines = {(line["task"], line["index"]): line for line in read_lines(self.path, cut_off=True)}

    def _write_record(self, **more: Any) -> None:
        write_atomic(self.record, json.dumps({"format": FORMAT, "identity": self.identity, **more}, indent=1) + "\n")

    def keep(self, batches: Iterable[Sequence[Item]]) -> None:
        """Keep the answers of whole batches alone: a batch is asked as it was planned, or its numbers may differ.

        Rows that were bad are looked at again.
        """
        kept: dict[Key, dict[str, Any]] = {}
        wanted = 0
        for batch in batches:
            wanted += len(batch)
            mine = [self.lines.get(item.key, {}) for item in batch]
            if all("answer" in line for line in mine):
                kept.update(zip((item.key for item in batch), mine, strict=True))
        self.lines = kept
        if len(kept) < wanted:
            self.results.unlink(missing_ok=True)  # results are of all rows, or not there
        if self.path.exists():
            write_atomic(self.path, _text(kept.values()))

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write a batch down, and bring it to the disk."""
        with open(self.path, "a", encoding="utf-8", opener=without_links) as file:
            file.write(_text(lines))
            file.flush()
            os.fsync(file.fileno())
        self.lines.update({(line["task"], line["index"]): line for line in lines})

    def finish(
        self, lines: Sequence[dict[str, Any]], results: Mapping[str, Any], scoring: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Write all lines with their scores, in their order, how they were scored, and the results."""
        write_atomic(self.path, _text(lines))
        self._write_record(scoring=scoring)
        write_atomic(self.results, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What answers in a folder were made with.

    Raises:
        RunError: If there is none.
    """
    path = folder / "eval.json"
    try:
        data = from_json(read_text(path))
    except FileNotFoundError:
        below = sorted(str(found.parent) for found in folder.glob("eval/*/eval.json"))
        hint = f"; name one of {', '.join(below)}" if below else "; make one with: coatkit eval RUN --data ROWS"
        raise RunError(f"{folder}: holds no evaluation{hint}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RunError(f"{path}: this coatkit reads evaluations of format {FORMAT}; evaluate again with --restart")
    return data


def read_lines(path: Path, *, cut_off: bool = False) -> list[dict[str, Any]]:
    """Lines of a predictions.jsonl.

    Args:
        cut_off: Leave out a last line without its end, which a crash leaves behind.

    Raises:
        RunError: If a line is damaged; names it.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    whole, _, rest = text.rpartition(b"\n")
    if rest and not cut_off:
        raise RunError(f"{path}: its last line is cut off; finish the evaluation by running it again")
    found = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        data = None
        with suppress(ValueError):
            data = from_json(line)
        if not isinstance(data, dict) or not _is_whole(data):
            raise RunError(f"{path}:{number}: damaged; evaluate again with --restart")
        found.append(data)
    return found


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a line has what a line has, each of its kind; which of them it needs is said where it is used."""
    lists = [line.get(key, []) for key in ("references", "choices")]
    return (
        {"task", "index", "id"} <= line.keys()
        and isinstance(line["task"], str)
        and type(line["index"]) is int
        and isinstance(line.get("answer", ""), str)
        and all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists)
        and all(isinstance(line.get(key), int | float | None) for key in ("score", "rating"))
    )


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [at]
