"""How the projector from audio encoder to language model starts.

In the folder it is a random two-layer map, the same on every machine, whose output over real audio is centred on the
text embeddings and as spread out as they are, so that the language model meets audio in the range it knows. What ships
with this package has been trained from there, by examples/mini-backbone, and takes its place unless told otherwise.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coatkit import AssetError
from coatkit_backbone_mini.options import Options

ALIGNED = Path(__file__).with_name("projector.safetensors")
"""The projector that ships with this package, in half precision; projector.md beside it says what it can hear."""
ALIGNED_SHA256 = "b45621db2179495aedf16312072a9922588fd8012b25d137cc151ace1923606e"

SEED = 20_250

# Mean square of one dimension of Whisper tiny.en's encoder output, pooled and normalised as Audio Flamingo 3 does, over
# 24 clips of speech, notes, chords and sound effects. About the same for any layer-normalised encoder.
ENCODER_POWER = 1.378
# Mean and, over time, variance of a hidden unit after the GELU, when the power above has been scaled to 1 before it.
# The mean is that of GELU of a standard normal, 1 / (2 sqrt(pi)). The variance was measured on the same clips with this
# seed; it is below that of GELU of a standard normal, 0.346, because part of each unit's power is constant in time.
HIDDEN_MEAN = 0.5 / math.sqrt(math.pi)
HIDDEN_VARIANCE = 0.282


_log = logging.getLogger(__name__)


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


def replaces_projector(options: Options) -> bool:
    """Whether the model starts with another projector than its folder's."""
    return options.projector != "random" and (options.projector != "aligned" or options.weights == "default")


def start_projector(projector: nn.Module, options: Options) -> None:
    """Put the weights that `options.projector` names into the projector of the default weights.

    Another folder's projector, or a tiny random model's, is left as it is, unless a file is named.

    Raises:
        AssetError: If the file cannot be read or holds other tensors.
    """
    choice = options.projector
    if not replaces_projector(options):
        if choice == "random" and options.weights == "default":
            _log.warning("RANDOM PROJECTOR in the mini backbone: it hears nothing before training")
        return
    path = ALIGNED if choice == "aligned" else Path(choice).expanduser()
    try:
        state = load_file(path)
        projector.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AssetError(
            f"projector: {path} cannot be used: {error}\n  Give `aligned`, `random`, or a safetensors file with "
            "linear_1 and linear_2, each a weight and a bias, as examples/mini-backbone/align.py writes it."
        ) from error
