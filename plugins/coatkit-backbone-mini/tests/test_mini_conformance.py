"""coatkit's own checks of a backbone, on the mini backbone with random weights."""

from __future__ import annotations

from typing import Any, ClassVar

from coatkit.testing import BackboneConformance


class TestConformance(BackboneConformance):
    name = "mini"
    options: ClassVar[dict[str, Any]] = {"weights": "random"}
