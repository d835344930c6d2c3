"""What every backbone promises."""

from __future__ import annotations

from typing import Any, ClassVar

from coatkit.testing import BackboneConformance


class TestConformance(BackboneConformance):
    name = "audio-flamingo-3"
    options: ClassVar[dict[str, Any]] = {"weights": "random"}
    longest_seconds = 65.0
