"""The page of `coatkit data` in a real browser: nothing of the rows runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from coatkit.cli.data import command

pytestmark = pytest.mark.web

EVIL = '"></p></style></script><script>window.broken = 1</script><img src=x onerror="window.broken = 2">'
EVIL += "<svg onload=alert(3)>"


@pytest.fixture(scope="module")
def file(new_project: Callable[[], Any]) -> Path:
    project, name = new_project(), f"{EVIL}.wav".replace("/", "_")
    soundfile.write(project.folder / "clips" / name, np.zeros(16_000, np.float32), 16_000)
    talk = [{"role": "user", "content": f"<audio>{EVIL}"}, {"role": "assistant", "content": EVIL}]
    project.rows = [
        {"id": EVIL, "audio": f"clips/{name}", "messages": talk, "category": EVIL, "language": EVIL},
        {"id": f"bad {EVIL}", "audio": f"gone {name}", "messages": talk},
        {"id": "role", "messages": [{"role": EVIL, "content": "x"}]},
    ]
    out = project.folder / "data.html"
    result = CliRunner().invoke(command, [str(project.write()), "--html", str(out)])
    assert result.exit_code == 0, result.output
    return out


def test_nothing_in_the_rows_runs(browser: Any, file: Path) -> None:
    asked: list[str] = []
    opened: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (opened.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    assert EVIL in page.inner_text("body")  # shown as it is, not lost
    assert page.evaluate("window.broken") is None
    assert opened == []
    assert page.evaluate("document.querySelectorAll('img[src=x], [onerror], svg[onload]').length") == 0
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    page.close()


def test_the_test_sees_what_runs(browser: Any, file: Path, tmp_path: Path) -> None:
    """The same page, unescaped and without its policy."""
    broken = tmp_path / "broken.html"
    text = file.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-none")
    broken.write_text(text.replace("<h1>", f"<h1>{EVIL}", 1), encoding="utf-8")
    page = browser.new_page()
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.goto(broken.as_uri())
    page.wait_for_function("window.broken !== undefined")
    page.close()
