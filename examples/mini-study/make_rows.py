"""Make the study's rows from the clips of `../mini-backbone/make_data.py`: study-warm-up.jsonl, ...

    python ../mini-backbone/make_data.py --out data        # as its README says; once, for both
    python make_rows.py --data data

Five tasks. Nothing held out was trained on: other voices and texts (speaker, transcription), another soundfont (pitch,
instrument, sound), other recordings (sound). The default backbone's projector was aligned on clips of the same training
voices and soundfont, and on none that is held out. Clips are drawn with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "mini-backbone"))

from align import describe  # noqa: E402
from rows import row_of  # noqa: E402

SEED = 21
LONGEST = 2.0  # seconds
MOST_WORDS = 3
QUESTIONS = {
    "transcription": "What is said?",
    "speaker": "Is the speaker a man or a woman?",
    "pitch": "Is the note low, middle or high?",
    "instrument": "Which instrument is playing?",
    "sound": "What makes this sound?",
}
KEYS = {"speaker": "gender", "pitch": "height", "instrument": "instrument", "sound": "sound"}
SHARES = {"transcription": 6, "speaker": 8, "pitch": 3, "instrument": 5, "sound": 4}
"""Of 26 training rows, how many ask for what."""
WARM_UP = 4
"""For as many training rows, how many the warm-up has: the speaker alone."""
HELDOUT = 96
"""Rows of each task that are asked at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--rows", type=int, default=3600, help="rows to train on")
    arguments = parser.parse_args()
    clips = [describe(json.loads(line)) for line in (arguments.data / "clips.jsonl").open(encoding="utf-8")]
    clips = [clip for clip in clips if clip["seconds"] <= LONGEST]
    for name, split, counts in (
        ("warm-up", "train", {"speaker": arguments.rows * WARM_UP // sum(SHARES.values())}),
        ("train", "train", {task: arguments.rows * share // sum(SHARES.values()) for task, share in SHARES.items()}),
        ("heldout", "heldout", dict.fromkeys(QUESTIONS, HELDOUT)),
    ):
        rows = [row for task, count in counts.items() for row in drawn(clips, split, task, count)]
        with (arguments.data / f"study-{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"study-{name}.jsonl: {len(rows)} rows")


def drawn(clips: list[dict[str, Any]], split: str, task: str, count: int) -> list[dict[str, Any]]:
    """Rows of one task. Training goes through its clips in random order, again where there are too few; a held-out clip
    is asked about once per task."""
    draw = random.Random(f"{SEED} {split} {task}")
    fitting = [clip for clip in clips if clip["split"] == split and answer(clip, task)]
    order: list[dict[str, Any]] = []
    while len(order) < count:
        order += draw.sample(fitting, len(fitting))
        if split == "heldout":
            break
    return [row(clip, task, number) for number, clip in enumerate(order[:count])]


def answer(clip: dict[str, Any], task: str) -> str | None:
    """What is right, or None where the question does not fit the clip."""
    if task == "transcription":
        said = clip.get("text", "")
        return said if 1 <= len(said.split()) <= MOST_WORDS else None
    return clip.get(KEYS[task])


def row(clip: dict[str, Any], task: str, number: int) -> dict[str, Any]:
    return row_of(clip, task, QUESTIONS[task], answer(clip, task), number, ("voice", "source", "key"))


if __name__ == "__main__":
    main()
