"""What of the tree has a page on the site, and where a link leads there.

Documents are written for a reader of the repository: their links are relative, also to files outside of docs/. On the
site docs/ is the root, documents outside of it keep their path, README.md is the index, and every other file or folder
a document links to gets a page under files/ that shows it.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "plugins/*/README.md", "examples/*/*.md")

_FENCE = re.compile(r"^( *)(```+)[^\n]*\n.*?^\1\2 *$", re.M | re.S)
_LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*\]\()([^)\s]+)(\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".sbatch": "sh", ".json": "json"}
_MOST = 200_000  # characters of a file that is shown


def documents() -> list[str]:
    """Paths of all documents, from the root of the repository."""
    found = [*(ROOT / "docs").rglob("*.md"), *(path for pattern in OUTSIDE for path in ROOT.glob(pattern))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def page_of(path: str) -> str:
    """The site's page of a document, or the site's file of a picture in docs/; `path` is from the root."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in documents():
        return path
    if (ROOT / path).is_dir():
        # A folder with a document of its own is shown by that.
        return f"{path}/README.md" if f"{path}/README.md" in documents() else f"files/{path}/index.md"
    return f"files/{path}.md"


def parts(text: str) -> Iterator[tuple[bool, str]]:
    """The text in turns: (is a fenced block, text)."""
    place = 0
    for block in _FENCE.finditer(text):
        yield False, text[place : block.start()]
        yield True, block.group()
        place = block.end()
    yield False, text[place:]


def relinked(text: str, path: str) -> tuple[str, set[str]]:
    """A document with its links as the site needs them.

    Args:
        text: What is written.
        path: Where, from the root of the repository.

    Returns:
        The text, and the paths outside of docs/ that it links to.

    Raises:
        ValueError: If a link leads to nothing, or out of the repository.
    """
    here, home = posixpath.dirname(path), posixpath.dirname(page_of(path))
    found: set[str] = set()

    def moved(match: re.Match[str]) -> str:
        opening, link, closing = match.groups()
        name, hash_, anchor = link.partition("#")
        # The text of a link may itself be a picture.
        opening = _LINK.sub(moved, opening[:-2]) + opening[-2:]
        if not name or re.match(r"\w+:", name):
            return f"{opening}{link}{closing}"
        target = posixpath.normpath(posixpath.join(here, name))
        if target.startswith("..") or not (ROOT / target).exists():
            raise ValueError(f"{path}: links to {link}, which is not there")
        if not target.startswith("docs/"):
            found.add(target)
        return f"{opening}{posixpath.relpath(page_of(target), home or '.')}{hash_}{anchor}{closing}"

    said = "".join(part if fenced else _LINK.sub(moved, part) for fenced, part in parts(text))
    return said, found


def shown(path: str) -> str:
    """The page of a file or folder that is no document: what it holds."""
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {posixpath.basename(path)}\n\n`{path}`, in the repository.\n\n"
    place = ROOT / path
    if place.is_dir():
        rows = "".join(f"| `{entry.name}{'/' * entry.is_dir()}` | {_summary(entry)} |\n" for entry in _entries(place))
        return f"{head}| | |\n|---|---|\n{rows}"
    text = place.read_text(encoding="utf-8")
    if len(text) > _MOST:
        raise ValueError(f"{path}: is too long to be shown")
    fence = "`" * (3 + max((len(run) for run in re.findall(r"`{3,}", text)), default=0))
    return f"{head}{fence}{_LANGUAGES.get(place.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _entries(folder: Path) -> list[Path]:
    made = ("__pycache__", "runs", "build", "dist")
    return [
        entry
        for entry in sorted(folder.iterdir(), key=lambda entry: (entry.is_file(), entry.name))
        if not entry.name.startswith(".") and entry.name not in made and not entry.name.endswith(".egg-info")
    ]


def _summary(entry: Path) -> str:
    """The first line of what a file says of itself."""
    if entry.is_dir() and (entry / "__init__.py").is_file():
        entry /= "__init__.py"
    said = ""
    if entry.suffix == ".py":
        said = ast.get_docstring(ast.parse(entry.read_text(encoding="utf-8"))) or ""
    elif entry.suffix in (".yaml", ".yml", ".sh", ".sbatch"):
        comments = (line for line in entry.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
        said = next(comments, "").removeprefix("# ")
    return said.partition("\n")[0].replace("|", "\\|")
