"""The site that `make docs` built, opened from its folder: every page on a desk and on a phone, and the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.web

SITE = Path(__file__).parents[2] / "site"
PAGES = sorted(SITE.rglob("*.html"))
LINKS = "[...document.querySelectorAll('a[href]')].map((a) => a.href)"
ANCHORS = "[...document.querySelectorAll('[id], a[name]')].map((e) => e.id || e.name)"
BROKEN = "[...document.images].filter((i) => !i.complete || i.naturalWidth === 0).map((i) => i.src)"
# What is wider than the screen and stands in no box that scrolls by itself.
WIDE = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (e) => e && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('.md-content *')]
    .filter((e) => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
    .map((e) => e.tagName + ' ' + e.textContent.slice(0, 60));
}"""


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    if not PAGES:
        pytest.skip("the site is not built: make docs")


def opened(browser: Any, width: int, dark: bool = False) -> Any:
    """A page that remembers what it asked for and what it complained about."""
    size = {"width": width, "height": 900}
    page = browser.new_page(viewport=size, color_scheme="dark" if dark else "light")
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
    return page


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desk", "phone"])
def test_every_page(browser: Any, width: int, dark: bool) -> None:
    page = opened(browser, width, dark)
    for path in PAGES:
        if path.name == "404.html":  # its links are from the root of a server
            continue
        page.goto(path.as_uri())
        where = path.relative_to(SITE)
        assert page.said == [], where
        assert page.evaluate(BROKEN) == [], where
        assert page.evaluate(WIDE) == [], where
        assert page.evaluate("document.documentElement.scrollWidth") <= width, where
        assert page.evaluate("document.querySelectorAll('h1').length") > 0, where
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()


def test_every_link_leads_somewhere(browser: Any) -> None:
    page = opened(browser, 1280)
    links: dict[str, set[str]] = {}
    anchors: dict[str, set[str]] = {}
    for path in PAGES:
        if path.name == "404.html":
            continue
        page.goto(path.as_uri())
        links[path.as_uri()] = set(page.evaluate(LINKS))
        anchors[path.as_uri()] = set(page.evaluate(ANCHORS))
    wrong = set()
    for here, there in links.items():
        for link in there:
            target, _, anchor = link.partition("#")
            if not target.startswith("file:"):
                continue
            if target not in anchors and not Path(target.removeprefix("file://")).is_file():
                wrong.add((here, link))
            if anchor and anchor not in anchors.get(target, {anchor}):
                wrong.add((here, link))
    assert wrong == set()
    # No page is an island but those that show a file.
    reached = {link.partition("#")[0] for there in links.values() for link in there}
    assert [page for page in links if page not in reached and "/files/" not in page] == []
    page.close()


def test_searching_works_from_the_folder(browser: Any) -> None:
    page = opened(browser, 1280)
    page.goto((SITE / "index.html").as_uri())
    page.click("input.md-search__input")
    page.keyboard.type("masked_focal_bce")
    page.wait_for_selector(".md-search-result__item", timeout=60_000, state="attached")
    found = page.eval_on_selector_all(".md-search-result__link", "links => links.map((a) => a.href)")
    assert any("reference/api.html" in link for link in found)
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
    page.close()
