"""A real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-web")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium here; install one, or name it in CHROMIUM")
    with api.sync_playwright() as playwright:
        # A machine for tests has no sound card and no one to press play; a container has no sandbox.
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
        # A microphone that beeps, and no one who has to allow it.
        flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        started = playwright.chromium.launch(executable_path=found, args=flags)
        yield started
        started.close()
