"""The documentation is whole: what is public has a page, links lead somewhere, and the site has every document."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import coatkit
from coatkit import testing
from coatkit.plugins import registry
from coatkit.spec import Spec

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from by_path import module_at

ROOT = Path(__file__).parents[1]


def tool(name: str) -> ModuleType:
    """A module of docs/tools."""
    module: ModuleType = module_at(ROOT / f"docs/tools/{name}.py", f"docs_{name}")
    return module


tree, reference = tool("tree"), tool("reference")
PAGES = reference.pages()
WRITTEN = {path: (ROOT / path).read_text(encoding="utf-8") for path in tree.documents()}


class _Loose(yaml.SafeLoader):
    """mkdocs.yml names a function of a package that is not installed here."""


_Loose.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loose)


# What is public has a page


def test_every_key_of_a_spec_and_of_an_option_model_is_there_with_its_meaning() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \| (.*) \|$", PAGES["spec"], re.M)
    assert all(meaning for _, _, _, meaning in rows), [row for row in rows if not row[3]]
    schema = Spec.model_json_schema()
    found = registry()
    for node in [schema, *schema["$defs"].values()]:
        title = "The spec" if node is schema else reference.places(schema)[node["title"]][0]
        for key in node.get("properties", {}):
            assert f"| `{key}` |" in section("spec", title), f"{title}.{key}"
    for kind, name in found.installed:
        there = section("spec", f"{kind.capitalize()} {name}")
        one = found.find(kind, name).manifest
        if one.options is not None:
            module, _, model = one.options.partition(":")
            for key in getattr(importlib.import_module(module), model).model_fields:
                assert f"| `{key}` |" in there, f"{kind} {name}: {key}"


def section(page: str, title: str) -> str:
    """What stands under a heading of a made page."""
    [body] = re.findall(rf"^##+ {re.escape(title)}(?: {{#\w+}})?\n(.*?)(?=^##+ |\Z)", PAGES[page], re.M | re.S)
    return body


def test_a_kind_of_value_is_said_in_words() -> None:
    spec = PAGES["spec"]
    assert "| `max_seconds` | number > 0 | `120` | longest sound in seconds (paper: 120)" in spec
    assert "| `schedule` | `constant`, `linear`, `cosine` | `constant` |" in spec
    assert "| `experts` | name: [experts.NAME](#expertspec) or none |" in spec
    assert "| `lora.rank` | whole number > 0 |" in spec or "| `lora.rank` | whole number ≥ 1 |" in spec


def test_every_command_and_option_is_there() -> None:
    commands = dict(reference.commands())
    assert len(commands) > 15
    for words, command in commands.items():
        said = section("cli", words)
        assert words == "coatkit" or re.search(r"```sh\ncoatkit ", said), f"{words}: no example"
        for option in command.params:
            if option.param_type_name == "option" and not option.hidden:
                assert all(name in said for name in option.opts), f"{words} {option.opts}"


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    listed = set(re.findall(r"^::: [\w.]+\.(\w+)$", PAGES["api"], re.M))
    assert listed == {*coatkit.__all__, *testing.__all__} - {"__version__"}
    for module, names in reference.names().items():
        source = "".join(importlib.import_module(module).__doc__ or "")
        for name in names:
            found = getattr(importlib.import_module(module), name)
            if isinstance(found, type) or callable(found):
                assert getattr(found, "__doc__", None), f"{module}.{name} has no docstring"
        assert source, f"{module} has no docstring"


def test_every_hook_and_plugin_is_there() -> None:
    from coatkit import hookspecs

    specified = [name for name in vars(hookspecs) if name.startswith("coatkit_")]
    assert specified
    assert sorted(reference.hooks()) == sorted(specified)
    for name in specified:
        assert len(section("plugins", name)) > 80
        assert any(name in text for path, text in WRITTEN.items() if path.startswith("docs/")), f"{name}: no guide"
    for kind, name in registry().installed:
        assert f"| from | [{registry().find(kind, name).distribution}]" in section("plugins", f"{name} ({kind})") or (
            "coatkit itself" in section("plugins", f"{name} ({kind})")
        )
    folders = {path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml")}
    assert {path.split("/")[1] for path in WRITTEN if path.startswith("plugins/")} == folders


def test_every_command_is_met_in_a_guide() -> None:
    guides = "".join(text for path, text in WRITTEN.items() if path.startswith("docs/") or path == "README.md")
    for words in dict(reference.commands()):
        assert f"`{words}" in guides or f"\n{words} " in guides, f"{words}: no guide uses it"


def test_making_the_references_loads_no_torch() -> None:
    code = "import sys, json; sys.path.insert(0, 'docs/tools'); import reference; reference.pages()"
    code += "; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "mkdocs"} & set(json.loads(done.stdout))


# Links


@pytest.mark.parametrize("path", WRITTEN)
def test_links_lead_to_files_and_headings(path: str) -> None:
    text, _ = tree.relinked(WRITTEN[path], path)  # refuses what is not there
    for link in (link for fenced, part in tree.parts(WRITTEN[path]) if not fenced for _, link, _ in LINK.findall(part)):
        name, _, anchor = link.partition("#")
        if anchor and ":" not in name:
            target = (ROOT / path).parent / name if name else ROOT / path
            assert anchor in slugs(target.read_text(encoding="utf-8")), f"{path}: {link}"
    assert "](/" not in text


LINK = tree._LINK


def slugs(text: str) -> set[str]:
    """Anchors of headings, by the rule that forges and the site share."""
    plain = "".join(part for fenced, part in tree.parts(text) if not fenced)
    titles = re.findall(r"^#+ (.+)$", plain, re.M)
    bare = (re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).lower().strip().replace(" ", "-") for title in bare}


def test_a_link_to_nothing_is_refused_and_one_to_a_file_gets_a_page() -> None:
    with pytest.raises(ValueError, match=r"docs/start\.md: links to gone\.md, which is not there"):
        tree.relinked("See [it](gone.md).", "docs/start.md")
    text, outside = tree.relinked("[a](../README.md#x) [b](../examples/paper)", "docs/start.md")
    assert text == "[a](index.md#x) [b](files/examples/paper/index.md)"
    assert outside == {"README.md", "examples/paper"}
    kept = "```md\n[c](gone.md)\n```\n[d](https://example.org/x)\n"
    assert tree.relinked(kept, "README.md") == (kept, set())
    assert "ablation/" in tree.shown("examples/paper")


# The site


def places(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [place for part in (nav.values() if isinstance(nav, dict) else nav) for place in places(part)]


def test_every_document_and_reference_is_in_the_nav_once() -> None:
    there = places(CONFIG["nav"])
    assert len(there) == len(set(there))
    documents = {tree.page_of(path) for path in WRITTEN if not path.startswith("examples/")}
    assert set(there) == documents | {f"reference/{name}.md" for name in PAGES}


def test_the_site_needs_no_network_to_be_read() -> None:
    assert CONFIG["theme"]["font"] is False
    assert CONFIG["use_directory_urls"] is False
    assert all("://" not in script for script in [*CONFIG["extra"]["polyfills"], *CONFIG["extra_css"]])
    # The offline plugin adds a script from elsewhere unless one of this name is there.
    assert any("iframe-worker" in script for script in CONFIG["extra"]["polyfills"])
    for place in [*CONFIG["extra"]["polyfills"], *CONFIG["extra_css"], CONFIG["theme"]["logo"]]:
        assert (ROOT / "docs" / place).is_file()


def test_pictures_are_drawn_without_anything_from_elsewhere() -> None:
    pictures = sorted((ROOT / "docs").rglob("*.svg"))
    assert len(pictures) > 2
    for path in pictures:
        outside = set(re.findall(r"(?:href|src)=\"(?!#)[^\"]*\"|url\((?!#)", path.read_text(encoding="utf-8")))
        assert not outside, path
