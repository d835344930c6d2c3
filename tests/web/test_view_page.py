"""The page of `coatkit view` in a real browser: playheads move, clicks seek, and only the page's own script runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coatkit.analysis import hear, view
from coatkit.readout import Readout
from coatkit.thought import Heard

pytestmark = pytest.mark.web

SECONDS = 2.0
EVIL = '<img src=x onerror="window.broken = 1"></script><script>window.broken = 2</script>'


def made(**changes: Any) -> view.View:
    random = torch.Generator().manual_seed(0)

    def some(columns: int) -> torch.Tensor:
        return torch.randn(50, columns, generator=random)

    def read(values: torch.Tensor) -> Readout:
        return Readout("sound events", values.sigmoid(), tuple(f"class {i} {EVIL}" for i in range(20)))

    target, predicted = some(20), some(20)
    heard = Heard(25.0, some(8), {"tower": some(30), "events": predicted}, {"tower": some(30), "events": target})
    heard.readout["events"], heard.target_readout["events"] = read(predicted), read(target)
    samples = (0.1 * np.sin(np.arange(int(SECONDS * 16_000)) * 0.2)).astype(np.float32)
    mel = hear.log_mel(samples)
    sounds = {"target": samples, "prediction": samples / 2}
    hearing = view.Hearing("tower", ["Decoded."], mel, {"target": mel, "prediction": mel}, sounds, {"target": 1.0})
    found = view.View(
        "a run", 3, "a.wav", samples, 16_000, "What?", "a dog", heard, {"tower": {"cosine": 0.5}}, hearing
    )
    return replace(found, **changes)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    evil = {"title": EVIL, "answer": EVIL, "question": EVIL, "run": EVIL, "random": (EVIL,)}
    return view.write(made(**evil), tmp_path_factory.mktemp("page"))


def until(page: Any, true: str) -> None:
    """Wait; not by playwright's own way, which evaluates text inside the page and so meets its policy."""
    for _ in range(300):
        if page.evaluate(true):
            return
        page.wait_for_timeout(33)
    pytest.fail(f"after 10 s it is still not so: {true}")


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    found = browser.new_page(viewport={"width": 1100, "height": 900})
    found.asked, found.said = [], []
    found.on("request", lambda request: found.asked.append(request.url[:60]))
    found.on("console", lambda message: found.said.append(message.text))
    found.on("pageerror", lambda error: found.said.append(str(error)))
    found.goto(file.as_uri())
    until(found, "[...document.querySelectorAll('audio')].every(a => a.readyState > 0)")
    yield found
    found.close()


def places(page: Any) -> list[float]:
    """Where each playhead is, as a share of its time axis."""
    found: list[float] = page.eval_on_selector_all(
        ".timeline",
        """lines => lines.map(line => {
            const box = line.getBoundingClientRect(), head = line.querySelector(".playhead").getBoundingClientRect();
            const share = (head.left + head.width / 2 - box.left) / box.width;
            return (share - line.dataset.left) / (line.dataset.right - line.dataset.left);
        })""",
    )
    return found


def seek(page: Any, player: int, seconds: float) -> None:
    page.evaluate("([i, s]) => { document.querySelectorAll('audio')[i].currentTime = s; }", [player, seconds])
    until(page, f"!document.querySelectorAll('audio')[{player}].seeking")


def test_the_players_hold_the_sounds(page: Any) -> None:
    lengths = page.eval_on_selector_all("audio", "players => players.map(player => player.duration)")
    assert lengths == pytest.approx([SECONDS] * 3, abs=0.01)


def test_the_playheads_are_where_the_player_is(page: Any) -> None:
    assert places(page) == pytest.approx([0.0] * 3, abs=0.005)
    for player, seconds in ((0, 0.5), (2, 1.5), (1, 1.0)):
        seek(page, player, seconds)
        page.wait_for_timeout(50)
        assert places(page) == pytest.approx([seconds / SECONDS] * 3, abs=0.005)
    assert page.eval_on_selector(".playhead", "head => getComputedStyle(head).display") == "block"


