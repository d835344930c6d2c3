"""ms-swift's rows: `messages` and `audios`, or `query`, `response` and `history`.

A message's `loss` says whether it is learnt. `<audio>` tags and sounds must match, or there is no tag; ms-swift itself
puts missing tags in front of those that are there, which says another thing than the row's author may have meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coatkit.data.formats.common import (
    JsonRows,
    exchange,
    failing,
    keys_of,
    refuse_unheard,
    with_common_names,
)
from coatkit.data.rows import Fail, Message, Row, make_row, read_sounds, read_turns, text_of


class MsSwiftRows(JsonRows):
    """Rows in ms-swift's format."""

    @staticmethod
    def parse(data: Any, where: str, folder: Path, question: str) -> Row:
        fail = failing(where)
        keys = keys_of(data, "'messages', or 'query' and 'response'", fail)
        refuse_unheard(keys, fail)
        row_id = keys.pop("id", None)
        if "messages" in keys:
            messages = read_turns(keys.pop("messages"), fail, learn="loss")
        elif "response" in keys:
            messages = _history(keys.pop("history", None), fail)
            messages += exchange(keys.pop("query", question), keys.pop("response"), ("query", "response"), fail)
        else:
            raise fail(
                f"needs 'messages', or 'query' and 'response'; it has {', '.join(map(ascii, keys)) or 'nothing'}"
            )
        system = keys.pop("system", None)
        if system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", text_of(system, "'system'", fail)))
        return make_row(row_id, messages, read_sounds(keys, folder, fail), where, with_common_names(keys))


def _history(history: Any, fail: Fail) -> list[Message]:
    messages: list[Message] = []
    if history is not None and not isinstance(history, list):
        raise fail("'history' must be a list of [query, response]")
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise fail(f"history[{i}] must be [query, response]")
        messages += exchange(pair[0], pair[1], (f"history[{i}][0]", f"history[{i}][1]"), fail)
    return messages
