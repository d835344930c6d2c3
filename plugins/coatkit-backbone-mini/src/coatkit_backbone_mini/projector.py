"""How the projector from audio encoder to language model starts, before any training.

It is a random two-layer map, the same on every machine, whose output over real audio is centred on the text
embeddings and as spread out as they are, so that the language model meets audio in the range it knows.
"""

from __future__ import annotations

import math

import torch

SEED = 20_250

# Mean square of one dimension of Whisper tiny.en's encoder output, pooled and normalised as Audio Flamingo 3 does, over
# 24 clips of speech, notes, chords and sound effects. About the same for any layer-normalised encoder.
ENCODER_POWER = 1.378
# Mean and, over time, variance of a hidden unit after the GELU, when the power above has been scaled to 1 before it.
# The mean is that of GELU of a standard normal, 1 / (2 sqrt(pi)). The variance was measured on the same clips with this
# seed; it is below that of GELU of a standard normal, 0.346, because part of each unit's power is constant in time.
HIDDEN_MEAN = 0.5 / math.sqrt(math.pi)
HIDDEN_VARIANCE = 0.282


def initial_projector(audio_width: int, text_rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of `AudioFlamingo3MultiModalProjector` (linear, GELU, linear). Leaves torch's global generator alone.

    Args:
        audio_width: Width of the encoder's output.
        text_rows: Text embeddings the output is matched to, [rows, hidden].

    Returns:
        State dictionary in float32: `linear_1` [hidden, audio_width], `linear_2` [hidden, hidden], and their biases.
    """
    rows = text_rows.float()
    hidden = rows.shape[1]
    spread = rows.std(dim=0).square().mean().sqrt()
    generator = torch.Generator().manual_seed(SEED)
    first = torch.randn(hidden, audio_width, generator=generator) / math.sqrt(audio_width * ENCODER_POWER)
    second = torch.randn(hidden, hidden, generator=generator) * spread / math.sqrt(hidden * HIDDEN_VARIANCE)
    return {
        "linear_1.weight": first,
        "linear_1.bias": torch.zeros(hidden),
        "linear_2.weight": second,
        "linear_2.bias": rows.mean(dim=0) - HIDDEN_MEAN * second.sum(dim=1),
    }
