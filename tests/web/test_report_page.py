"""The page of `coatkit report` in a real browser: pictures are there, nothing overflows, no data runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from coatkit.analysis.report import report

pytestmark = pytest.mark.web

EVIL = '<img src=x onerror="window.broken = 1"></script><script>window.broken = 2</script>'


@pytest.fixture(scope="module")
def file(new_project: Callable[[], Any]) -> Path:
    run = new_project().train("gradients_every=2")
    task = {"metric": EVIL, "score": 62.5, "low": 50.0, "high": 75.0, "rows": 8, "details": {}}
    (run.folder / "eval/heldout").mkdir(parents=True)
    (run.folder / "eval/heldout/results.json").write_text(json.dumps({"tasks": {EVIL: task}}))
    return report([run.folder], run.folder / "report.html")


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (380, False)])
def test_the_page_in_a_browser(browser: Any, file: Path, width: int, dark: bool) -> None:
    asked: list[str] = []
    problems: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    assert problems == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert page.evaluate("window.broken") is None
    sizes = page.evaluate("[...document.images].map((i) => i.naturalWidth)")
    assert len(sizes) == 2
    assert min(sizes) > 500
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    headings = page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)")
    assert headings == ["Runs", "Spec", "Losses", "Which teachers pull apart", "Evaluations", "Made with"]
    picture = imread(io.BytesIO(page.screenshot(full_page=True)), format="png")[..., :3]
    dull = picture.mean() < 0.5
    assert dull == dark
    # Curves are drawn in the palette's first colour.
    blue = np.abs(picture - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.05
    assert blue.sum() > 40
    page.close()
