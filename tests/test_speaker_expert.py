"""The study's expert in one file, Resemblyzer's speaker embeddings, by the conformance suite; it needs their wheel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coatkit.testing import ExpertConformance

WHEEL = os.environ.get("COATKIT_RESEMBLYZER", "")
FILE = Path(__file__).parents[1] / "examples/mini-study/speaker.py"


@pytest.mark.skipif(not WHEEL, reason="COATKIT_RESEMBLYZER names no wheel of Resemblyzer 0.1.4")
class TestSpeaker(ExpertConformance):
    name = f"{FILE}:Speaker"
    options = {"weights": WHEEL}  # noqa: RUF012
