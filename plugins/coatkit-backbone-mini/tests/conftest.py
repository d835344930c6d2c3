"""Fixtures: an empty cache, a tiny folder, and (fetched once, converted once) the real weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coatkit.assets import fetch
from coatkit_backbone_mini import ASSETS, NAME
from coatkit_backbone_mini.convert import prepare_weights
from coatkit_backbone_mini.options import Options
from coatkit_backbone_mini.tiny import tiny_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty coatkit cache of this test's own."""
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "tiny")


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The converted default backbone, in the user's own cache."""
    torch.set_num_threads(1)
    options = Options.model_validate({})
    for name in options.assets():
        fetch(NAME, ASSETS[name])
    return prepare_weights(options)