def test_the_playheads_move_while_it_plays_and_one_sound_plays_at_a_time(page: Any) -> None:
    page.evaluate("document.querySelectorAll('audio')[0].play()")
    until(page, "document.querySelectorAll('audio')[0].currentTime > 0.3")
    before = places(page)
    assert before[0] > 0.1
    page.evaluate("document.querySelectorAll('audio')[1].play()")
    until(page, "document.querySelectorAll('audio')[0].paused")
    until(page, "document.querySelectorAll('audio')[1].ended")
    page.wait_for_timeout(50)
    assert places(page) == pytest.approx([1.0] * 3, abs=0.02)


def test_a_click_on_a_plot_moves_the_sound_there(page: Any) -> None:
    box = page.locator(".timeline").nth(1).bounding_box()
    left, right = (float(page.locator(".timeline").nth(1).get_attribute(f"data-{side}")) for side in ("left", "right"))
    for share in (0.25, 0.75):
        x = box["width"] * (left + (right - left) * share)
        page.locator(".timeline").nth(1).click(position={"x": x, "y": 40})
        now = page.evaluate("document.querySelector('audio').currentTime")
        assert now == pytest.approx(share * SECONDS, abs=0.02)
        assert places(page) == pytest.approx([share] * 3, abs=0.01)
    page.locator(".timeline").nth(1).click(position={"x": 3, "y": 40})  # left of the axis is its beginning
    assert page.evaluate("document.querySelector('audio').currentTime") == 0


def test_nothing_from_the_data_runs_and_nothing_is_asked_of_the_network(page: Any, file: Path) -> None:
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 3
    assert page.locator("h1").inner_text().endswith(EVIL)
    assert [url for url in page.asked if not url.startswith(("data:", file.as_uri()[:60]))] == []
    assert page.said == []


def test_what_escapes_the_escaping_is_still_not_run(browser: Any, file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(file.read_text().replace("</h1>", f"</h1>{EVIL}<script>window.broken = 3</script>", 1))
    page = browser.new_page()
    page.goto(broken.as_uri())
    page.wait_for_timeout(200)
    assert page.evaluate("window.broken") is None
    page.close()


def test_the_axes_begin_where_the_page_says(page: Any) -> None:
    """The playhead at 0 stands on the plots' left spine: dark pixels from top to bottom in the first panel."""
    for shares in page.eval_on_selector_all(
        ".timeline",
        """lines => lines.map(line => {
            const img = line.querySelector("img"), canvas = document.createElement("canvas");
            canvas.width = img.naturalWidth; canvas.height = img.naturalHeight;
            const pen = canvas.getContext("2d");
            pen.drawImage(img, 0, 0);
            const rows = Math.floor(canvas.height * 0.5);
            const data = pen.getImageData(0, 0, canvas.width, rows).data;
            let best = 0, most = -1;
            for (let x = 0; x < canvas.width / 2; x++) {
                let dark = 0;
                for (let y = 0; y < rows; y++) {
                    const at = 4 * (y * canvas.width + x);
                    if (data[at] + data[at + 1] + data[at + 2] < 60) dark++;
                }
                if (dark > most) { most = dark; best = x; }
            }
            return [best / canvas.width, Number(line.dataset.left)];
        })""",
    )[1:]:  # spectrograms may be black themselves
        assert shares[0] == pytest.approx(shares[1], abs=0.003)


def test_a_phone_scrolls_plots_and_not_the_page(browser: Any, file: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".plot").first.bounding_box()["width"] > 600
    page.close()


def test_the_dark_has_its_own_colours(browser: Any, file: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(file.as_uri())
        found[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    assert found == {"light": "rgb(246, 247, 249)", "dark": "rgb(20, 23, 29)"}


def test_without_scripts_all_but_the_playhead_is_there(browser: Any, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("audio").count() == 3
    assert not page.locator(".playhead").first.is_visible()
    assert page.locator("img").first.is_visible()
    context.close()
