"""The command line. Commands are imported when run, so `coatkit --help` loads no torch, pydantic or plugin."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches

import click

_COMMANDS = {
    "train": "Train the stages of a spec, or continue a run.",
    "check": "Check a spec without loading torch.",
    "plan": "Say what a spec will cost: parameters, operations, memory, time.",
    "cache": "Compute features of a spec's sounds once, and keep them.",
    "data": "Look at the rows of a spec: counts, lengths, categories, bad rows.",
    "mix": "Draw the mixtures of a spec, and say what was drawn.",
    "fetch": "Bring the weights a spec or a component needs into the cache.",
    "ask": "Ask a trained run about a sound.",
    "view": "See and hear what a trained run thinks of a sound.",
    "demo": "Try a trained run in the browser.",
    "eval": "Score a run's answers to rows it was not trained on.",
    "compare": "Compare two evaluations of the same rows.",
    "probe": "Say what can be read off a run's states, with linear probes.",
    "ablate": "Train, evaluate and compare the arms of an ablation.",
    "report": "Make one page of a run, or of several side by side.",
    "latency": "Measure the time to the first token and to the whole answer.",
    "export": "Write a run's model for plain peft, transformers or vLLM.",
    "plugins": "List experts, heads and backbones, and what failed to load.",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"coatkit.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-") and (near := get_close_matches(name, _COMMANDS, n=1)):
            ctx.fail(f"No such command {name!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coatkit")
def cli() -> None:
    """Continuous audio thinking: distil audio experts into large audio language models.

    \b
    coatkit check examples/quickstart/spec.yaml
    coatkit train examples/quickstart/spec.yaml
    coatkit ask examples/quickstart/runs/quickstart sound.flac "Is this speech, music or noise?"
    """


def main() -> None:
    """Run a command; an error coatkit foresaw is one message and an exit code, not a traceback."""
    from coatkit.errors import CoatkitError

    try:
        cli(standalone_mode=True)
    except CoatkitError as error:
        # A file name need not be text: what cannot be printed is shown by its bytes.
        click.echo(f"error: {error}".encode("utf-8", "backslashreplace").decode(), err=True)
        sys.exit(error.exit_code)
