"""LLaMA-Factory's sharegpt rows: `conversations` of `from` and `value`, or OpenAI's `messages`, and `audios`.

Its file is a JSON list or JSONL. What a tool says (`observation`) stands where a user speaks, and a call of one
(`function_call`) where the assistant does; both are plain text here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coatkit.data.formats.common import JsonRows, failing, keys_of, refuse_unheard, with_common_names
from coatkit.data.rows import Message, Row, make_row, read_sounds, read_turns, text_of

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "observation": "user",
    "function_call": "assistant",
    "user": "user",
    "assistant": "assistant",
}


class SharegptRows(JsonRows):
    """Rows in LLaMA-Factory's sharegpt format."""

    @staticmethod
    def parse(data: Any, where: str, folder: Path, question: str) -> Row:
        fail = failing(where)
        keys = keys_of(data, "'conversations' or 'messages'", fail)
        refuse_unheard(keys, fail)
        row_id = keys.pop("id", None)
        name = "conversations" if "conversations" in keys else "messages"
        names = ("from", "value") if name == "conversations" else ("role", "content")
        messages = read_turns(keys.pop(name, None), fail, name=name, keys=names, roles=ROLES)
        system = keys.pop("system", None)
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", text_of(system, "'system'", fail)))
        return make_row(row_id, messages, read_sounds(keys, folder, fail), where, with_common_names(keys), name=name)
