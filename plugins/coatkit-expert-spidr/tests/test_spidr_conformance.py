"""coatkit's own checks of an expert, on SpidR with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from coatkit.testing import ExpertConformance
from coatkit_expert_spidr import loading


class TestConformance(ExpertConformance):
    name = "spidr"
    options: ClassVar[dict[str, Any]] = {"weights": "random"}
    checkpoint_tensor = "student.layers.7.attention.qkv.weight"

    def checkpoint(self, folder: Path) -> Path:
        """A file with upstream's names and shapes; one stored number for each tensor keeps it small."""
        network = loading.build("random", layer=12)
        with loading.upstream_layout(network):
            state = network.state_dict()
        tensors = {name: torch.tensor(0.01).expand(value.shape) for name, value in state.items()}
        unused = {"teacher.layer_norm.bias": torch.zeros(768), "current_step": torch.zeros(1, dtype=torch.int64)}
        torch.save({"model": tensors | unused, "optimizer": {}, "epoch": torch.zeros(1)}, folder / "spidr_base.pt")
        return folder / "spidr_base.pt"
