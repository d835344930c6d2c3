"""How the quickstart's rows were made, from a labelled collection with a licence on every row.

    python make_data.py COLLECTION

COLLECTION holds manifest.jsonl and audio/. Clips with a GPL part are left out, and two seconds of each are kept;
ATTRIBUTION.md says where they come from. Held-out rows share no clip with the training rows, and no held-out synthetic
voice is heard in those.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import soundfile

HERE = Path(__file__).parent
HELDOUT_VOICES = {"espeak:en-us+f4", "espeak:en-gb", "espeak:en-us+Andy"}
KIND = "Is this speech, music or noise?"
NOTE = "Is the note low, middle or high?"
# The model answers after a glimpse: a second and a bit is enough for both questions, and quick on a CPU.
GLIMPSE = 1.2
KEPT_SECONDS = 2.0
SPEECH_SOURCES = {"espeak-ng": 3, "flite": 3, "asterisk-core-sounds-en-g722": 4}
"""Of each source of speech, every n-th clip is taken."""

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
        samples, rate = soundfile.read(collection / clip["audio"], frames=int(KEPT_SECONDS * 16_000))
        soundfile.write(audio / Path(clip["audio"]).name, samples, rate)
        rows[heldout(clip, number)] += list(questions(clip))
    for name, held in (("train", False), ("heldout", True)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[held])
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in audio.iterdir()) / 1e6
    print(f"{len(clips)} clips, {size:.1f} MB; {len(rows[False])} training rows, {len(rows[True])} held out")


def choose(rows: Iterable[Clip]) -> list[Clip]:
    """One row per clip that is used: some of the speech, every single note, and effects."""
    clips: dict[str, Clip] = {}
    for row in rows:
        if row.get("audio") and "GPL" not in row["license"]:
            clips.setdefault(row["audio"], row)
    chosen = [c for c in clips.values() if Path(c["audio"]).name.startswith("note_")]
    chosen += [c for c in clips.values() if c["source"] in ("minetest-data", "sonic-pi-samples")]
    for source, every in SPEECH_SOURCES.items():
        chosen += [c for c in clips.values() if c["source"] == source][::every]
    return chosen


def heldout(clip: Clip, number: int) -> bool:
    """Synthetic speech is held out by voice; of everything else, every fourth clip is."""
    if clip["source"] in ("espeak-ng", "flite"):
        return clip["labels"]["speaker"] in HELDOUT_VOICES
    return number % 4 == 0


def questions(clip: Clip) -> Iterable[dict[str, Any]]:
    """The rows asked about one clip."""
    labels = clip["labels"]
    if "notes" in labels:
        pitch = labels["notes"][0][2]  # MIDI number
        yield row(clip, "kind", KIND, "music")
        yield row(clip, "note", NOTE, "low" if pitch < 55 else "middle" if pitch < 67 else "high")
    else:
        yield row(clip, "kind", KIND, "speech" if "transcript" in labels else "noise")


def row(clip: Clip, task: str, question: str, answer: str) -> dict[str, Any]:
    name = Path(clip["audio"])
    return {
        "id": f"{name.stem}-{task}",
        "audio": f"audio/{name.name}",
        "start": 0.0,
        "end": min(GLIMPSE, round(clip["end"], 4)),
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
