"""Watching foreign code: it is kept off the network, and what it writes at home is noted.

Python's audit events see what a patch of `socket` would miss: `os.system("wget ...")`, a name bound long ago, and every
file opened. An audit hook cannot be taken away again, so there is one, and it sleeps outside `guarded`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coatkit.assets import cache_dir

_NETWORK = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}
_PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
_DOWNLOAD = re.compile(
    r"(^|[\s/'\"])(wget|curl|aria2c|gdown|hf|huggingface-cli|git clone|pip3? (install|download))(\s|$)"
)
_WRITTEN = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "os.remove": 0, "sqlite3.connect": 0}
"""Audit events to the argument that is changed; `open` is looked at apart."""


@dataclass
class Watch:
    """What guarded code reached for.

    Attributes:
        kind: What is watched, for messages.
        network: Hosts it asked for and programs that download.
        home: Paths it wrote at home; `~` stands for the empty home it was given.
    """

    kind: str = "expert"
    network: list[str] = field(default_factory=list)
    home: list[str] = field(default_factory=list)


@dataclass
class _Active:
    watch: Watch
    folders: tuple[str, ...]
    apart: str | None
    """A temporary folder that happens to lie at home; what goes there is no trace."""


_active: _Active | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    active = _active
    if active is None:
        return
    if event in _NETWORK:
        _refuse(active.watch, _host(event, arguments))
    elif event in _PROGRAMS:
        command = _command(event, arguments)
        if _DOWNLOAD.search(command):
            _refuse(active.watch, f"run {command!r}")
    elif event == "open":
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
        if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            _note(active, path)
    elif event in _WRITTEN:
        _note(active, arguments[_WRITTEN[event]])


def _refuse(watch: Watch, what: str) -> None:
    if not what:
        return
    if what not in watch.network:
        watch.network.append(what)
    # What a machine without a network raises: code that copes with that goes on, and is still noted.
    raise OSError(f"coatkit.testing lets no {watch.kind} reach the network: {what}")


def _host(event: str, arguments: tuple[Any, ...]) -> str:
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        return f"look up {arguments[0]!r}"
    address = arguments[1]
    local = not isinstance(address, tuple)  # a Unix socket has a path for its address
    return "" if local else f"connect to {address[0]}:{address[1]}"


def _command(event: str, arguments: tuple[Any, ...]) -> str:
    words = arguments[0] if event == "os.system" else arguments[1]
    if isinstance(words, list | tuple):
        return " ".join(os.fsdecode(word) for word in words)
    return os.fsdecode(words)


def _note(active: _Active, path: Any) -> None:
    if not isinstance(path, str | bytes | os.PathLike):  # a file descriptor
        return
    full = os.path.abspath(os.fsdecode(path))
    compiled = f"{os.sep}__pycache__" in full  # Python's own, made by whoever imports first
    if compiled or not any(_below(full, folder) for folder in active.folders):
        return
    if active.apart and _below(full, active.apart) and not _below(full, active.folders[0]):
        return
    shown = full.replace(active.folders[0], "~", 1)
    if shown not in active.watch.home:
        active.watch.home.append(shown)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def environment(home: Path) -> dict[str, str]:
    """What changes in the environment of guarded code: an empty home, and the cache where it was."""
    return {"HOME": str(home), "USERPROFILE": str(home), "COATKIT_CACHE": str(cache_dir())}


@contextmanager
def guarded(watch: Watch, home: Path) -> Iterator[None]:
    """Run foreign code with the network refused and an empty home; what it tries is added to `watch`.

    Args:
        watch: Where findings go.
        home: An empty folder; files that native code leaves there are found afterwards. The real home is watched too,
            for paths that were worked out before.
    """
    global _active, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    real = os.path.abspath(os.path.expanduser("~"))
    scratch = os.path.abspath(tempfile.gettempdir())
    changed = environment(home)
    before = {name: os.environ.get(name) for name in (*changed, "XDG_CACHE_HOME")}
    os.environ.update(changed)
    os.environ.pop("XDG_CACHE_HOME", None)  # else a cache outside of home would go unseen
    # A home that holds everything (`/`, or the temporary folder's own parent in a container) would make noise.
    folders = (str(home),) if real == os.sep else (str(home), real)
    outer, _active = _active, _Active(watch, folders, scratch)
    try:
        yield
    finally:
        _active = outer
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for path in sorted(home.rglob("*")):
            if path.is_file() and (shown := f"~{str(path).removeprefix(str(home))}") not in watch.home:
                watch.home.append(shown)
