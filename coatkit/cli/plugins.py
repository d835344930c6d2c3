"""`coatkit plugins` and `coatkit plugins check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click


@click.group(invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List installed experts, heads and backbones, and plugins that failed to load.

    \b
    Examples:
      coatkit plugins
      coatkit plugins check basic-pitch
      coatkit plugins check ./loudness.py:Loudness
    """
    if context.invoked_subcommand is None:
        _list()


@command.command()
@click.argument("use", metavar="NAME|PATH:CLASS")
@click.option("--kind", type=click.Choice(["expert", "head", "backbone"]), help="Where a name is that of several.")
@click.option("--option", "given", multiple=True, metavar="KEY=VALUE", help="An option of it, as in a spec.")
@click.option("--verbose", "-v", is_flag=True, help="Name the checks that passed, too.")
@click.option("--json", "as_json", is_flag=True, help="Print every check with its outcome as JSON.")
def check(use: str, kind: Any, given: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """Try an expert, a head or a backbone by its conformance suite, and say which promises it keeps.

    It is named as in a spec's `use`; a class in a file of this folder, or below it, is run, and one from elsewhere with
    --allow-code. Where a plugin
    takes `weights: random` and its weights are not here, random ones are used, which is said; a backbone is always
    tried so, in a tiny size. The exit code is 1 where a promise is broken. docs/testing.md lists the checks.

    \b
    Examples:
      coatkit plugins check transformer
      coatkit plugins check ./loudness.py:Loudness --option floor_db=60
      coatkit plugins check mert --option layer=7
    """
    import yaml

    from coatkit.errors import SpecError
    from coatkit.plugins import registry

    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SpecError([f"--option {text}: expected KEY=VALUE, such as layer=7"])
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError([f"--option {text}: {str(error).splitlines()[0]}"]) from None
    from coatkit.verdict import chosen_options, examine, kind_of

    kind = kind_of(use, kind, Path.cwd())
    component = registry().resolve(kind, use, Path.cwd())
    taken = chosen_options(component, options)
    if taken.get("weights") == "random" and options.get("weights") != "random":
        click.echo(
            f"RANDOM WEIGHTS: {kind} {use} is tried with weights: random; --option weights=... gives others", err=True
        )
    click.echo(f"checking {kind} {use} ({component.distribution} {component.version}".rstrip() + ") ...", err=True)
    found = examine(use, kind, taken, Path.cwd())
    if as_json:
        import json

        told = {name: {"outcome": outcome, "said": _said(text)} for name, (outcome, text) in found.items()}
        click.echo(json.dumps({"kind": kind, "use": use, "options": taken, "checks": told}, indent=1, default=str))
    else:
        for line in _verdict(kind, use, found, verbose):
            click.echo(line)
    if any(outcome in ("failed", "error") for outcome, _ in found.values()):
        sys.exit(1)


def _verdict(kind: str, use: str, found: dict[str, tuple[str, str]], verbose: bool) -> list[str]:
    by = {word: [n for n, (outcome, _) in found.items() if outcome == word] for word in ("passed", "skipped")}
    broken = [name for name, (outcome, _) in found.items() if outcome in ("failed", "error")]
    lines = []
    for name, (outcome, text) in found.items():
        if outcome == "passed":
            lines += [f"  kept      {_words(name)}"] if verbose else []
        elif outcome == "skipped":
            lines += [f"  left out  {_words(name)}: {_said(text)[0]}"] if verbose else []
        else:
            first, *more = _said(text)
            lines += [f"  BROKEN    {_words(name)}: {first}", *(f"            {line}" for line in more)]
    kept = f"{len(by['passed'])} promises kept, {len(broken)} broken, {len(by['skipped'])} left out"
    hint = "" if verbose or not by["skipped"] else " (--verbose says why)"
    return [*lines, f"{kind} {use}: {kept}{hint}"]


def _words(name: str) -> str:
    """`test_padding_changes_nothing` as a promise in words."""
    return name.removeprefix("test_").replace("_", " ")


def _said(text: str) -> list[str]:
    """What a check said, without the component's name before it and pytest's frame around it."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return [""]
    said = [lines[0].partition("': ")[2] or lines[0]]
    return said + [line for line in lines[1:2] if line.startswith("What to do:")]


def _list() -> None:
    from coatkit.plugins import all_manifests, registry

    header = ("kind", "name", "dim", "rate", "weights", "from", "summary")
    rows = [header]
    for installed in all_manifests():
        m = installed.manifest
        rate = "-" if m.frame_rate is None else f"{m.frame_rate:.4g} Hz"
        dim = "-" if m.dim is None else str(m.dim)
        origin = f"{installed.distribution} {installed.version}"
        rows.append((m.kind, m.name, dim, rate, _plain(m.weights_licence, 40), _plain(origin, 80), _plain(m.summary)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        click.echo(f"{'  '.join(cells)}  {row[-1]}".rstrip())
    for (kind, name), offers in registry().installed.items():
        if len(offers) > 1:
            sides = " and ".join(f"{o.distribution} {o.version}" for o in offers)
            click.echo(f"conflict: {kind} {name} is offered by {sides}; uninstall one", err=True)
    for broken in registry().broken:
        origin = _plain(f"{broken.distribution} {broken.version} ({broken.entry_point})")
        click.echo(f"failed: {origin}: {broken.error}", err=True)


def _plain(text: str, longest: int = 200) -> str:
    """What a plugin says of itself, on one line; nothing that a terminal would obey."""
    from coatkit.errors import printable

    return printable(text[:longest]) + ("..." if len(text) > longest else "")
