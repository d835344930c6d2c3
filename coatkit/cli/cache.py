"""`coatkit cache`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--expert", "names", multiple=True, metavar="NAME", help="An expert, or `tower`; the spec's cache.names.")
@click.option("--python", type=click.Path(path_type=Path), help="Interpreter to run the one expert in.")
@click.option("--yes", is_flag=True, help="Do not ask before writing.")
@click.option("--verify", is_flag=True, help="Check every stored shard instead, and remove the damaged ones.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. cache.dtype=int8.")
def command(
    spec: Path, names: tuple[str, ...], python: Path | None, yes: bool, verify: bool, overrides: tuple[str, ...]
) -> None:
    """Compute the features of SPEC's sounds once and keep them, for training to read.

    What to keep is the spec's `cache: [NAME, ...]`: experts, or `tower` for the backbone's frozen audio tower. It can
    be stopped and started again, and is shared by all runs with the same experts.

    \b
    Examples:
      coatkit cache spec.yaml
      coatkit cache spec.yaml --expert panns --set cache.dtype=int8 --yes
      coatkit cache spec.yaml --expert mine --python other-env/bin/python
      coatkit cache spec.yaml --verify
    """
    from coatkit.errors import RunError
    from coatkit.spec_file import load_spec

    loaded = load_spec(spec, overrides)
    chosen = list(names) or list(loaded.spec.cache.names)
    if not chosen:
        raise RunError(f"{spec}: names nothing to store; write `cache: [NAME, ...]` in it, or give --expert NAME")
    if unknown := [name for name in chosen if name != "tower" and name not in loaded.spec.experts]:
        raise RunError(f"{spec}: has no expert {unknown[0]!r}; there are: {', '.join([*loaded.spec.experts, 'tower'])}")
    if python is not None and (len(chosen) != 1 or chosen[0] == "tower"):
        raise RunError("--python runs one expert in another interpreter; name it with --expert NAME")
    if verify:
        _verify(loaded)
        return
    from coatkit.features import root_of
    from coatkit.recovery import in_words, say_it_once
    from coatkit.store import INTACT

    say_it_once()
    with in_words(root_of(loaded), INTACT):
        _extract(loaded, chosen, python, yes)


def _extract(loaded: Any, names: list[str], python: Path | None, yes: bool) -> None:
    import shutil

    from rich.console import Console
    from rich.progress import track

    from coatkit.extract import Extraction
    from coatkit.infer import best_device

    console = Console(stderr=True)

    def watch(steps: Iterable[Any], count: int) -> Iterable[Any]:
        return track(steps, total=count, console=console, description="sounds", transient=True)

    click.echo("loading ...", err=True)
    with Extraction(loaded, names, loaded.spec.cache.dtype, python, best_device()) as extraction:
        for wanted in extraction.wanted:
            size = f"about {_size(wanted.bytes)} at most as {wanted.about.dtype}"
            click.echo(f"{wanted.name}: {wanted.seconds / 3600:.2f} h of sound, {size}")
        root = extraction.root
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        total = sum(wanted.bytes for wanted in extraction.wanted)
        click.echo(f"into {root}, {_size(total)} of {_size(free)} that are free")
        if not yes:
            click.confirm("Write it?", abort=True)
        for wanted in extraction.wanted:
            report = extraction.run(wanted, watch)
            click.echo(f"{report.name}: {report.added} sounds added, {report.known} known; {report.folder}")
            for reason in report.bad[:5]:
                click.echo(f"  left out: {reason}", err=True)
            if len(report.bad) > 5:
                click.echo(f"  left out: {len(report.bad) - 5} more", err=True)


def _verify(loaded: Any) -> None:
    from coatkit.errors import RunError
    from coatkit.features import root_of
    from coatkit.store import verify

    root, damaged, shards = root_of(loaded), 0, 0
    folders = sorted(file.parent for file in root.glob("*/about.json")) if root.is_dir() else []
    for folder in folders:
        for name, wrong in verify(folder):
            shards += 1
            if wrong:
                damaged += 1
                (folder / name).unlink()
                click.echo(f"{folder / name}: {wrong}; removed", err=True)
    if damaged:
        raise RunError(f"{damaged} of {shards} shards were damaged and are removed; add them again: coatkit cache SPEC")
    click.echo(f"{shards} shards in {len(folders)} folders of {root}: whole")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
