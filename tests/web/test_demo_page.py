"""The page of `coatkit demo` as people meet it: the command in a process of its own, and a real browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytestmark = pytest.mark.web

QUESTION = '<img src=x onerror="window.broken = 1"><script>window.broken = 2</script> **What** is `heard`?'
# Whatever the process connects to or looks up is written down; it is the command itself that runs afterwards.
WATCHED = """
import sys
log = open(sys.argv.pop(1), "a", buffering=1)
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        log.write(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}\\n")
sys.addaudithook(watch)
from coatkit.cli import main
main()
"""


class Demo:
    """The running command.

    Attributes:
        url: Of the page.
        log: What it connected to, or looked up.
        folder: For its temporary files.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.folder, self.log, self.errors = folder / "tmp", folder / "connections", folder / "errors"
        self.folder.mkdir()
        with self.errors.open("w") as errors:
            options = ["--port=0", "--device=cpu", "--max-seconds=4", "--max-megabytes=0.5", "--max-new-tokens=8"]
            self.process = subprocess.Popen(
                [sys.executable, "-c", WATCHED, self.log, "demo", run, *options],
                env={**os.environ, "TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " is at http://127.0.0.1:" in line, self.errors.read_text()
        self.url = line.split(" is at ")[1].split()[0]
        for _ in range(300):
            try:
                self.fetch("config")
                break
            except urllib.error.URLError:
                time.sleep(0.1)

    def fetch(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body, as a program would ask."""
        request = urllib.request.Request(self.url + path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    @property
    def uploads(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".png")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def demo(thinking_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    pytest.importorskip("gradio", reason="gradio is not installed: make test-web")
    started = Demo(thinking_run.run.folder, tmp_path_factory.mktemp("demo"))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "a tone.wav"
    time = np.arange(32_000) / 16_000
    soundfile.write(path, (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), 16_000)
    return path


class Page:
    """The page in the browser, with whatever it asked for and complained about."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 1000}, **options})
        self.page = self.context.new_page()
        self.url, self.asked, self.said, self.refused = url, [], [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("response", lambda got: self.refused.append((got.status, got.url)) if got.status > 399 else None)
        self.page.goto(url)
        self.page.wait_for_selector("#ask", timeout=30_000)

    def upload(self, path: Path) -> None:
        self.page.locator("#sound input[type=file]").set_input_files(path)
        self.page.wait_for_selector("#sound audio, #sound #waveform, #sound .waveform-container", state="attached")

    def ask(self, question: str = QUESTION) -> None:
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#ask").click()

    def value(self, name: str) -> str:
        box = self.page.locator(f"#{name} textarea")
        return str(box.input_value()) if box.count() and box.is_visible() else ""

    def until(self, true: Callable[[], Any], what: str) -> Any:
        for _ in range(600):
            if found := true():
                return found
            self.page.wait_for_timeout(50)
        pytest.fail(f"after 30 s there is still no {what}; {self.said} {self.refused}")

    def width(self) -> int:
        """Pixels of the picture; 0 where there is none."""
        return int(self.page.evaluate("(document.querySelector('#picture img') || {}).naturalWidth || 0"))

    def elsewhere(self) -> list[str]:
        return [url for url in self.asked if not url.startswith((self.url, "data:", "blob:"))]


@pytest.fixture
def page(browser: Any, demo: Demo) -> Iterator[Page]:
    opened = Page(browser, demo.url)
    yield opened
    opened.context.close()


def test_a_sound_is_uploaded_asked_about_and_shown(page: Page, clip: Path) -> None:
    page.upload(clip)
    page.ask()
    page.until(page.width, "picture")
    assert page.width() > 1000
    assert page.value("answer")
    assert page.value("message") == ""
    assert page.value("words").startswith("level, level: strongest ")
    assert "up <b>" in page.value("words")
    assert page.page.locator("#picture img").get_attribute("alt").startswith("The waveform of 2.0 s of sound above")
    label = page.page.locator("#answer label span, #answer [data-testid=block-info]").first.inner_text()
    assert label.startswith("Trained, with its thinking block (")
    # Nothing that was typed or named became a part of the page, nothing was asked of the network, nothing was amiss.
    assert page.page.evaluate("window.broken") is None
    assert page.value("question") == QUESTION
    assert page.page.locator("img[src=x], b, h1 script").count() == 0
    assert page.elsewhere() == []
    assert page.refused == []
    assert page.said == []


def test_two_people_ask_at_once_and_each_gets_an_answer(browser: Any, demo: Demo, tmp_path: Path) -> None:
    pages = []
    for seconds in (1, 3):
        soundfile.write(tmp_path / f"{seconds}.wav", np.full(seconds * 16_000, 0.1, np.float32), 16_000)
        pages.append(Page(browser, demo.url))
        pages[-1].upload(tmp_path / f"{seconds}.wav")
    for page in pages:
        page.ask("What is heard?")
    for seconds, page in zip((1, 3), pages, strict=True):
        page.until(page.width, "picture")
        alternative = page.page.locator("#picture img").get_attribute("alt")
        assert alternative.startswith(f"The waveform of {seconds}.0 s of sound")
        page.context.close()


@pytest.mark.parametrize(
    ("choice", "label"),
    [
        ("The same model without its block", "Trained, but asked without its thinking block"),
        ("The model before training, without the block", "Before training, without the block"),
    ],
)
def test_another_answer_stands_beside_it(page: Page, clip: Path, choice: str, label: str) -> None:
    page.upload(clip)
    page.page.get_by_label(choice).check()
    page.ask("What is heard?")
    page.until(page.width, "picture")
    page.until(lambda: page.value("other"), "second answer")
    shown = page.page.locator("#other label span, #other [data-testid=block-info]").first.inner_text()
    assert shown.startswith(f"{label} (")
    assert page.value("answer")


def test_what_is_no_sound_is_told_kindly_and_an_old_answer_goes(page: Page, clip: Path, tmp_path: Path) -> None:
    page.upload(clip)
    page.ask("What is heard?")
    page.until(page.width, "picture")
    page.page.get_by_label("Clear").first.click()
    bad = tmp_path / "notes.wav"
    bad.write_text("This is no sound.\n" * 20)
    page.upload(bad)
    page.ask("What is heard?")
    told = page.until(lambda: page.value("message"), "message")
    assert told.startswith("notes.wav: cannot be ")
    assert "/" not in told
    assert page.value("answer") == ""
    assert page.width() == 0
    assert page.value("words") == ""
    assert "Traceback" not in page.page.content()


@pytest.mark.parametrize(
    ("sound", "question", "told"),
    [
        (False, "What is heard?", "There is no sound yet"),
        (True, "  ", "There is no question yet"),
        (True, "<audio><audio>?", "holds <audio> more than once"),
    ],
)
def test_what_is_missing_is_told(page: Page, clip: Path, sound: bool, question: str, told: str) -> None:
    if sound:
        page.upload(clip)
    page.ask(question)
    assert told in page.until(lambda: page.value("message"), "message")


def test_a_long_sound_is_told_with_the_limit(page: Page, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(5 * 16_000, np.float32), 16_000)
    page.upload(tmp_path / "long.flac")
    page.ask("What is heard?")
    told = page.until(lambda: page.value("message"), "message")
    assert told.startswith("long.flac is 5.0 s long; 4 s are taken (--max-seconds)")


def test_a_large_file_is_told_with_the_limit(page: Page, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "large.wav", np.zeros(300_000, np.float32), 48_000)
    page.page.locator("#sound input[type=file]").set_input_files(tmp_path / "large.wav")
    page.page.wait_for_selector("#sound .error")
    said = page.page.eval_on_selector("#sound .error", "chip => getComputedStyle(chip, '::after').content")
    assert said == '": not uploaded; files of up to 0.5 MB are taken"'
    assert page.page.locator("#ask").is_enabled()


def test_a_name_with_markup_is_only_a_name(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=window.broken=1>.wav"
    path.write_text("This is no sound.\n" * 20)
    page.upload(path)
    page.ask("What is heard?")
    page.until(lambda: page.value("message"), "message")
    assert page.page.evaluate("window.broken") is None
    assert page.page.locator("img[src=x]").count() == 0


def test_a_sound_is_recorded(browser: Any, demo: Demo) -> None:
    """Chromium's own stand-in for a microphone beeps once a second."""
    page = Page(browser, demo.url, permissions=["microphone"])
    page.page.get_by_label("Record audio").click()
    page.page.get_by_role("button", name="Record", exact=True).click()
    page.page.wait_for_timeout(1500)
    page.page.get_by_role("button", name="Stop", exact=True).first.click()
    page.page.wait_for_timeout(1000)
    page.ask("What is heard?")
    page.until(page.width, "picture")
    assert page.value("answer")
    assert page.refused == []
    page.context.close()


@pytest.mark.parametrize(("width", "dark"), [(1100, True), (380, False)])
def test_it_fits_phones_and_has_dark_colours(browser: Any, demo: Demo, clip: Path, width: int, dark: bool) -> None:
    scheme = "dark" if dark else "light"
    page = Page(browser, demo.url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.upload(clip)
    page.ask("What is heard?")
    page.until(page.width, "picture")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    box, image = (page.page.locator(one).bounding_box() for one in ("#picture", "#picture img"))
    assert image["x"] >= box["x"]  # what is left of its box could not be scrolled to
    assert image["width"] >= 600
    back = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(one) for one in back.removeprefix("rgb(").rstrip(")").split(",")) > 3 * 128
    assert light != dark
    page.context.close()


def test_a_run_without_a_block_has_a_page_too(new_project: Callable[[], Any], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: make test-web")
    from coatkit.demo import asking
    from coatkit.demo.page import build

    project = new_project()
    del project.spec["experts"], project.spec["head"], project.spec["stages"][1]
    project.spec["stages"][0].pop("weights")
    asker = asking.Asker.of_run(project.train("thinking=off").folder, device="cpu")
    parts = [part["props"] for part in build(asker, tmp_path).get_config_file()["components"]]
    (choices,) = (part["choices"] for part in parts if "choices" in part)
    assert [value for _, value in choices] == ["nothing", "before"]
    assert asking.BLOCKLESS in [part.get("label") for part in parts]
    assert not [part for part in parts if "heads read from the model's own" in str(part.get("value"))]


# Not from the page


def asked(path: str, **more: Any) -> bytes:
    given = {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
    body = {"data": [given, "What is heard?", "nothing"], "fn_index": 0, "session_hash": "abc", "event_data": None}
    return json.dumps(body).encode()


def upload(demo: Demo, name: str, content: bytes) -> tuple[int, bytes]:
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--b--\r\n"
    return demo.fetch("gradio_api/upload", body, content_type="multipart/form-data; boundary=b")


def test_no_path_reaches_a_file_that_was_not_uploaded(demo: Demo, clip: Path) -> None:
    for path in (str(clip), "http://127.0.0.1:1/a.wav", f"{demo.folder}/../connections"):
        assert demo.fetch("gradio_api/queue/join", asked(path), content_type="application/json")[0] == 403
        assert demo.fetch(f"gradio_api/file={urllib.request.quote(path)}")[0] == 404
    status, told = upload(demo, "../../../evil.wav", b"x" * 100)
    assert status == 200
    (path,) = json.loads(told)
    assert Path(path).resolve().is_relative_to(demo.folder.resolve())
    assert not list(demo.folder.parent.glob("evil*"))
    assert demo.fetch(f"gradio_api/file={path}") == (200, b"x" * 100)
    assert demo.fetch("gradio_api/queue/join", asked(path), content_type="application/json")[0] == 200


def test_uploads_have_a_limit(demo: Demo) -> None:
    before = demo.uploads
    try:
        status = upload(demo, "large.wav", b"x" * 600_000)[0]
    except (urllib.error.URLError, ConnectionError):  # it may be told before all of it is sent
        status = 413
    assert status == 413
    assert demo.uploads == before


def test_it_answers_to_its_own_name_and_page_alone(demo: Demo) -> None:
    assert demo.fetch("config", host="example.org")[0] == 403
    answer = demo.fetch("gradio_api/queue/join", b"{}", content_type="application/json", origin="http://example.org")
    assert answer[0] == 403
    with urllib.request.urlopen(demo.url) as found:
        assert "default-src 'self'" in found.headers["content-security-policy"]


def test_it_ends_cleanly_and_asked_nothing_of_the_network(demo: Demo, browser: Any, clip: Path) -> None:
    """The last test: it looks at all that went before."""
    page = Page(browser, demo.url)
    page.upload(clip)
    assert demo.uploads
    assert demo.end() == 0
    assert list(demo.folder.rglob("*.wav")) == []
    assert not list(demo.folder.glob("coatkit-demo-*"))
    far = [line for line in demo.log.read_text().splitlines() if "127.0.0.1" not in line and "localhost" not in line]
    assert far == []
    assert "Traceback" not in demo.errors.read_text()
    page.context.close()
