"""JSON Schema of specs, suites and ablations, with every installed plugin's options, for editors. Imports no torch.

It is made from the pydantic models that `coatkit check` uses, so there is one source. It says less than they do: what a
check says of several keys together (`rows` or `tokens`), of files and of names in other places, is not in it. Draft 7,
which is what editors know; there a `$ref` takes no keys beside it, so references stand in `allOf`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from coatkit.analysis.ablate_study import StudySpec
from coatkit.errors import PluginError
from coatkit.evaluation.suite import SuiteSpec
from coatkit.manifest import KINDS, Kind
from coatkit.plugins import Component, registry
from coatkit.spec import ComponentSpec, ExpertSpec, HeadSpec, Spec

Schema = dict[str, Any]
DRAFT = "http://json-schema.org/draft-07/schema#"
FILES = ("spec", "suite", "ablation")
"""What there is a schema of."""

_MAPS, _LISTS = ("properties", "patternProperties", "$defs"), ("anyOf", "allOf", "oneOf")
_ONES = ("items", "additionalProperties", "propertyNames", "not", "if", "then", "else")
_EXTENDS = {
    "type": "string",
    "minLength": 1,
    "description": "another spec, relative to this one, over whose keys this one's are put (docs/spec.md)",
}


def schema(of: str = "spec") -> Schema:
    """The JSON Schema of a kind of file.

    Args:
        of: `spec`, `suite` or `ablation`.

    Returns:
        A schema as plain data, the same for the same installed plugins.
    """
    if of != "spec":
        found = _schema_of(SuiteSpec if of == "suite" else StudySpec)
        return {"$schema": DRAFT, "title": f"coatkit {of}", "type": "object", **found}
    defs = _definitions()
    over = {f"over.{name}": _over(name, definition) for name, definition in defs.items()}
    over["over.Spec"]["required"] = ["extends", "output"]
    stages = over["over.Spec"]["properties"]["stages"]
    stages.update(
        type=["array", "object"],
        items=_reference("Stage"),
        additionalProperties=_reference("over.Stage", "object", "null"),
    )
    return {
        "$schema": DRAFT,
        "title": "coatkit spec",
        "type": "object",
        "if": {"type": "object", "required": ["extends"]},
        "then": {"$ref": "#/$defs/over.Spec"},
        "else": {"$ref": "#/$defs/Spec"},
        "$defs": {**defs, **over},
    }


def components(kind: Kind) -> dict[str, Schema | None]:
    """Schema of the options of every installed component of a kind; None where its plugin does not tell them."""
    found: dict[str, Schema | None] = {}
    for name in registry().names(kind):
        offer = registry().installed[kind, name][0]
        component = Component(kind, name, offer.manifest.target, offer.manifest, offer.distribution, offer.version)
        try:
            model = component.options_model()
        except PluginError:  # `coatkit check` says what is wrong with it; an editor must work beside it
            model = None
        found[name] = None if model is None else _schema_of(model, f"{kind}.{name}.")
    return found


def _definitions() -> dict[str, Schema]:
    """Every definition of the spec's schema, with components in place of what the models leave open."""
    spec = _schema_of(Spec)
    defs: dict[str, Schema] = {name.removesuffix("Spec"): d for name, d in spec.pop("$defs").items()}
    spec = _renamed(spec, lambda name: name.removesuffix("Spec"))
    defs = {name: _renamed(d, lambda name: name.removesuffix("Spec")) for name, d in defs.items()}
    for name in ("Component", "Expert", "Head"):
        defs.pop(name, None)
    for kind in KINDS:
        model = ComponentSpec if kind == "backbone" else ExpertSpec if kind == "expert" else HeadSpec
        fields = model.model_fields
        use: Schema = {"type": "string", "description": fields["use"].description}
        # What is no plugin's name is a class of the user's, and has a colon.
        use["anyOf"] = [{"enum": registry().names(kind)}, {"pattern": ":"}]
        own: Schema = {"use": use}
        if kind == "expert":
            own["head"] = {**_reference("head", "object", "null"), "description": fields["head"].description}
        cases = []
        for name, options in components(kind).items():
            options = options or {"additionalProperties": True}
            defs |= options.pop("$defs", {})
            options["properties"] = {**own, **options.get("properties", {})}
            defs[f"{kind}.{name}"] = options
            chosen = {"properties": {"use": {"const": name}}, "required": ["use"]}
            cases.append({"if": chosen, "then": {"$ref": f"#/$defs/{kind}.{name}"}})
        defs[kind] = {"properties": own, "required": ["use"], "allOf": cases}
    defs["head"] = _entry("head", "transformer")
    experts: Schema = spec["properties"]["experts"]
    experts["properties"] = {
        name: {"type": ["object", "null"], **_entry("expert", name), "description": _summary(name)}
        for name in registry().names("expert")
    }
    experts.pop("patternProperties", None)
    experts["propertyNames"] = {"pattern": r"^[A-Za-z0-9_-]+$"}
    experts["additionalProperties"] = _reference("expert")
    # Heads by `use`, under a name of their own: `head` is the entry that may leave it out.
    heads = [f"head.{name}" for name in registry().names("head")]
    defs["heads"] = {
        "properties": {"use": defs[heads[0]]["properties"]["use"]},
        "allOf": [
            {
                "if": {"properties": {"use": {"const": name.removeprefix("head.")}}, "required": ["use"]},
                "then": {"$ref": f"#/$defs/{name}"},
            }
            for name in heads
        ],
    }
    spec["properties"]["backbone"] |= _reference("backbone")
    spec["properties"]["head"] |= _reference("head")
    spec["properties"] = {"extends": _EXTENDS, **spec["properties"]}
    defs["Spec"] = spec
    return defs


