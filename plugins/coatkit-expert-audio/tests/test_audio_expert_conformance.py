"""The reconstruction expert keeps every promise of an expert, on the tiny mini backbone."""

from __future__ import annotations

import tempfile
from typing import ClassVar

import pytest

from coatkit import Backbone, load_backbone
from coatkit.testing import ExpertConformance


class OnMini(ExpertConformance):
    name = "audio"

    def backbone(self) -> Backbone:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setenv("COATKIT_CACHE", folder)
            return load_backbone("mini", weights="random", device="cpu")


class TestConsumed(OnMini):
    other_options: ClassVar = {"target": "tower"}


class TestTower(OnMini):
    options: ClassVar = {"target": "tower"}
    other_options: ClassVar = {"target": "consumed"}
