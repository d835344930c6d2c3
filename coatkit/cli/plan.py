"""`coatkit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--gpu", default="h100", show_default=True, help="GPU to give the time for; `list` names them.")
@click.option("--devices", default=1, show_default=True, type=click.IntRange(1), help="Number of GPUs.")
@click.option("--shard", is_flag=True, help="Spread weights and optimizer over the GPUs (FSDP) instead of repeating.")
@click.option(
    "--utilisation",
    default=0.4,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the GPU's peak that training reaches.",
)
@click.option(
    "--seconds", type=click.FloatRange(0), help="Plan for rows of one sound this long, not those of the data."
)
@click.option("--text", default=60.0, show_default=True, help="With --seconds: tokens of text in a row.")
@click.option("--answer", default=30.0, show_default=True, help="With --seconds: tokens of these in the answer.")
@click.option("--json", "as_json", is_flag=True, help="Print numbers for a program.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. stages.0.steps=20.")
def command(
    spec: Path,
    gpu: str,
    devices: int,
    shard: bool,
    utilisation: float,
    seconds: float | None,
    text: float,
    answer: float,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Say what SPEC will cost: parameters, operations, memory, storage and time. Needs no GPU and no weights.

    Operations are counted by torch on the real sizes; memory is an estimate; time is operations over the peak that the
    GPU's maker states and the utilisation you expect.

    \b
    Examples:
      coatkit plan examples/quickstart/spec.yaml
      coatkit plan spec.yaml --gpu a100 --devices 4 --shard
      coatkit plan spec.yaml --seconds 8 --text 80 --answer 40
    """
    import json

    from coatkit.errors import PluginError
    from coatkit.plan import GPUS, RowShape, make_plan
    from coatkit.spec_file import load_spec

    if gpu not in GPUS:
        known = "\n".join(
            f"  {name}: {flops / 1e12:.0f} TFLOP/s, {size / 1e9:.0f} GB" for name, (flops, size) in GPUS.items()
        )
        if gpu == "list":
            click.echo(known)
            return
        raise PluginError(f"--gpu {gpu}: not known here; known:\n{known}")
    loaded = load_spec(spec, overrides, need="components" if seconds is not None else "all")
    row = None if seconds is None else RowShape((seconds,), text, answer)
    plan = make_plan(loaded, devices=devices, shard=shard, row=row)
    flops, size = GPUS[gpu]
    days = plan.seconds(flops, devices, utilisation) / 86400
    if as_json:
        click.echo(json.dumps({**plan.as_data(), "gpu": gpu, "devices": devices, "days": days}, indent=1))
        return
    _print(loaded, plan)
    how = "sharded over" if shard and devices > 1 else "on each of"
    total = sum(plan.memory.values())
    parts = ", ".join(f"{name} {_bytes(value)}" for name, value in plan.memory.items())
    click.echo(f"memory {how} {devices} device(s): about {_bytes(total)} ({parts})")
    if total > size:
        click.echo(f"  more than the {_bytes(size)} of a {gpu}: use --shard, accumulate, or gradient_checkpointing")
    click.echo(f"time on {devices} x {gpu} at {utilisation:.0%} of {flops / 1e12:.0f} TFLOP/s: {_time(days)}")


def _print(loaded: Any, plan: Any) -> None:
    for place, chosen in loaded.chosen.items():
        if not place.startswith("heads."):
            component = chosen.component
            licence = component.manifest.weights_licence if component.manifest else "yours"
            click.echo(f"{place}: {component.use} ({component.distribution} {component.version}; weights {licence})")
    learns = ", ".join(f"{part} {_count(n)}" for part, n in plan.trainable.items())
    click.echo(f"learns {_count(sum(plan.trainable.values()))}: {learns}")
    click.echo(f"frozen {_count(plan.frozen)} of the backbone")
    click.echo(f"rows: {plan.rows:,} of {plan.tokens_per_row:.0f} tokens on average, {plan.hours:,.1f} h of sound")
    for stage in plan.stages:
        passes = stage.steps * stage.rows_per_step / plan.rows
        click.echo(
            f"stage {stage.name}: {stage.steps:,} steps of {stage.rows_per_step:.0f} rows"
            f" ({stage.tokens_per_step:,.0f} tokens), {passes:.2f} passes,"
            f" {stage.flops_per_step / 1e12:.3g} TFLOP per step"
        )
        for name, work in stage.work.items():
            click.echo(f"  {name}: {work.forward / 1e12:.3g} forward, {work.backward / 1e12:.3g} backward")
    if plan.uncounted:
        click.echo(f"not counted, since nothing declares their cost: experts {', '.join(plan.uncounted)}")
    for name, size in plan.store.items():
        click.echo(f"features of {name} over all rows, float16: {_bytes(size)}")


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _time(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else f"{24 * days:.1f} hours" if days >= 1 / 12 else f"{1440 * days:.1f} min"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
