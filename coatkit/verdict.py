"""A conformance suite run as an author would run it, by pytest in a process of its own, and what came out."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coatkit.assets import needed, present
from coatkit.errors import PluginError
from coatkit.manifest import KINDS, Kind
from coatkit.plugins import Component, all_manifests, registry
from coatkit.trust import guarded

Report = dict[str, dict[str, tuple[str, str]]]
"""Class to check to its outcome (passed, failed, error, skipped) and message, in the order they were run."""
_OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}


def run_tests(
    source: str,
    folder: Path,
    words: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    here: Path | None = None,
) -> Report:
    """Have pytest run a file, with nothing of the caller's configuration.

    Args:
        source: What is in the file.
        folder: An empty folder for the file and what pytest leaves.
        words: Further arguments of pytest.
        environment: Variables beside the caller's.
        here: Folder that pytest is run in; `folder` when left out.

    Raises:
        PluginError: If pytest does not come to an end, or cannot read the file.
    """
    (folder / "test_authors.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", f"--rootdir={folder}"]
    command += [f"--confcutdir={folder}", f"--junitxml={folder / 'report.xml'}", f"--basetemp={folder / 'tmp'}"]
    done = subprocess.run(
        [*command, *words, str(folder / "test_authors.py")],
        cwd=here or folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1) or not (folder / "report.xml").is_file():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise PluginError(f"pytest ended with {done.returncode} and gave no verdict:\n{said}")
    report: Report = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        [outcome, text] = ["passed", ""]
        for child in case:
            if child.tag in _OUTCOMES:
                outcome, text = _OUTCOMES[child.tag], f"{child.get('message')}\n{child.text}"
        report.setdefault(case.attrib["classname"].rpartition(".")[2], {})[case.attrib["name"]] = (outcome, text)
    return report


def kind_of(use: str, wanted: Kind | None, folder: Path) -> Kind:
    """What a plugin's name, `./file.py:Class` or `module:Class` is; a class's module is imported to tell.

    Raises:
        PluginError: If it is not found, is of another kind than `wanted`, or its name is that of several; or if it is
            a file outside `folder` or a module of no plugin, and the person has not let all code run.
    """
    kinds: Sequence[Kind] = KINDS if wanted is None else (wanted,)
    if ":" not in use and not use.endswith(".py"):
        found = [kind for kind in kinds if (kind, use) in registry().installed]
        if len(found) > 1:
            raise PluginError(f"{use}: is a name of {' and '.join(found)}; say --kind {found[0]} or --kind {found[1]}")
        # Where there is none, looking for it says what there is.
        return found[0] if found else registry().resolve(kinds[0], use, folder).kind
    said: list[str] = []
    for kind in kinds:
        try:
            found_class = registry().resolve(kind, use, folder)
            guarded(found_class, [folder], of_run=False, place="the folder you are in").load_class()
        except PluginError as error:
            if "is not a subclass" not in str(error):
                raise
            said.append(kind)
        else:
            return kind
    raise PluginError(f"{use}: is no subclass of coatkit.{', '.join(kind.title() for kind in said)}")


def chosen_options(component: Component, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, and `weights: random` where it takes that and has no weights here; for a backbone always.

    Backbones are made some fifty times over, so they are tried in the tiny size that random weights have.
    """
    model = component.options_model()
    options = dict(given)
    if "weights" in options or model is None or "weights" not in model.model_fields:
        return options
    try:
        model.model_validate({**options, "weights": "random"})
        missing = any(not present(*one) for one in needed(component.manifest, model, options))
    except ValueError:
        return options
    return {**options, "weights": "random"} if component.kind == "backbone" or missing else options


def examine(use: str, kind: Kind, options: Mapping[str, Any], here: Path) -> dict[str, tuple[str, str]]:
    """Every check of a component's suite with its outcome and, where it is not passed, what was said.

    Raises:
        PluginError: If pytest is missing or cannot run.
    """
    suite = f"{kind.title()}Conformance"
    lines = [f"from coatkit.testing import {suite}", "", "", f"class TestIt({suite}):"]
    lines += [f"    name = {use!r}", f"    options = {dict(options)!r}"]
    if kind == "expert" and any(
        one.manifest.kind == "backbone" and one.manifest.name == "mini" for one in all_manifests()
    ):
        lines += ["", "    def backbone(self):", "        import coatkit", ""]
        lines += ["        return coatkit.load_backbone('mini', weights='random', device='cpu')"]
    with tempfile.TemporaryDirectory(prefix="coatkit-check-") as folder:
        report = run_tests("\n".join(lines) + "\n", Path(folder), here=here)
    if not report:
        raise PluginError("no check was run; is pytest installed? pip install 'coatkit[testing]'")
    return next(iter(report.values()))
