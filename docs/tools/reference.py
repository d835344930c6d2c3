"""Pages made from the code: every key of a spec, every command, every public name, every hook and plugin.

They are made when the site is built, from what is installed, so they cannot be out of date. Imports no torch and no
mkdocs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import click


def pages() -> dict[str, str]:
    """Name of the page to its Markdown."""
    return {"spec": spec(), "cli": cli(), "api": api(), "plugins": plugins()}


# The spec


def spec() -> str:
    """Keys with type, default and meaning, from the models that check a spec; then the options of what is installed."""
    from coatkit.plugins import Component, registry
    from coatkit.spec import Spec

    schema = Spec.model_json_schema()
    said = [
        "# Every key of a spec\n",
        "Made from the models that check a spec. [The spec](../spec.md) says how keys play together. A number called"
        " the paper's is the paper's; every other default is ours.\n",
        "## The spec\n",
        _table(schema, schema),
    ]
    for name, paths in places(schema).items():
        node = schema["$defs"][name]
        said += [f"## {paths[0]} {{#{name.lower()}}}\n", _plain(node.get("description", "")), ""]
        if also := ", ".join(f"`{path}`" for path in paths[1:]):
            said += [f"Also: {also}.", ""]
        said.append(_table(node, schema))
    said.append("## Options of what is installed\n")
    said.append("They stand beside `use`. Parts in braces are keys of the option above them.\n")
    found = registry()
    for kind in ("backbone", "expert", "head"):
        for name in found.names(kind):
            one = found.find(kind, name)
            component = Component(kind, name, one.manifest.target, one.manifest, one.distribution, one.version)
            model = component.options_model()
            said += [f"### {kind.capitalize()} {name}\n", _plain(one.manifest.summary), ""]
            if model is None:
                said.append("Its options are the arguments of its class.\n")
                continue
            options = model.model_json_schema()
            said.append(_table(options, options, inside=True) if options.get("properties") else "It has no options.\n")
    return "\n".join(said)


def places(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Models of the spec to the keys where they stand, such as `stages[].batch`; nearest to the top first."""
    found: dict[str, list[str]] = {}

    def names(node: Any, path: str) -> Iterator[tuple[str, str]]:
        """Models a type may be, each with what is added to the path for a list or a mapping."""
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"].rpartition("/")[2], path
            for one in [*node.get("anyOf", ()), *node.get("oneOf", ())]:
                yield from names(one, path)
            yield from names(node.get("items"), f"{path}[]")
            for one in (node.get("additionalProperties"), *node.get("patternProperties", {}).values()):
                yield from names(one, f"{path}.NAME")

    waiting = [("", schema)]
    while waiting:
        above, node = waiting.pop(0)
        for key, field in node.get("properties", {}).items():
            for name, path in names(field, f"{above}{key}"):
                if path not in found.setdefault(name, []):
                    found[name].append(path)
                    waiting.append((f"{path}.", schema["$defs"][name]))
    return found


def _table(node: dict[str, Any], schema: dict[str, Any], *, inside: bool = False) -> str:
    rows = [f"| `{key}` | {kind} | {default} | {said} |" for key, kind, default, said in _keys(node, schema, inside)]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _keys(node: dict[str, Any], schema: dict[str, Any], inside: bool, above: str = "") -> Iterator[tuple[str, ...]]:
    """Rows of a table; with `inside` the keys of nested models follow their own, else their type links to them."""
    for key, field in node.get("properties", {}).items():
        required = key in node.get("required", ())
        default = "required" if required else _default(field.get("default"), field, schema)
        unit = f" ({field['unit']})" if "unit" in field else ""
        said = _plain(field.get("description", "")) + unit
        yield above + key, _type(field, schema, not inside), default, said
        if inside and "$ref" in field:
            yield from _keys(_resolve(field, schema), schema, True, f"{above}{key}.")


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return found


def _default(value: Any, node: dict[str, Any], schema: dict[str, Any]) -> str:
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, dict):
        return "its own"  # a model's: its keys say
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"boolean": "true or false", "number": "number", "integer": "whole number", "string": "text", "null": "none"}


def _type(node: dict[str, Any], schema: dict[str, Any], linked: bool) -> str:
    """A type in words; a model is a link to its table."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{places(schema)[name][0]}](#{name.lower()})" if linked else "keys"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if several := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(one, schema, linked) for one in several))
    if node.get("type") == "array":
        inner = node.get("items") or {"type": "any"}
        return f"list of {_type(inner, schema, linked)}"
    if node.get("type") == "object":
        inner = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), None)
        return f"name: {_type(inner, schema, linked)}" if isinstance(inner, dict) else "keys"
    limits = "".join(f" {sign} {node[limit]}" for limit, sign in _LIMITS.items() if limit in node)
    return _TYPES.get(node.get("type", ""), "any") + limits


def _plain(text: str) -> str:
    """Text of a docstring or help as a paragraph, or a cell, of Markdown."""
    text = re.sub(r"<(?=[\w/])", "&lt;", " ".join(text.split()).replace("|", "\\|"))
    return re.sub(r"\[(?=[^\]]*\](?!\())", "\\\\[", text)


# Commands


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command and command of a command, by its words."""
    from coatkit.cli import cli as group

    yield from _walk("coatkit", group)


def _walk(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=words, help_option_names=["-h", "--help"])
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _walk(f"{words} {name}", found)


