"""Folders that `datasets` wrote with `save_to_disk`, and Arrow files, read without that library.

A sound is the bytes in an Audio column, or the path there when it was not embedded; `datasets` itself does not decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coatkit.data.formats.columns import TableRows
from coatkit.errors import DataError
from coatkit.files import from_json, read_text


class DatasetsRows(TableRows):
    """Rows of a folder of `Dataset.save_to_disk`, or of one Arrow file.

    Raises:
        DataError: If the folder holds several splits, or none of its files.
    """

    def __init__(self, path: Path, question: str | None = None, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(path, _files(path) if path.is_dir() else [path], question, columns)


def _files(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(inner.name for inner in folder.iterdir() if (inner / "state.json").exists())
        hint = f"; give one, as in {folder.name}/{splits[0]}" if splits else ""
        raise DataError(f"{folder}: holds the splits {', '.join(splits) or 'none'}{hint}")
    try:
        state = from_json(read_text(folder / "state.json"))
        names = [str(one["filename"]) for one in state["_data_files"]]
        if any(name != Path(name).name for name in names):
            raise ValueError("a file of another folder")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: no folder of save_to_disk: its state.json is missing or damaged") from None
    return [folder / name for name in names]
