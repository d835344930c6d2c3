"""Notes, drums and effects out of a General MIDI soundfont, and tones and noises made by formula.

Everything is mono float32 at 16 kHz.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy

RATE = 16_000
NAMES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")

INSTRUMENTS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "piano": ((0, 1, 2), 36, 88),
    "organ": ((16, 18, 19), 36, 84),
    "guitar": ((24, 25, 26, 27), 40, 80),
    "bass": ((32, 33, 34, 35), 28, 52),
    "violin": ((40,), 55, 91),
    "cello": ((42,), 36, 72),
    "harp": ((46,), 36, 88),
    "strings": ((48, 49), 40, 84),
    "choir": ((52, 53), 45, 79),
    "trumpet": ((56, 59), 54, 82),
    "saxophone": ((64, 65, 66), 45, 80),
    "clarinet": ((71,), 50, 86),
    "flute": ((73, 75), 60, 91),
    "xylophone": ((12, 13), 55, 91),
    "banjo": ((105,), 50, 80),
    "accordion": ((21,), 48, 84),
}
"""Instrument: General MIDI programs (from 0), lowest and highest MIDI note."""

DRUMS: dict[str, tuple[int, ...]] = {
    "kick drum": (35, 36),
    "snare drum": (38, 40),
    "clap": (39,),
    "cymbal": (49, 51, 57),
    "tambourine": (54,),
    "cowbell": (56,),
    "bongo": (60, 61),
    "whistle": (71, 72),
    "triangle": (81,),
}
KITS = (0, 8, 16, 24, 25, 32, 40)

EFFECTS: dict[str, int] = {
    "waves": 122,
    "bird": 123,
    "telephone": 124,
    "helicopter": 125,
    "applause": 126,
    "gunshot": 127,
}

FORMULAS = ("beep", "siren", "hiss", "hum", "clock")
SOUNDS = (*DRUMS, *EFFECTS, *FORMULAS, "bell", "fire", "water", "footsteps", "engine")
"""What a row may ask the name of; the last five come from a collection of recordings."""


class Font:
    """A soundfont file, played by the wheel `tinysoundfont`."""

    def __init__(self, path: Path) -> None:
        import tinysoundfont

        self.synth: Any = tinysoundfont.Synth(samplerate=RATE, gain=-3)
        self.font = self.synth.sfload(str(path))

    def notes(self, program: int, keys: list[int], seconds: float, velocity: int = 100, bank: int = 0) -> numpy.ndarray:
        """Keys one after the other, each of `seconds`; the last rings on for 0.15 s."""
        self.synth.sounds_off()
        if bank == 128:
            self.synth.program_change(0, program, True)
        else:
            self.synth.program_select(0, self.font, bank, program)
        parts = []
        for key in keys:
            self.synth.noteon(0, key, velocity)
            parts.append(self._sound(seconds))
            self.synth.noteoff(0, key)
        parts.append(self._sound(0.15))
        self.synth.sounds_off()
        return numpy.concatenate(parts)

    def _sound(self, seconds: float) -> numpy.ndarray:
        stereo = numpy.frombuffer(bytes(self.synth.generate(int(seconds * RATE))), dtype="float32")
        return stereo.reshape(-1, 2).mean(1)


def tone(draw: Any, keys: list[int], seconds: float) -> numpy.ndarray:
    """Keys as tones of random timbre: one to eight harmonics that fall off, plucked or held."""
    harmonics, slope = draw.randint(1, 8), draw.uniform(0.6, 2.0)
    plucked, odd = draw.random() < 0.5, draw.random() < 0.3
    parts = []
    time = numpy.arange(int(seconds * RATE)) / RATE
    for key in keys:
        pitch = 440.0 * 2 ** ((key - 69) / 12)
        sound = numpy.zeros_like(time)
        for n in range(1, harmonics + 1, 2 if odd else 1):
            if n * pitch < 7_500:
                sound += numpy.sin(2 * math.pi * n * pitch * time + draw.uniform(0, 6.3)) / n**slope
        shape = numpy.exp(-3 * time) if plucked else numpy.ones_like(time)
        shape *= numpy.minimum(1, time / 0.01) * numpy.minimum(1, (time[-1] - time) / 0.02)
        parts.append(sound * shape)
    return numpy.concatenate(parts).astype("float32")


def formula(name: str, draw: Any, seconds: float) -> numpy.ndarray:
    """A sound of `FORMULAS`."""
    count = int(seconds * RATE)
    time = numpy.arange(count) / RATE
    noise = numpy.random.default_rng(draw.randrange(2**31))
    if name == "beep":  # one tone switched on and off
        period, pitch = draw.uniform(0.15, 0.5), draw.uniform(700, 2_500)
        sound = numpy.sin(2 * math.pi * pitch * time) * ((time % period) < 0.6 * period)
    elif name == "siren":  # a tone that sweeps up and down
        low, high, period = draw.uniform(300, 600), draw.uniform(900, 1_600), draw.uniform(0.4, 1.2)
        swing = 0.5 - 0.5 * numpy.cos(2 * math.pi * (time / period + draw.random()))
        sound = numpy.sin(2 * math.pi * numpy.cumsum(low + (high - low) * swing) / RATE)
    elif name == "hiss":  # white noise, more or less of its low part taken away
        sound = noise.normal(size=count)
        sound -= draw.uniform(0, 0.95) * numpy.concatenate([[0], sound[:-1]])
    elif name == "hum":  # mains hum with harmonics
        base = draw.choice([50, 60, 100, 120]) * draw.uniform(0.97, 1.03)
        sound = sum(numpy.sin(2 * math.pi * base * n * time + n) / n ** draw.uniform(0.8, 1.6) for n in range(1, 7))
    else:  # clock: short clicks at a steady rate
        period, pitch, decay = draw.uniform(0.12, 0.4), draw.uniform(1_500, 4_000), draw.uniform(150, 600)
        phase = time % period
        sound = numpy.sin(2 * math.pi * pitch * phase) * numpy.exp(-decay * phase)
    sound = sound + draw.choice([0, 0.003, 0.01]) * noise.normal(size=count)
    return numpy.asarray(sound, dtype="float32")
