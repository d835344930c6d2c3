"""Parity of examples/mini-study/speaker.py with Resemblyzer 0.1.4, on its own weights.

Compared are the mel spectrogram and the embedding of every window of 1.6 s. Where windows lie is our own choice (one
around every 0.4 s), so upstream's network is given upstream's spectrogram of those windows. Upstream's voice activity
detection is left out on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

PACKAGES = ["Resemblyzer", "librosa", "torch", "numpy"]
RATE = 16_000
LIMITS = {"mel": 1e-5, "features": 2e-4}
NOTE = (
    "The user-written expert of examples/mini-study, with Resemblyzer's weights. Ours encodes all sounds in one batch. "
    "Where a sweep is low its recurrent network widens differences of the spectrogram."
)

Encode = Callable[[list[np.ndarray]], list["dict[str, np.ndarray] | None"]]
HERE = Path(__file__).resolve().parent
HOP, WINDOW, STEP = 160, 160, 40


def starts(samples: int) -> np.ndarray:
    """First mel frame of each window: the one around every 0.4 s that lies inside the sound, as far as there is one."""
    centres = np.arange(-(-samples // (STEP * HOP))) * STEP + STEP // 2
    return np.minimum(np.maximum(centres - WINDOW // 2, 0), max(samples // HOP - WINDOW, 0))


def upstream(folder: Path, extras: bool) -> Encode:
    import scipy.ndimage
    import torch

    sys.modules.setdefault("scipy.ndimage.morphology", scipy.ndimage)  # its name when upstream was written
    from resemblyzer import VoiceEncoder
    from resemblyzer.audio import normalize_volume, wav_to_mel_spectrogram
    from resemblyzer.hparams import audio_norm_target_dBFS

    encoder = VoiceEncoder("cpu", verbose=False).eval()

    def one(samples: np.ndarray) -> dict[str, np.ndarray] | None:
        if not samples.any():  # its volume would be the logarithm of 0
            return None
        sound = normalize_volume(samples, audio_norm_target_dBFS, increase_only=True)
        padded = np.pad(sound, (0, max(0, WINDOW * HOP - len(sound))))
        mel = wav_to_mel_spectrogram(padded)
        with torch.no_grad():
            windows = torch.from_numpy(np.stack([mel[at : at + WINDOW] for at in starts(len(samples))]))
            return {"mel": mel, "features": encoder(windows).numpy()}

    return lambda sounds: [one(samples) for samples in sounds]


def ours(folder: Path, extras: bool) -> Encode:
    import torch

    import coatkit

    (wheel,) = (HERE.parents[1] / ".parity/wheels").glob("Resemblyzer-*.whl")
    expert = coatkit.load_expert(
        f"{HERE.parents[1] / 'examples/mini-study/speaker.py'}:Speaker", weights=str(wheel), device="cpu"
    )

    def every(sounds: list[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
        audio = coatkit.AudioBatch.from_arrays(sounds, RATE)
        with torch.no_grad():
            features, mel = expert.encode(audio), expert._mel(audio)
        found: list[dict[str, np.ndarray] | None] = []
        for i, samples in enumerate(sounds):
            frames = max(len(samples), WINDOW * HOP) // HOP + 1
            values = features.values[i, : int(features.lengths[i])].numpy() / expert.dim**0.5
            found.append({"mel": mel[i, :frames].numpy(), "features": values})
        return found

    return every
