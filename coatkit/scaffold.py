"""A new plugin package: files from the templates, in one step or not at all. Imports no torch."""

from __future__ import annotations

import contextlib
import keyword
import re
import shutil
import tempfile
from datetime import date
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from importlib.resources import files
from pathlib import Path
from string import Template

from coatkit.errors import SpecError
from coatkit.manifest import Kind
from coatkit.plugins import registry

LICENCES = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "none": "LicenseRef-not-yet-said"}
"""What can be chosen, with the SPDX identifier that the manifest says."""
_EXAMPLE = {
    "expert": "experts:\n  {name}: {{bands: 64, head: {{use: linear}}}}",
    "head": "head: {{use: {name}, width: 2.0}}",
    "backbone": "backbone: {{use: {name}, weights: random}}",
}
_TODO = {
    "expert": "- Put your encoder into `src/{module}/expert.py`, its options into `options.py`.\n"
    "- Make the manifest in `src/{module}/__init__.py` true: rate, width, weights.",
    "head": "- Put your network into `src/{module}/head.py`, its options into `options.py`.",
    "backbone": "- Put your model into `src/{module}/backbone.py`; what is there is GLM-ASR.\n"
    "- Compare what the preparer gives with the stock processor's ids once, on real files.",
}
_NO_LICENCE = "\n- Choose a licence: a file `LICENSE`, `license` in `pyproject.toml`, `code_licence` in the manifest."


def write_package(kind: Kind, name: str, folder: Path, licence: str = "apache-2.0") -> Path:
    """Write the package `coatkit-KIND-NAME` below `folder`, and give its place.

    Raises:
        SpecError: If the name cannot be one, is taken, or the place is not free; nothing is then written.
    """
    check_name(kind, name)
    distribution = _distribution(kind, name)
    place = folder / distribution
    if place.exists() or place.is_symlink():
        raise SpecError([f"{place}: is there already; choose another name, or another folder with --to"])
    module = distribution.replace("-", "_")
    words = {
        "kind": kind,
        "name": name,
        "distribution": distribution,
        "module": module,
        "class_name": "".join(part[:1].upper() + part[1:] for part in re.split("[-.]", name)) + kind.title(),
        "spdx": LICENCES[licence],
        "licence_lines": "" if licence == "none" else f'license = "{LICENCES[licence]}"\nlicense-files = ["LICENSE"]\n',
        "dependencies": ", ".join(f'"{one}"' for one in _dependencies(kind)),
        "example": _EXAMPLE[kind].format(name=name),
        "todo": _TODO[kind].format(module=module) + (_NO_LICENCE if licence == "none" else ""),
        "year": str(date.today().year),
        "holder": f"the authors of {distribution}",
    }
    if words["class_name"][0].isdigit():
        words["class_name"] = f"A{words['class_name']}"
    inside = {"pyproject.toml": "pyproject.toml", "README.md": "README.md"}
    inside |= {f"src/{module}/__init__.py": f"{kind}/init.py", f"src/{module}/{kind}.py": f"{kind}/{kind}.py"}
    inside |= {f"tests/test_{module.removeprefix(f'coatkit_{kind}_')}.py": f"{kind}/test.py"}
    if kind != "backbone":
        inside[f"src/{module}/options.py"] = f"{kind}/options.py"
    if licence != "none":
        inside["LICENSE"] = f"licences/{licence}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SpecError([f"--to {folder}: a file stands in the way; name another folder"]) from None
    scratch = Path(tempfile.mkdtemp(prefix=f".{distribution}-", dir=folder))
    try:
        for path, template in inside.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_text(_render(template, words), encoding="utf-8")
        (scratch / f"src/{module}/py.typed").touch()
        scratch.chmod(0o755)
        scratch.rename(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return place


def check_name(kind: Kind, name: str) -> None:
    """Refuse what cannot be a plugin's name: it is a key of specs, a package's name on an index, and a module's.

    Raises:
        SpecError: Saying why, and what would do.
    """
    if not re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", name):
        like = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        raise SpecError(
            [
                f"{name!r}: a plugin's name is small letters and digits, with single - or . between"
                + (f"; {like!r} would do" if like and like != name else "")
            ]
        )
    if len(name) > 60:
        raise SpecError([f"{name[:20]!r}...: a name of over 60 characters; choose a shorter one"])
    if name.startswith("coatkit-"):
        raise SpecError([f"{name!r}: the package is called coatkit-{kind}-NAME by itself; give NAME alone"])
    if keyword.iskeyword(name) or name in ("off", "none", "null", "true", "false", "yes", "no", "on"):
        raise SpecError([f"{name!r}: is a word of Python or YAML; choose another name"])
    if offers := registry().installed.get((kind, name)):
        raise SpecError(
            [f"{name!r}: an installed {kind} has it ({offers[0].distribution}); choose another, or uninstall that"]
        )
    with contextlib.suppress(PackageNotFoundError):
        taken = metadata.distribution(_distribution(kind, name))
        raise SpecError([f"{name!r}: the package {taken.name} is installed already; choose another, or uninstall that"])


def _distribution(kind: Kind, name: str) -> str:
    """The package's name; an index takes `-` and `.` for the same (PEP 503)."""
    return f"coatkit-{kind}-{name.replace('.', '-')}"


def _dependencies(kind: Kind) -> tuple[str, ...]:
    return (
        "coatkit",
        "torch",
        *(("transformers",) if kind != "head" else ()),
        *(("pydantic>=2",) if kind != "backbone" else ()),
    )


def _render(template: str, words: dict[str, str]) -> str:
    text = files("coatkit").joinpath(f"templates/{template}.txt").read_text(encoding="utf-8")
    # The Apache licence is a text to be given as it is; nothing in it is filled in.
    return text if template == "licences/apache-2.0" else Template(text).substitute(words)
