"""`coatkit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    help="GPU to give the time for, again for more than one; `list` names them. Default: h100.",
)
@click.option("--devices", default=1, show_default=True, type=click.IntRange(1), help="Number of GPUs.")
@click.option(
    "--parallel",
    type=click.Choice(["ddp", "fsdp"]),
    help="Repeat the model on each GPU (ddp) or spread it over them (fsdp); both are shown when left out.",
)
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
    gpus: tuple[str, ...],
    devices: int,
    parallel: str | None,
    utilisation: float,
    seconds: float | None,
    text: float,
    answer: float,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Say what SPEC will cost: parameters, operations, memory, storage and time. Needs no GPU and no weights.

    Operations are counted by torch on the real sizes, padding and recomputing included; memory is an estimate; time is
    operations over the peak that the GPU's maker states and the utilisation you expect. Experts and heads compute in
    float32, and are timed so.

    \b
    Examples:
      coatkit plan examples/quickstart/spec.yaml
      coatkit plan spec.yaml --gpu a100 --gpu h100 --devices 4 --parallel fsdp
      coatkit plan spec.yaml --seconds 8 --text 80 --answer 40
    """
    import json

    from coatkit.errors import PluginError
    from coatkit.plan import GPUS, RowShape, make_plan
    from coatkit.spec_file import load_spec

    gpus = gpus or ("h100",)
    known = "\n".join(
        f"  {name}: {gpu.half / 1e12:.0f} TFLOP/s in bfloat16, {gpu.single / 1e12:g} in float32, {_bytes(gpu.memory)}"
        for name, gpu in GPUS.items()
    )
    if "list" in gpus:
        click.echo(known)
        return
    if unknown := [name for name in gpus if name not in GPUS]:
        raise PluginError(f"--gpu {unknown[0]}: not known here; known:\n{known}")
    loaded = load_spec(spec, overrides, need="components" if seconds is not None else "all")
    row = None if seconds is None else RowShape((seconds,), text, answer)
    plan = make_plan(loaded, devices=devices, row=row)
    ways = [way for way in plan.stages[0].memory if parallel in (None, way) or devices == 1]
    if as_json:
        days = {name: plan.seconds(GPUS[name], utilisation) / 86400 for name in gpus}
        click.echo(json.dumps({**plan.as_data(), "utilisation": utilisation, "days": days}, indent=1))
        return
    for line in loaded.notes:
        click.echo(f"note: {line}")
    _print_components(loaded)
    _print_parameters(plan)
    for stage in plan.stages:
        _print_stage(stage)
    _print_data(plan)
    recomputed = loaded.chosen["backbone"].options.get("gradient_checkpointing")
    fewer = [] if recomputed else ["backbone.gradient_checkpointing"]
    for way in ways:
        _print_memory(plan, way, {name: GPUS[name] for name in gpus}, fewer)
    of = "bfloat16 and float32" if plan.dtype == "bfloat16" else "float32"
    click.echo(f"time, if a GPU reaches {utilisation:.0%} of its peak in {of}:")
    for name in gpus:
        click.echo(f"  {devices} x {name}: {_time(plan.seconds(GPUS[name], utilisation) / 86400)}")
    for note in plan.notes:
        click.echo(f"not in these numbers: {note}")


def _print_components(loaded: Any) -> None:
    heads: dict[str, list[str]] = {}
    for place, chosen in loaded.chosen.items():
        component = chosen.component
        name = f"{component.use} ({component.distribution} {component.version}"
        if place.startswith("heads."):
            heads.setdefault(f"{name})", []).append(place.removeprefix("heads."))
        else:
            licence = component.manifest.weights_licence if component.manifest else "yours"
            click.echo(f"{place}: {name}; weights {licence})")
    for name, of in heads.items():
        click.echo(f"head of {', '.join(of)}: {name}")


def _print_parameters(plan: Any) -> None:
    learn, stay = sum(plan.trainable.values()), sum(plan.frozen.values())
    rows = [(part, plan.trainable.get(part, 0), plan.frozen.get(part, 0)) for part in {**plan.trainable, **plan.frozen}]
    click.echo(f"{'parameters':<28}{'learn':>12}{'frozen':>12}")
    for part, learns, frozen in [*rows, ("in all", learn, stay)]:
        click.echo(f"  {part:<26}{_count(learns):>12}{_count(frozen):>12}")


def _print_stage(stage: Any) -> None:
    teach = ", ".join(f"{name} {weight:g}" for name, weight in stage.experts.items()) or "none"
    click.echo(f"stage {stage.name}: {stage.steps:,} steps of {stage.rows_per_step:.4g} rows; experts: {teach}")
    click.echo(
        f"  rows: {stage.rows:,} of {stage.tokens_per_row:.0f} tokens on average, {stage.longest_row:.0f} at most;"
        f" {_hours(stage.hours)} of sound; {stage.passes:.3g} passes"
    )
    padded = stage.padded_tokens_per_step / stage.tokens_per_step - 1
    click.echo(f"  tokens of a step: {stage.tokens_per_step:,.0f}, and {padded:.0%} more of padding")
    click.echo(f"  {'operations of a step':<26}{'forward':>12}{'backward':>12}")
    for name, work in stage.work.items():
        exact = "  in float32" if work.exact else ""
        click.echo(f"    {name:<24}{_flops(work.forward):>12}{_flops(work.backward):>12}{exact}")
    both = (sum(getattr(work, way) for work in stage.work.values()) for way in ("forward", "backward"))
    forward, backward = both
    click.echo(f"    {'in all':<24}{_flops(forward):>12}{_flops(backward):>12}  = {_flops(stage.flops_per_step)}")


def _print_data(plan: Any) -> None:
    click.echo(f"rows of all stages: {plan.rows:,} different ones, {_hours(plan.hours)} of sound")
    if plan.store:
        kept = ", ".join(f"{name} {_bytes(size)}" for name, size in plan.store.items())
        click.echo(f"features, if they were stored ({plan.store_dtype}): {kept}")


def _print_memory(plan: Any, way: str, gpus: dict[str, Any], fewer: list[str]) -> None:
    from coatkit.plan import PARALLEL

    stage, memory = plan.memory(way)
    how = "memory" if plan.devices == 1 else f"memory of each of {plan.devices} devices with {way}"
    click.echo(f"{how}: about {_bytes(memory.total)}, most in stage {stage.name}")
    if plan.devices > 1:
        click.echo(f"  {PARALLEL[way]}")
    always = ("weights", "experts", "gradients", "optimizer")
    click.echo(f"  always: {', '.join(f'{name} {_bytes(getattr(memory, name))}' for name in always)}")
    click.echo(
        f"  and the larger of: activations {_bytes(memory.activations)} + logits {_bytes(memory.logits)};"
        f" the optimizer's update {_bytes(memory.update)}"
    )
    for name, gpu in gpus.items():
        if memory.total > gpu.memory:
            remedies = ["more devices with --parallel fsdp", "a larger batch.accumulate", *fewer]
            click.echo(f"  MORE than the {_bytes(gpu.memory)} of a {name}: try {', '.join(remedies)}")


def _count(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.2f} M" if number >= 1e4 else f"{number:,.0f}"


def _flops(number: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f} FLOP" if number else "0"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _time(days: float) -> str:
    if days >= 2:
        return f"{days:.1f} days"
    if days >= 1 / 12:
        return f"{24 * days:.1f} hours"
    return f"{1440 * days:.1f} min" if days >= 1 / 1440 else f"{86400 * days:.1f} s"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB" if number else "0"
