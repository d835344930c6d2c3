"""NeMo's manifests: `audio_filepath`, `offset`, `duration` and `text`; or `answer`, to `question` or `context`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coatkit.data.formats.common import JsonRows, exchange, failing, first_of, keys_of, seconds, with_common_names
from coatkit.data.rows import Row, make_row, sound_at


class NemoRows(JsonRows):
    """Rows in NeMo's format. As there, `duration` seconds are read from `offset` on."""

    @staticmethod
    def parse(data: Any, where: str, folder: Path, question: str) -> Row:
        fail = failing(where)
        keys = keys_of(data, "'audio_filepath' and 'text' or 'answer'", fail)
        row_id = keys.pop("id", None)
        path = keys.get("audio_filepath")
        if not isinstance(path, str):
            raise fail(f"'audio_filepath' must be a path, found {type(path).__name__}")
        start = seconds(keys.get("offset"), "'offset'", fail)
        length = seconds(keys.get("duration"), "'duration'", fail)
        end = None if length is None else (start or 0.0) + length
        sound = sound_at(path, start, end, "audio_filepath", folder, fail)
        asks, says = first_of(keys, ("question", "context")), first_of(keys, ("answer", "text"))
        asked = question if keys.get(asks) is None else keys[asks]
        messages = exchange(asked, keys.get(says), (asks, says), fail)
        return make_row(row_id, messages, (sound,), where, with_common_names(keys))
