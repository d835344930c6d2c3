"""The command line. Commands are imported when run, so `coatkit --help` loads no torch, pydantic or plugin."""

from __future__ import annotations

import importlib
import os
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
    "schema": "Print the JSON Schema of specs, for editors.",
    "explain": "Say what a key of a spec means.",
    "doctor": "Look for what is wrong with environment, cache, a spec or a run.",
    "plugins": "List experts, heads and backbones; check one.",
    "new": "Start a plugin package: an expert, a head or a backbone.",
}

_SCREEN, _WIDTH = 23, 160
"""Lines, and characters of a line, that an error may fill."""
_OF_THE_PLACE = {"ENAMETOOLONG", "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ELOOP"}
"""What is wrong with a place, whatever is done there. A file that is missing is for the code that needs it to tell."""
_TAKE_CODE = {"train", "check", "plan", "cache", "data", "mix", "fetch", "ask", "view", "demo", "eval", "probe"}
_TAKE_CODE |= {"ablate", "latency", "export", "doctor", "plugins"}
"""Commands that take a spec or a run, which may name classes of its own; of `plugins`, only `check` does."""


def _allow_code() -> click.Option:
    def allow(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        if given:  # in the environment, so that the processes a command starts know it; for this command alone
            before = os.environ.get("COATKIT_ALLOW_CODE")
            os.environ["COATKIT_ALLOW_CODE"] = "1"
            ctx.call_on_close(lambda: _put_back("COATKIT_ALLOW_CODE", before))

    told = "Run code that a spec or run names from elsewhere; see docs/security.md."
    return click.Option(["--allow-code"], is_flag=True, expose_value=False, is_eager=True, callback=allow, help=told)


def _put_back(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"coatkit.cli.{name}").command
        takes = command.commands["check"] if name == "plugins" and isinstance(command, click.Group) else command
        if name in _TAKE_CODE and not any(option.name == "allow_code" for option in takes.params):
            takes.params.append(_allow_code())
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
        click.echo(f"error: {shown(error)}".encode("utf-8", "backslashreplace").decode(), err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        from errno import errorcode

        if errorcode.get(error.errno or 0) not in _OF_THE_PLACE or error.filename is None:
            raise
        remedy = "name another place, or make this one fit"
        named = RuntimeError(f"{os.fsdecode(error.filename)}: {error.strerror}; {remedy}")
        click.echo(f"error: {shown(named)}".encode("utf-8", "backslashreplace").decode(), err=True)
        sys.exit(3)


def shown(error: Exception) -> str:
    """An error's text on one screen, as a terminal may show it: it may repeat what a file holds, which is anything."""
    from coatkit.errors import printable

    lines, left = [], _SCREEN
    # Control characters would clear the screen or colour what follows; other ones turn the reading direction.
    said = str(error).replace("\r\n", "\n").split("\n")
    for number, line in enumerate(said):
        plain = printable(line[: 4 * _WIDTH], "\t")
        if len(line) > 4 * _WIDTH:
            plain = f"{plain[: 4 * _WIDTH]} ..."
        left -= 1 + len(plain) // _WIDTH
        if left < 0:
            lines.append(f"... and {len(said) - number} more lines")
            break
        lines.append(plain)
    return "\n".join(lines)
