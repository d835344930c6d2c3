"""A clip and a question about it as a row of a manifest; the mini-study makes its rows by this too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def row_of(
    clip: dict[str, Any], task: str, question: str, right: str | None, number: int, kept: Sequence[str]
) -> dict[str, Any]:
    """A row of clips.jsonl's `clip`, asked `question`, of which `right` is the answer.

    Args:
        kept: What is known of the clip that the row says too.
    """
    return {
        "id": f"{Path(clip['audio']).stem}-{task}-{number}",
        "audio": clip["audio"],
        "start": 0.0,
        "end": clip["seconds"],
        "messages": [
            {"role": "user", "content": f"<audio>{question}"},
            {"role": "assistant", "content": right},
        ],
        "task": task,
        "license": clip["license"],
        **{key: clip[key] for key in kept if key in clip},
    }
