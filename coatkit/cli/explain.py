"""`coatkit explain`."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Paths that begin like this, one key further at a time."""
    from coatkit.explain import paths

    depth = incomplete.count(".")
    return [CompletionItem(p) for p in paths() if p.startswith(incomplete) and p.count(".") == depth]


@click.command()
@click.argument("key", default="", shell_complete=_complete)
def command(key: str) -> None:
    """Say what KEY of a spec means: its type, default, unit, and whether the default is the paper's or ours.

    A section lists its keys; without KEY the spec's are listed. Keys of a suite begin with `suite`, those of an
    ablation with `ablation`.

    \b
    Example:
      coatkit explain stages.lr
      coatkit explain experts.basic-pitch.aux_weight
      coatkit explain backbone.mini
      coatkit explain suite.tasks.metric
    """
    from coatkit.explain import explain

    found, within = explain(key)
    for entry in found:
        for line in entry.lines():
            click.echo(line)
    if within:
        if found:
            click.echo("  keys:")
        width = max(len(entry.path) for entry in within)
        paths = [entry.path for entry in within]
        for entry in within:
            # Said where it tells something: who has another option of this name, or has it alone.
            told = paths.count(entry.path) > 1 or (len(entry.owners) == 1 and len({e.owner for e in within}) > 2)
            owner = f" ({entry.owner})" if told and entry.owner else ""
            click.echo(f"    {entry.path.ljust(width)}  {entry.meaning.partition('. ')[0]}{owner}")
