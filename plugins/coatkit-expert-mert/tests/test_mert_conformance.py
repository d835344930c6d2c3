"""coatkit's own checks of an expert, on MERT with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from coatkit.testing import ExpertConformance
from coatkit_expert_mert.loading import SIZES


class TestConformance(ExpertConformance):
    name = "mert"
    options: ClassVar[dict[str, Any]] = {"weights": "random"}
    checkpoint_tensor = "encoder.layers.7.attention.k_proj.weight"

    def checkpoint(self, folder: Path) -> Path:
        """A file with the hub's names and shapes; one stored number for each tensor keeps it small."""
        from transformers import HubertConfig, HubertModel

        with torch.device("meta"):
            model = HubertModel(HubertConfig(**SIZES))
        tensors = {name: torch.tensor(0.01).expand(value.shape) for name, value in model.state_dict().items()}
        positional = "encoder.pos_conv_embed.conv."
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            tensors[positional + old] = tensors.pop(f"{positional}parametrizations.weight.{new}")
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
