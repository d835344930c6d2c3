"""Rows of the benchmarks that upstream lacks, from their folders as they are handed out. Needs no lmms-eval.

The rows are coatkit's own, so that `coatkit eval` and lmms-eval read the same file. The paper's prompts are not known
to us: the questions are ours.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coatkit import AudioRef, DataError
from coatkit.data.audio import duration

GENRES = ("blues", "classical", "country", "disco", "hip-hop", "jazz", "metal", "pop", "reggae", "rock")
MELD_EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
IEMOCAP_EMOTIONS: Mapping[str, str] = {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
"""The usual four classes: excited counts as happy; other labels, and those without agreement, are left out."""
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".au")
_IEMOCAP_LINE = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t")

Found = tuple[Path, str, str]
"""A sound, its name, and the right answer."""


def _of(options: Any) -> str:
    return f"Answer with one of: {', '.join(options)}."


def gtzan(folder: Path) -> Iterator[Found]:
    """GTZAN: a folder for each genre, with clips of 30 s. All of them: the paper's split is not known to us."""
    for genre in GENRES:
        for path in sorted(p for p in folder.rglob("*") if p.parent.name.replace("hiphop", "hip-hop") == genre):
            if path.suffix in SOUNDS:
                yield path, path.stem, genre


def meld(folder: Path) -> Iterator[Found]:
    """MELD's test split: `test_sent_emo.csv` and a sound for each utterance, `diaN_uttM`, anywhere below the folder."""
    table = next(folder.rglob("test_sent_emo.csv"), None)
    if table is None:
        raise DataError(f"{folder}: no test_sent_emo.csv in it or below")
    sounds = {path.stem: path for path in sorted(folder.rglob("dia*_utt*")) if path.suffix in SOUNDS}
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if rows and (missing := {"Dialogue_ID", "Utterance_ID", "Emotion"} - set(rows[0])):
        raise DataError(f"{table}: no column {', '.join(sorted(missing))}")
    for row in rows:
        name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        if name not in sounds:
            raise DataError(
                f"{folder}: no sound {name} ({', '.join(SOUNDS)}); MELD comes as videos, take their sound out with:"
                f" ffmpeg -i {name}.mp4 -vn -ac 1 -ar 16000 {name}.wav"
            )
        yield sounds[name], name, row["Emotion"].strip().lower()


def iemocap(folder: Path) -> Iterator[Found]:
    """IEMOCAP's session 5: `dialog/EmoEvaluation/*.txt` and `sentences/wav/DIALOG/NAME.wav` of its `Session5`."""
    session = folder if folder.name == "Session5" else folder / "Session5"
    labels = sorted((session / "dialog" / "EmoEvaluation").glob("*.txt"))
    if not labels:
        raise DataError(f"{session}: no dialog/EmoEvaluation/*.txt in it; give IEMOCAP's folder, or its Session5")
    for path in labels:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            match = _IEMOCAP_LINE.match(line)
            if match and match[2] in IEMOCAP_EMOTIONS:
                yield (
                    session / "sentences" / "wav" / path.stem / f"{match[1]}.wav",
                    match[1],
                    IEMOCAP_EMOTIONS[match[2]],
                )


BENCHMARKS: Mapping[str, tuple[Callable[[Path], Iterator[Found]], str]] = {
    "gtzan": (gtzan, f"Which genre is this music? {_of(GENRES)}"),
    "meld": (meld, f"Which emotion does the speaker express? {_of(MELD_EMOTIONS)}"),
    "iemocap_session_5": (
        iemocap,
        f"Which emotion does the speaker express? {_of(dict.fromkeys(IEMOCAP_EMOTIONS.values()))}",
    ),
}


def prepare(name: str, folder: Path, out: Path) -> tuple[int, list[str]]:
    """Write the rows of a benchmark.

    Args:
        name: One of BENCHMARKS.
        folder: What was handed out.
        out: JSON Lines to write; paths of sounds in it are absolute.

    Returns:
        Rows written, and why each sound that cannot be opened was left out.

    Raises:
        DataError: If the folder is not laid out as it is handed out, or no row is left.
    """
    read, question = BENCHMARKS[name]
    rows, bad = [], []
    for path, row_id, answer in read(folder.resolve()):
        try:
            duration(AudioRef(path))
        except DataError as error:
            bad.append(str(error))
            continue
        messages = [{"role": "user", "content": f"<audio>{question}"}, {"role": "assistant", "content": answer}]
        rows.append({"id": row_id, "audio": str(path), "messages": messages, "task": name})
    if not rows:
        raise DataError(f"{folder}: no sound of {name} in it" + (f", first: {bad[0]}" if bad else ""))
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows), bad
