"""What every expert promises, checked for this one."""

from __future__ import annotations

from pathlib import Path

import torch

from coatkit.testing import ExpertConformance
from coatkit_expert_panns import front_end
from coatkit_expert_panns.network import Network


class TestConformance(ExpertConformance):
    name = "panns"
    options = {"weights": "random"}  # noqa: RUF012  # as docs/testing.md writes it
    checkpoint_tensor = "fc_audioset.weight"

    def checkpoint(self, folder: Path) -> Path:
        """Zeros, which take no room in a file, but for the front end."""
        with torch.device("meta"):
            wanted = Network().state_dict()
        tensors = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in wanted.items()}
        real, imaginary = front_end.windowed_fourier()
        tensors["spectrogram_extractor.stft.conv_real.weight"] = real
        tensors["spectrogram_extractor.stft.conv_imag.weight"] = imaginary
        path = folder / "Cnn14_DecisionLevelMax.pth"
        torch.save({"iteration": 600_000, "model": tensors}, path)
        return path
