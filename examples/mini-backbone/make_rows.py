"""Make rows of questions and answers from the clips: train.jsonl, heldout.jsonl and suite.yml beside them.

    python make_rows.py --data data --rows 6000

Every question has several wordings; held-out rows use one that is trained on, and each clip once per task. The suite
asks the held-out rows and scores the closed questions among their options.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from align import SETS, describe
from rows import row_of

HERE = Path(__file__).parent
SEED = 12
WORDINGS: dict[str, tuple[str, ...]] = {
    "text": ("What is said?", "Write down what is said.", "Which words are spoken?", "Transcribe the speech."),
    "word": ("Which word is said?", "What word do you hear?", "Name the word that is spoken."),
    "kind": ("Is this speech, music or noise?", "Do you hear speech, music or noise?", "What kind of sound is this?"),
    "gender": (
        "Is the speaker a man or a woman?",
        "Does a man or a woman speak?",
        "Who speaks, a man or a woman?",
    ),
    "instrument": ("Which instrument is playing?", "What instrument do you hear?", "Name the instrument."),
    "height": (
        "Is the note low, middle or high?",
        "How high is it: low, middle or high?",
        "Low, middle or high?",
    ),
    "direction": ("Do the notes go up or down?", "Does the melody rise or fall: up or down?", "Up or down?"),
    "sound": ("What makes this sound?", "Which sound do you hear?", "Name the sound."),
}
SHARES = {"text": 8, "word": 3, "kind": 2, "gender": 2, "instrument": 3, "height": 3, "direction": 1, "sound": 2}
"""Of 24 training rows, how many ask for what."""
MOST_WORDS = 6
"""Most words in a transcript that is asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--rows", type=int, default=6000, help="rows to train on")
    arguments = parser.parse_args()
    clips = [describe(json.loads(line)) for line in (arguments.data / "clips.jsonl").open(encoding="utf-8")]
    rows = {"train": train_rows(clips, arguments.rows), "heldout": heldout_rows(clips)}
    for name, found in rows.items():
        with (arguments.data / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        print(f"{name}.jsonl: {len(found)} rows")
    (arguments.data / "suite.yml").write_text(suite(), encoding="utf-8")


def answer(clip: dict[str, Any], task: str) -> str | None:
    """What is right, or None where the question does not fit the clip."""
    if task == "text":
        said = clip.get("text", "")
        return said if 1 < len(said.split()) <= MOST_WORDS else None
    if task == "word":
        said = clip.get("text", "")
        return said if len(said.split()) == 1 else None
    return clip.get(task)


def train_rows(clips: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows, by task as SHARES says; a task goes through its clips in random order, again and again."""
    draw = random.Random(SEED)
    rows = []
    for task, share in SHARES.items():
        fitting = [clip for clip in clips if clip["split"] == "train" and answer(clip, task)]
        order: list[dict[str, Any]] = []
        for _ in range(count * share // sum(SHARES.values())):
            order = order or draw.sample(fitting, len(fitting))
            rows.append(row(order.pop(), task, draw.choice(WORDINGS[task]), len(rows)))
    return rows


def heldout_rows(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for task in WORDINGS:
        for clip in clips:
            if clip["split"] == "heldout" and answer(clip, task):
                rows.append(row(clip, task, WORDINGS[task][0], len(rows)))
    return rows


def row(clip: dict[str, Any], task: str, question: str, number: int) -> dict[str, Any]:
    return row_of(clip, task, question, answer(clip, task), number, ("voice", "source"))


def suite() -> str:
    """The tasks for `coatkit eval`: closed questions by choice, words exactly, transcripts by word error rate."""
    lines = ["name: heldout", "tasks:"]
    for task in WORDINGS:
        where = f"{{path: heldout.jsonl, filter: {{where: {{task: {task}}}}}}}"
        metric = {"text": "wer", "word": "exact"}.get(task, "choice")
        lines += [f"  - name: {task}", f"    data: {where}", f"    metric: {metric}", "    max_new_tokens: 16"]
        if metric == "choice":
            lines.append(f"    choices: [{', '.join(SETS[task])}]")
        if metric == "wer":
            lines.append("    language: en")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
