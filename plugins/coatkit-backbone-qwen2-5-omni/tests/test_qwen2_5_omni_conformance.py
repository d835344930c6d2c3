"""Everything coatkit asks of any backbone, on the tiny model."""

from __future__ import annotations

from typing import Any, ClassVar

from coatkit.testing import BackboneConformance


class TestConformance(BackboneConformance):
    name: ClassVar[str] = "qwen2.5-omni"
    options: ClassVar[dict[str, Any]] = {"weights": "random"}
