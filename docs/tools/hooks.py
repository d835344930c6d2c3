"""What mkdocs is told: pages from outside of docs/, pages made from the code, and links that lead to both."""

from __future__ import annotations

from typing import Any

import reference
import tree
from mkdocs.structure.files import File, Files

_PLACES: dict[str, str] = {}
"""Pages to the documents they were made from, from the root of the repository."""


def on_files(files: Files, *, config: Any) -> Files:
    """Add the documents outside of docs/, what documents link to, and the references."""
    linked: set[str] = set()
    for path in tree.documents():
        text, found = tree.relinked((tree.ROOT / path).read_text(encoding="utf-8"), path)
        page = tree.page_of(path)
        _PLACES[page] = path
        if not path.startswith("docs/"):
            files.append(File.generated(config, page, content=text))
        linked |= found
    for path in sorted(linked):
        if tree.page_of(path).startswith("files/"):
            files.append(File.generated(config, tree.page_of(path), content=tree.shown(path)))
    for name, content in reference.pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links of the documents in docs/ to what is outside of it; those of the others are moved already."""
    path = _PLACES.get(page.file.src_uri, "")
    return tree.relinked(markdown, path)[0] if path.startswith("docs/") else markdown
