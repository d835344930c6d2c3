"""coatkit's own checks of an expert, on emotion2vec with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from coatkit.testing import ExpertConformance
from coatkit_expert_emotion2vec.loading import name_as_upstream
from coatkit_expert_emotion2vec.network import SIZES, Network


class TestConformance(ExpertConformance):
    name = "emotion2vec"
    options: ClassVar[dict[str, Any]] = {"weights": "random"}
    checkpoint_tensor = "blocks.3.attn.qkv.weight"

    def checkpoint(self, folder: Path) -> Path:
        """A file with upstream's names and shapes; one stored number for each tensor keeps it small."""
        with torch.device("meta"):
            network = Network(SIZES["base"])
        name_as_upstream(network)
        tensors = {name: torch.tensor(0.01).expand(value.shape) for name, value in network.state_dict().items()}
        torch.save({"model": tensors}, folder / "emotion2vec_base.pt")
        return folder / "emotion2vec_base.pt"
