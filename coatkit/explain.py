"""What a key of a spec, suite or ablation means, told from the schema. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from coatkit.errors import SpecError
from coatkit.manifest import KINDS
from coatkit.plugins import registry
from coatkit.schema import Schema, schema

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "minItems": "at least this many:",
}
_WORDS = {"object": "keys with values", "array": "list", "string": "text", "null": "null", "number": "number"}
_WORDS |= {"integer": "whole number", "boolean": "true or false"}


@dataclass(frozen=True)
class Key:
    """A key and what is known of it.

    Attributes:
        path: As a user writes it: `stages.lr`, `experts.mert.layers`.
        node: Its schema.
        required: Whether there is no default.
        owners: `backbone mini` and the like, where the key is an option of these components.
    """

    path: str
    node: Schema
    required: bool = False
    owners: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The components in words: `backbone mini, qwen2-audio`."""
        if not self.owners:
            return ""
        return f"{self.owners[0].split()[0]} {', '.join(owner.split()[1] for owner in self.owners)}"

    @property
    def meaning(self) -> str:
        return str(self.node.get("description", ""))

    @property
    def type(self) -> str:
        """What may stand there, in words."""
        return " or ".join(dict.fromkeys(_types(self.node)))

    @property
    def source(self) -> str:
        """Where the default is from: the paper where the description says so, and ours everywhere else."""
        said = self.meaning.casefold()
        return "the paper's" if "paper" in said and "ours" not in said else "ours"

    def lines(self) -> Iterator[str]:
        """What `coatkit explain` prints of it."""
        yield f"{self.path} ({self.owner})" if self.owner else self.path
        yield f"  {self.meaning}"
        yield f"  type:    {self.type}"
        if self.required:
            yield "  default: none; this key is required"
        elif "default" in self.node:
            yield f"  default: {_shown(self.node['default'])}"
        if unit := self.node.get("unit"):
            yield f"  unit:    {unit}"
        if not self.required and self.node.get("default") not in (None, [], {}):
            yield f"  source:  the default is {self.source}"


def explain(path: str) -> tuple[list[Key], list[Key]]:
    """A key by its path, and the keys within it.

    Args:
        path: Keys joined by dots; numbers of lists and names may be left out (`stages.lr`, `stages.0.lr`). A suite's
            begin with `suite`, an ablation's with `ablation`. `""` is the spec itself.

    Returns:
        The key, once for each component that has another one of this name, and what is within.

    Raises:
        SpecError: If there is none, with the nearest.
    """
    of, steps = _root(path)
    tree = _Tree(schema(of))
    found = _find(tree, steps, "" if of == "spec" else f"{of}.") if steps else []
    if steps and not found:
        near = _near(path)
        raise SpecError([f"{path}: no such key{near}; `coatkit explain` lists them all"])
    within = [key for parent in found or [Key("", tree.root)] for key in tree.members(parent.node, path)]
    return found, _merged(within)


def paths(of: str = "") -> list[str]:
    """Every path that `explain` knows, for completion and suggestions.

    Args:
        of: Only those of `spec`, `suite` or `ablation`; all when empty.
    """
    found: dict[str, None] = {}
    for kind, prefix in (("spec", ""), ("suite", "suite"), ("ablation", "ablation")):
        if of in ("", kind):
            tree = _Tree(schema(kind))
            if prefix:
                found[prefix] = None
            _list(tree, tree.root, prefix, found)
    return list(found)


def _list(tree: _Tree, node: Schema, prefix: str, found: dict[str, None], depth: int = 0) -> None:
    for key in tree.members(node, prefix) if depth < 8 else ():
        found[key.path] = None
        _list(tree, key.node, key.path, found, depth + 1)


class _Tree:
    """A schema, walked by the keys of what it describes."""

    def __init__(self, root: Schema) -> None:
        self.defs: dict[str, Schema] = root.get("$defs", {})
        self.root = self.defs.get("Spec", root)

    def members(self, node: Schema, prefix: str = "") -> Iterator[Key]:
        """The keys that may stand in a node; through lists and names, since all of their entries are alike."""
        at = f"{prefix}." if prefix else ""
        found = []
        for part, owner in self._parts(node):
            required = part.get("required", [])
            for name, inner in part["properties"].items():
                owners = (owner,) if owner and name not in ("use", "head") else ()
                found.append(Key(at + name, inner, name in required, owners))
        yield from _merged(found)

    def _parts(self, node: Schema, owner: str = "") -> Iterator[tuple[Schema, str]]:
        """Everything that says which keys a node may have, and the component that says so."""
        if "$ref" in node:
            name = node["$ref"].removeprefix("#/$defs/")
            kind, dot, component = name.partition(".")
            is_one = dot and kind in KINDS and component in registry().names(kind)
            yield from self._parts(self.defs[name], f"{kind} {component}" if is_one else owner)
            return
        if "properties" in node:
            yield node, owner
        for inner in (*node.get("allOf", ()), *node.get("anyOf", ())):
            yield from self._parts(inner, owner)
        if (
            "else" in node
        ):  # an entry with a name has the options of that name; what it may use instead has its own place
            yield from self._parts(node["else"], owner)
        elif "then" in node:
            yield from self._parts(node["then"], owner)
        if isinstance(items := node.get("items"), dict):
            yield from self._parts(items, owner)
        named = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        if "properties" not in node:
            for inner in named:
                if isinstance(inner, dict):
                    yield from self._parts(inner, owner)

    def component(self, kind: str, name: str) -> Schema | None:
        return self.defs.get(f"{kind}.{name}") if name in registry().names(kind) else None  # type: ignore[arg-type]

    def is_open(self, node: Schema, step: str) -> bool:
        """Whether this name of the user's, or number of a list, may stand before the node's keys."""
        if "$ref" in node:
            return self.is_open(self.defs[node["$ref"].removeprefix("#/$defs/")], step)
        inner = (*node.get("allOf", ()), *node.get("anyOf", ()))
        named = isinstance(node.get("additionalProperties"), dict) or bool(node.get("patternProperties"))
        listed = "items" in node and step.isdigit()
        return listed or (named and "properties" not in node) or any(self.is_open(part, step) for part in inner)


