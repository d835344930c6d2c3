"""How the rows in data/ were chosen, from a labelled collection with a licence on every row.

    python make_data.py COLLECTION

COLLECTION holds manifest.jsonl and audio/. The shortest clips of each kind are taken as they are; none has a GPL part.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = {
    "asterisk-core-sounds-en-g722",
    "espeak-ng",
    "flite",
    "musescore-general-soundfont-small+fluidsynth",
    "minetest-data",
    "sonic-pi-samples",
    "coatkit-authored",
}
"""Those that ATTRIBUTION.md has the notices of."""

Row = dict[str, Any]

KINDS: list[tuple[int, Callable[[Row], bool]]] = [
    (8, lambda row: row["task"] == "asr" and row["labels"].get("synthetic") is False),
    (8, lambda row: row["task"] == "asr" and row["labels"].get("synthetic") is True),
    (4, lambda row: row["task"] == "speech_emotion_mc" and row["labels"]["style"] == "neutral"),
    (4, lambda row: row["task"] == "speech_emotion_mc" and row["labels"]["style"] == "sad"),
    (4, lambda row: row["task"] == "speech_emotion_mc" and row["labels"]["style"] == "excited"),
    (10, lambda row: row["task"] == "music_pitch"),
    (6, lambda row: row["task"] == "music_mc" and "chord" in row["labels"]),
    (10, lambda row: row["task"] == "music_mc" and "chord" not in row["labels"]),
    (10, lambda row: row["task"] == "sound_event_mc"),
    (10, lambda row: row["task"] == "text_sft"),
]
"""How many rows of each kind."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", type=Path)
    collection = parser.parse_args().collection
    rows = [json.loads(line) for line in (collection / "manifest.jsonl").open(encoding="utf-8")]
    rows = sorted((row for row in rows if row["source"] in SOURCES), key=lambda row: (row["end"] or 0, row["id"]))
    chosen: list[Row] = []
    for count, fits in KINDS:
        # Clips that are taken already first: one clip may be asked about in several ways.
        taken = {row["audio"] for row in chosen}
        chosen += sorted(filter(fits, rows), key=lambda row: row["audio"] not in taken)[:count]
    data = HERE / "data"
    shutil.rmtree(data, ignore_errors=True)
    (data / "audio").mkdir(parents=True)
    for name in sorted({row["audio"] for row in chosen if row["audio"]}):
        shutil.copyfile(collection / name, data / name)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(chosen, key=lambda row: row["id"]))
    (data / "manifest.jsonl").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in (data / "audio").iterdir()) / 1e6
    print(f"{len(chosen)} rows, {len(list((data / 'audio').iterdir()))} clips, {size:.1f} MB")


if __name__ == "__main__":
    main()
