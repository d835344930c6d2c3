"""`coatkit train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. stages.0.steps=20.")
@click.option("--resume", is_flag=True, help="Continue the run in the spec's output folder, if there is one.")
@click.option("--debug-nan", is_flag=True, help="Train nothing: say where the run's last NaN or Inf comes from.")
def command(spec: Path, overrides: tuple[str, ...], resume: bool, debug_nan: bool) -> None:
    """Train the stages of SPEC.

    Everything that comes out is in the spec's output folder. SIGTERM, SIGUSR1 or Ctrl-C saves after the current
    step and exits with 0; --resume goes on from there, on as many devices as there are then.

    --debug-nan makes the last step again that was left out for NaN or Inf, with the newest checkpoint before it, and
    names the rows, expert, module, loss or gradient in which it begins. It writes nothing.

    \b
    Examples:
      coatkit train examples/quickstart/spec.yaml
      coatkit train spec.yaml --set stages.0.steps=20 --set output=runs/short
      coatkit train spec.yaml --resume
      coatkit train spec.yaml --debug-nan
    """
    from coatkit.spec_file import load_spec

    loaded = load_spec(spec, overrides)  # before torch: a wrong spec is told in a second
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard's writer greets with it
    if debug_nan and resume:
        raise click.UsageError("--debug-nan: trains nothing, so there is nothing to --resume")
    click.echo("loading the backbone and the experts ...", err=True)
    if debug_nan:
        from coatkit.debug_nan import replay

        for line in replay(loaded):
            click.echo(line)
        return
    from coatkit.memory import keep_freed_memory
    from coatkit.recovery import say_it_once
    from coatkit.trainer import train

    keep_freed_memory()  # here and not in the library, as they are for the whole process
    say_it_once()
    try:
        result = train(loaded, resume=resume)
    except KeyboardInterrupt:  # while loading, or the second of two
        click.echo(f"interrupted; what was saved is intact. Go on with: coatkit train {spec} --resume", err=True)
        sys.exit(130)
    done = "finished" if result.finished else f"stopped at step {result.position.step}; continue with --resume"
    if result.position.skipped:
        skipped, count = result.folder / "skipped.jsonl", result.position.skipped
        were = "1 step was" if count == 1 else f"{count} steps were"
        click.echo(f"{were} skipped (NaN, Inf or no usable row); see {skipped}", err=True)
        click.echo(f"  where a NaN begins: coatkit train {spec} --debug-nan", err=True)
    click.echo(f"{done}: {result.folder}")
