"""How the quickstart's rows were made, from a labelled collection with a licence on every row.

    python make_data.py COLLECTION

COLLECTION holds manifest.jsonl and audio/. Only clips without a GPL part and short enough for a CPU are taken; ATTRIBUTION.md
says where they come from. Held-out rows share no clip with the training rows, and their speakers are heard nowhere in them.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HELDOUT_VOICES = {"espeak:en-us+f4", "espeak:en-gb"}
KIND = "Is this speech, music or noise?"
VOICE = "Is the speaker a man or a woman?"
NOTE = "Is the note low, middle or high?"
SENTENCE = "What does the speaker say?"
# Seconds of a clip that are enough for a question; sentences are heard in full.
GLIMPSE = 1.5
MAX_SECONDS = 3.6

Clip = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", type=Path)
    collection = parser.parse_args().collection
    clips = choose(json.loads(line) for line in (collection / "manifest.jsonl").open())
    audio = HERE / "audio"
    shutil.rmtree(audio, ignore_errors=True)
    audio.mkdir()
    rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for number, clip in enumerate(clips):
        shutil.copy(collection / clip["audio"], audio)
        rows[heldout(clip, number)] += list(questions(clip))
    for name, held in (("train", False), ("heldout", True)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[held])
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in audio.iterdir()) / 1e6
    print(f"{len(clips)} clips, {size:.1f} MB; {len(rows[False])} training rows, {len(rows[True])} held out")


def choose(rows: Iterable[Clip]) -> list[Clip]:
    """One row per clip that is used: sentences said by a held-out voice too, single notes, and effects."""
    clips: dict[str, Clip] = {}
    for row in rows:
        if row.get("audio") and "GPL" not in row["license"] and row["end"] <= MAX_SECONDS:
            clips.setdefault(row["audio"], row)
    speech = [c for c in clips.values() if c["source"] in ("espeak-ng", "flite")]
    tested = {c["labels"]["transcript"] for c in speech if c["labels"]["speaker"] in HELDOUT_VOICES}
    speech = [c for c in speech if c["labels"]["transcript"] in tested]
    notes = [c for c in clips.values() if Path(c["audio"]).name.startswith("note_")]
    effects = [c for c in clips.values() if c["source"] in ("minetest-data", "sonic-pi-samples")]
    return speech + notes + effects


def heldout(clip: Clip, number: int) -> bool:
    """Speech is held out by voice; of notes and effects, every fourth clip is."""
    speaker = clip["labels"].get("speaker")
    return speaker in HELDOUT_VOICES if speaker else number % 4 == 0


def questions(clip: Clip) -> Iterable[dict[str, Any]]:
    """The rows asked about one clip."""
    labels = clip["labels"]
    if "transcript" in labels:
        yield row(clip, "kind", KIND, "speech", GLIMPSE)
        yield row(clip, "voice", VOICE, "a man" if labels["gender"] == "male" else "a woman", GLIMPSE)
        yield row(clip, "sentence", SENTENCE, labels["transcript"])
    elif "notes" in labels:
        pitch = labels["notes"][0][2]  # MIDI number
        yield row(clip, "kind", KIND, "music", GLIMPSE)
        yield row(clip, "note", NOTE, "low" if pitch < 55 else "middle" if pitch < 67 else "high", GLIMPSE)
    else:
        yield row(clip, "kind", KIND, "noise", GLIMPSE)


def row(clip: Clip, task: str, question: str, answer: str, seconds: float = MAX_SECONDS) -> dict[str, Any]:
    name = Path(clip["audio"])
    return {
        "id": f"{name.stem}-{task}",
        "audio": f"audio/{name.name}",
        "start": 0.0,
        "end": min(seconds, round(clip["end"], 4)),
        "messages": [
            {"role": "user", "content": f"<audio>{question}"},
            {"role": "assistant", "content": answer},
        ],
        "task": task,
        "source": clip["source"],
        "license": clip["license"],
    }


if __name__ == "__main__":
    main()
