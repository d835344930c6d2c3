"""Licences of everything that coatkit and its plugins install, as a table in docs/dependencies.md; `make audit`.

    python docs/tools/licences.py            # print it
    python docs/tools/licences.py --write    # put it into docs/dependencies.md

Follows the requirements of the installed packages, without extras. Exits with 1 where a licence is not known, or is one
that forbids commercial use (CC-BY-NC and the like), which this project neither copies nor depends on.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).parents[1] / "dependencies.md"
BEGIN, END = "<!-- licences: begin -->", "<!-- licences: end -->"
REFUSED = re.compile(r"\bNC\b|non-?commercial|CC-BY-NC", re.IGNORECASE)
KNOWN = re.compile(
    r"\b(MIT|0?BSD|Apache|PSF|MPL|Mozilla|ISC|Unlicense|LGPL|HPND|CNRI|Zlib|NVIDIA)\b|Python Software|Lesser General",
    re.IGNORECASE,
)
READ: dict[str, str] = {"cuda-toolkit": "names NVIDIA's packages and holds no files of its own"}
"""Read by a person in the package's own files, where its metadata says nothing."""


def closure(roots: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions that `roots` need, and they themselves, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(name, "") for name in roots]
    while todo:
        name, extra = todo.pop()
        if (name := canonicalize_name(name), extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # `coatkit doctor` names what is missing
        for line in found[name].requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed.name, wanted) for wanted in ("", *needed.extras)]
    return dict(sorted(found.items()))


def licence(package: importlib.metadata.Distribution) -> str:
    """What a package's metadata says: the expression, else the classifiers, else the first line of the text."""
    said = package.metadata
    if expression := said.get("License-Expression"):
        return expression
    classes = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [c for c in classes if c not in ("OSI Approved", "Other/Proprietary License")]
    first = (said.get("License") or "").strip().partition("\n")[0]
    return " / ".join(named) or first or READ.get(canonicalize_name(said["Name"]), "")


def problems(table: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Packages whose licence is refused or not known."""
    for name, (_, said) in table.items():
        if REFUSED.search(said):
            yield f"{name}: {said}: forbids commercial use"
        elif not KNOWN.search(said):
            yield f"{name}: {said or 'no licence in its metadata'}: not known; read it, and note it in READ"


def main() -> int:
    roots = ["coatkit", *{d.name for d in importlib.metadata.distributions() if d.name.startswith("coatkit")}]
    table = {name: (p.version, licence(p).replace("|", "/")[:80]) for name, p in closure(roots).items()}
    lines = ["| package | version | licence |", "|---|---|---|"]
    lines += [f"| {name} | {version} | {said} |" for name, (version, said) in table.items()]
    text = f"{BEGIN}\n" + "\n".join(lines) + f"\n{END}"
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        if not rest:
            sys.exit(f"{PAGE}: has no {BEGIN}")
        PAGE.write_text(before + text + after, encoding="utf-8")
    else:
        print(text)
    wrong = list(problems(table))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