def _summary(expert: str) -> str:
    return registry().installed["expert", expert][0].manifest.summary


def _entry(kind: str, default: str) -> Schema:
    """A component that is `default` where it does not say what to use."""
    named = "heads" if kind == "head" else kind
    return {
        "if": {"type": "object", "required": ["use"]},
        "then": {"$ref": f"#/$defs/{named}"},
        "else": {"$ref": f"#/$defs/{kind}.{default}"},
    }


def _reference(name: str, *types: str) -> Schema:
    return {"type": list(types) if len(types) > 1 else "object", "allOf": [{"$ref": f"#/$defs/{name}"}]}


def _over(name: str, definition: Schema) -> Schema:
    """A definition for a spec that extends another: nothing is required, since the other has it."""

    def relax(node: Schema) -> Schema:
        return {key: value for key, value in node.items() if key != "required"}

    found = _each(_renamed(definition, lambda inner: f"over.{inner}"), relax, conditions=False)
    if name.partition(".")[0] == "backbone" and name != "backbone":
        for key, value in found.get("properties", {}).items():
            found["properties"][key] = _nullable(value)
        if name.removeprefix("backbone.") in registry().names("backbone"):
            found["additionalProperties"] = {"type": "null"}  # null takes an option of the base's away
    if name.partition(".")[0] in ("expert", "head") and name.count("."):
        found["additionalProperties"] = True  # the base may mean another class by this name
    return found


def _nullable(node: Schema) -> Schema:
    if "anyOf" in node:
        return {**node, "anyOf": [*node["anyOf"], {"type": "null"}]} if "type" not in node else node
    types = node.get("type", [])
    node = {**node, "type": [*([types] if isinstance(types, str) else types), "null"]}
    return {**node, "enum": [*node["enum"], None]} if "enum" in node else node


def _schema_of(model: type[BaseModel], prefix: str = "") -> Schema:
    """A model's schema without titles, references in `allOf`, and types side by side where that says it.

    Args:
        prefix: What the names of its definitions begin with.
    """
    found = _each(model.model_json_schema(), _tidy)
    found.pop("description", None)
    found.pop("type", None)
    defs = found.pop("$defs", {})
    for definition in defs.values():
        definition.pop("type", None)  # a place that refers to it says so, and may allow other types beside it
    if prefix:
        defs = {prefix + name: _renamed(d, lambda name: prefix + name) for name, d in defs.items()}
        found = _renamed(found, lambda name: prefix + name)
    return {**found, "$defs": defs} if defs else found


def _tidy(node: Schema) -> Schema:
    node = {key: value for key, value in node.items() if key != "title" or not isinstance(value, str)}
    if "patternProperties" in node:
        node.setdefault("additionalProperties", False)
    if "$ref" in node:
        node = {"type": "object", "allOf": [{"$ref": node.pop("$ref")}], **node}
    if "anyOf" in node:
        branches = [_tidy(branch) for branch in node["anyOf"]]
        types: list[str] = []
        for branch in branches:
            one = branch.get("type", "unknown")
            types += [one] if isinstance(one, str) else one
        fixed = [b for b in branches if "enum" in b or "const" in b]
        others = [b for b in branches if b not in fixed and b.get("type") != "null"]
        # Keys of a schema that bind one type say nothing of others, so they may stand side by side; an error is then
        # where it is, and not "matches none of these".
        if len(set(types)) == len(types) and "unknown" not in types and not (fixed and (others or len(fixed) > 1)):
            merged: Schema = {}
            for branch in branches:
                merged.update({key: value for key, value in branch.items() if key != "type"})
            if "enum" in merged and "null" in types:
                merged["enum"] = [*merged["enum"], None]
            rest = {key: value for key, value in node.items() if key != "anyOf"}
            node = {"type": types, **merged, **rest}
        else:
            node = {**node, "anyOf": branches}
    return node


def _each(node: Schema, change: Callable[[Schema], Schema], *, conditions: bool = True) -> Schema:
    """A schema with `change` applied to every schema in it, the inner ones first."""
    found = dict(node)
    for key, value in node.items():
        if key in _MAPS:
            found[key] = {name: _each(inner, change, conditions=conditions) for name, inner in value.items()}
        elif key in _LISTS:
            found[key] = [_each(inner, change, conditions=conditions) for inner in value]
        elif key in _ONES and isinstance(value, dict) and (conditions or key != "if"):
            found[key] = _each(value, change, conditions=conditions)
    return change(found)


def _renamed(node: Schema, rename: Callable[[str], str]) -> Schema:
    """A schema whose references name other definitions."""

    def change(inner: Schema) -> Schema:
        if "$ref" not in inner:
            return inner
        return {**inner, "$ref": "#/$defs/" + rename(inner["$ref"].removeprefix("#/$defs/"))}

    return _each(node, change)
