"""basic-pitch keeps every promise of an expert, with the weights it ships."""

from __future__ import annotations

import shutil
from pathlib import Path

from coatkit.testing import ExpertConformance
from coatkit_expert_basic_pitch import loading


class TestConformance(ExpertConformance):
    name = "basic-pitch"

    def checkpoint(self, folder: Path) -> Path:
        return Path(shutil.copy(loading.SHIPPED, folder))