def cli() -> str:
    """Usage, help, arguments and options of every command, from click."""
    said = [
        "# Commands\n",
        "Made from the commands themselves; `coatkit COMMAND --help` says the same. What they exit with is in"
        " [run folder and exit codes](../run-folder.md#exit-codes).\n",
    ]
    for words, command in commands():
        context = click.Context(command, info_name=words, help_option_names=["-h", "--help"])
        usage = " ".join(command.collect_usage_pieces(context))
        said += [f"## {words}\n", f"```text\n{words} {usage}\n```\n", _help(command), ""]
        rows = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
        said += ["| option | |", "|---|---|", *(f"| {_code(name)} | {_plain(text)} |" for name, text in rows), ""]
        if isinstance(command, click.Group):
            names = command.list_commands(context)
            said += ["| command | |", "|---|---|"]
            for name in names:
                found = command.get_command(context, name)
                assert found is not None
                anchor = f"{words} {name}".replace(" ", "-")
                said.append(f"| [`{name}`](#{anchor}) | {_plain(found.get_short_help_str(120))} |")
            said.append("")
    return "\n".join(said)


def _code(name: str) -> str:
    return f"`{name}`".replace("|", "\\|")


def _help(command: click.Command) -> str:
    """A command's help: paragraphs, and what click leaves alone (after \\b) as a block, without its heading."""
    said = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if not paragraph.startswith("\b"):
            said.append(_plain(paragraph))
            continue
        lines = paragraph.removeprefix("\b").strip("\n").splitlines()
        if lines[0].rstrip(":").startswith("Example"):
            lines = lines[1:]
        block = inspect.cleandoc("\n" + "\n".join(lines))
        language = "sh" if block.startswith("coatkit") else "text"
        said.append(f"```{language}\n{block}\n```")
    return "\n\n".join(said)


# Python

GROUPS = {
    "Use a run": ("coatkit.infer", "coatkit.thought", "coatkit.readout"),
    "What a plugin is": ("coatkit.protocols", "coatkit.manifest", "coatkit.hookspecs"),
    "Write an expert": (
        "coatkit.losses",
        "coatkit.waveforms",
        "coatkit.weights",
        "coatkit.assets",
        "coatkit.precision",
    ),
    "Write a backbone": ("coatkit.backbones.hf", "coatkit.backbones.options", "coatkit.spec"),
    "Rows": ("coatkit.data.rows",),
    "Errors": ("coatkit.errors",),
}
"""Headings of the page to the modules whose public names stand there."""


def names() -> dict[str, list[str]]:
    """Public names of `coatkit` and `coatkit.testing` by the module they are in."""
    import coatkit
    from coatkit import testing

    found = {module: sorted(inside) for module, inside in coatkit._HOME.items()}
    for name, module in testing._HOME.items():
        found[module] = [*found.get(module, []), name]
    return found


def api() -> str:
    """Every public name, for mkdocstrings to fill in from the source without importing it."""
    left = names()
    said = [
        "# Python\n",
        "All of these but the conformance suites are imported from `coatkit` itself: `from coatkit import Expert`."
        " Names that are not here may change.\n",
    ]
    testing = {module: left.pop(module) for module in [*left] if module.startswith("coatkit.testing")}
    for heading, modules in GROUPS.items():
        said.append(f"## {heading}\n")
        for module in modules:
            said += [_entry(module, name) for name in left.pop(module)]
    if left:
        raise ValueError(f"coatkit: public names of {', '.join(left)} have no place in the reference: GROUPS")
    said.append("## Conformance suites\n\nFrom `coatkit.testing`; [how to use them](../testing.md).\n")
    said += [_entry(module, name) for module, inside in testing.items() for name in inside]
    return "\n".join(said)


def _entry(module: str, name: str) -> str:
    inherited = "\n      inherited_members: true" if module.startswith("coatkit.testing") else ""
    return f"::: {module}.{name}\n    options:\n      heading_level: 3{inherited}\n"


# Hooks and plugins


def hooks() -> dict[str, Any]:
    """Hook to the function that specifies it."""
    from coatkit import hookspecs

    return {name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.GROUP}_spec")}


def plugins() -> str:
    """The hooks a plugin implements, and the manifests of those installed."""
    from coatkit.plugins import registry

    said = [
        "# Hooks and plugins\n",
        "A plugin is a package with an entry point in the group `coatkit`."
        " [Your first expert](../first-expert.md#a-package) shows one whole.\n",
        "## Hooks\n",
    ]
    for name, hook in hooks().items():
        signature = str(inspect.signature(hook)).replace("'", "")
        said += [f"### {name}\n", f"```python\ndef {name}{signature}\n```\n", inspect.getdoc(hook) or "", ""]
    said.append("## Plugins of this repository\n")
    found = registry()
    if found.broken:
        raise ValueError(f"plugins failed to load: {found.broken}")
    for kind in ("expert", "head", "backbone"):
        for name in found.names(kind):
            one = found.find(kind, name)
            manifest = one.manifest
            home = f"../plugins/{one.distribution}/README.md"
            place = f"[{one.distribution}]({home})" if one.distribution != "coatkit" else "coatkit itself"
            facts = {
                "from": place,
                "sample rate": f"{manifest.sample_rate} Hz" if manifest.sample_rate else "",
                "frame rate": f"{manifest.frame_rate:g} Hz" if manifest.frame_rate else "",
                "width": manifest.dim or "",
                "code": manifest.code_licence,
                "weights": manifest.weights_licence,
                "source": _plain(manifest.citation),
                "files": ", ".join(f"`{asset.name}`" for asset in manifest.assets),
                "options": f"[{kind} {name}](spec.md#{kind}-{name.replace('.', '')})",
            }
            said += [f"### {name} ({kind})\n", _plain(manifest.summary), "", "| | |", "|---|---|"]
            said += [f"| {label} | {value} |" for label, value in facts.items() if value]
            said.append("")
    said.append("Two more are no components: [coatkit-eval-lmms](../plugins/coatkit-eval-lmms/README.md) and")
    said.append("[coatkit-serve-vllm](../plugins/coatkit-serve-vllm/README.md).\n")
    return "\n".join(said)
