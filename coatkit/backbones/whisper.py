"""Whisper-style audio front end in 30 s windows, as Audio Flamingo 3 and the mini backbone use it.

A window of N samples gives T = ceil(N / 160) mel frames and ((T - 1) // 2 + 1) // 2 audio tokens: 25 per second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coatkit.protocols import AudioBatch

HOP = 160
"""Samples per mel frame at 16 kHz."""
WINDOW = 480_000
"""Samples of a full window: 30 s."""


def window_tokens(samples: int) -> int:
    """Audio tokens of one window of `samples` samples; 0 for 320 samples or fewer."""
    frames = -(-samples // HOP)
    return ((frames - 1) // 2 + 1) // 2 if frames > 0 else 0


def audio_tokens(samples: int) -> int:
    """Audio tokens of a sound of any length."""
    full, rest = divmod(samples, WINDOW)
    return full * window_tokens(WINDOW) + window_tokens(rest)


def windowed_features(extractor: Any, audio: AudioBatch) -> tuple[dict[str, Tensor], list[int]]:
    """Log-mel windows `input_features` [W, mels, T] with `input_features_mask` [W, T], and audio tokens per sound.

    T is trimmed to the longest window and the two frames its convolutions still see; the stock front end always
    computes 3000.
    """
    windows, counts = [], []
    for samples, length in zip(audio.samples, audio.lengths.tolist(), strict=True):
        windows += [samples[i : min(i + WINDOW, length)].numpy() for i in range(0, length, WINDOW)]
        counts.append(audio_tokens(length))
    frames = -(-max(w.shape[0] for w in windows) // HOP) + 2
    frames = min(frames + frames % 2, WINDOW // HOP)
    out = extractor(
        windows,
        sampling_rate=audio.sample_rate,
        padding="max_length",
        max_length=frames * HOP,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {"input_features": out["input_features"], "input_features_mask": out["attention_mask"]}, counts


def valid_frames(hidden: Tensor, mask: Tensor) -> Tensor:
    """Tower output [W, L, d] without padding, in order: [sum of audio tokens, d]."""
    frames = (((mask.sum(-1) - 1) // 2 + 1) // 2).clamp(min=0)
    return hidden[torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]]


def allow_short_windows(tower: nn.Module) -> None:
    """Let a tower that adds a position to all 1500 frames take shorter windows, by lending it fewer positions.

    The positions are frozen, so swapping the storage for the length of a call changes nothing else.
    """
    full: list[Tensor] = []

    def shorten(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mel = kwargs["input_features"] if "input_features" in kwargs else args[0]
        full.append(module.embed_positions.weight.data)
        module.embed_positions.weight.data = full[-1][: (mel.shape[-1] - 1) // 2 + 1]

    def restore(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if full:
            module.embed_positions.weight.data = full.pop()

    tower.register_forward_pre_hook(shorten, with_kwargs=True)
    tower.register_forward_hook(restore, always_call=True)