def _merged(keys: Iterable[Key]) -> list[Key]:
    """Keys of which the same is said made one, with the owners of all; in the order of their paths' first."""
    found: dict[tuple[str, str], Key] = {}
    for key in keys:
        mark = (key.path, f"{key.meaning}|{key.type}|{key.node.get('default')}")
        owners = tuple(dict.fromkeys((*found[mark].owners, *key.owners))) if mark in found else key.owners
        found[mark] = replace(found.get(mark, key), owners=owners)
    places = list(dict.fromkeys(key.path for key in found.values()))
    return sorted(found.values(), key=lambda key: places.index(key.path))


def _find(tree: _Tree, steps: list[str], prefix: str) -> list[Key]:
    current = [Key("", tree.root)]
    for i, step in enumerate(steps):
        path = prefix + ".".join(steps[: i + 1])
        kind = steps[i - 1].removesuffix("s") if i else ""
        if kind in ("backbone", "head") and (options := tree.component(kind, step)) is not None:
            said = f"options of the {kind} {step}"
            current = [Key(path, {"description": said, "type": "object", **options}, owners=(f"{kind} {step}",))]
            continue
        found: list[Key] = []
        for parent in current:
            same = [key for key in tree.members(parent.node) if key.path == step]
            found += [Key(path, key.node, key.required, key.owners or parent.owners) for key in same]
            if not same and tree.is_open(parent.node, step):
                found.append(Key(path, _entry(tree, parent.node, step), owners=parent.owners))
        current = _merged(found)
    return current


def _entry(tree: _Tree, node: Schema, step: str) -> Schema:
    """What stands under a name of the user's, or a number of a list."""
    if "$ref" in node:
        return _entry(tree, tree.defs[node["$ref"].removeprefix("#/$defs/")], step)
    for inner in (node.get("items"), node.get("additionalProperties"), *node.get("patternProperties", {}).values()):
        if isinstance(inner, dict):
            return {"description": node.get("description", ""), **inner}
    for inner in (*node.get("allOf", ()), *node.get("anyOf", ())):
        if tree.is_open(inner, step):
            return _entry(tree, inner, step)
    return {}


def _root(path: str) -> tuple[str, list[str]]:
    steps = path.replace("[]", "").split(".") if path else []
    if steps and steps[0] in ("suite", "ablation"):
        return steps[0], steps[1:]
    return "spec", steps


def _near(path: str) -> str:
    known = paths()
    if near := difflib.get_close_matches(path, known, n=1, cutoff=0.7):
        return f"; did you mean {near[0]!r}?"
    same = [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]]
    return f"; did you mean {same[0]!r}?" if same else ""


def _types(node: Schema) -> Iterator[str]:
    for inner in node.get("anyOf", ()) if "type" not in node else ():
        yield from _types(inner)
    if "anyOf" in node and "type" not in node:
        return
    if "const" in node:
        yield _shown(node["const"])
        return
    if "enum" in node:
        yield f"one of {', '.join(_shown(value) for value in node['enum'])}"
        return
    types = node.get("type", [])
    bounds = [f"{word} {_shown(node[key])}" for key, word in _BOUNDS.items() if key in node]
    for name in [types] if isinstance(types, str) else types:
        said = _WORDS[name]
        if name in ("integer", "number") and bounds:
            said += f", {' and '.join(bounds)}"
        if name == "array" and isinstance(node.get("items"), dict):
            inner = " or ".join(dict.fromkeys(_types(node["items"])))
            said = f"list of {inner}" if inner else said
        if name == "object" and isinstance(node.get("additionalProperties"), dict):
            inner = " or ".join(dict.fromkeys(_types(node["additionalProperties"])))
            said = f"names, each with {inner}" if inner else said
        yield said
    if not types:
        yield "anything"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
