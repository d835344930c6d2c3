"""`coatkit export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Folder to write; not there yet, or empty.")
@click.option("--merge", is_flag=True, help="The whole model with the adapters in its weights, not an adapter.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="With --merge: type of the weights."
)
@click.option("--step", type=click.IntRange(1), help="Of the checkpoint; the newest when left out.")
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="The stock model on the Hub, where the run had it from a folder: what an adapter names as its base.",
)
@click.option("--push", metavar="OWNER/NAME", help="Upload it to this repository of the Hugging Face Hub too.")
@click.option("--private", is_flag=True, help="With --push: make the repository a private one.")
@click.option("--dry-run", is_flag=True, help="With --push: say what would be uploaded, and upload nothing.")
def command(
    run: Path,
    to: Path,
    merge: bool,
    dtype: str | None,
    step: int | None,
    base_model: str | None,
    push: str | None,
    private: bool,
    dry_run: bool,
) -> None:
    """Write the model of RUN for others: plain peft or transformers load it, and vLLM serves it.

    Beside the weights: tokenizer and processor, a chat template that writes the thinking block, the heads for analysis,
    and a model card. See docs/serving.md.

    \b
    Examples:
      coatkit export RUN --to adapter
      coatkit export RUN --to adapter --base-model Qwen/Qwen2-Audio-7B-Instruct
      coatkit export RUN --to model --merge --dtype bfloat16
      coatkit export RUN --to model --merge --push me/my-model --dry-run
    """
    if dtype and not merge:
        raise click.UsageError("--dtype: an adapter keeps its type; it goes with --merge")
    if (private or dry_run) and not push:
        raise click.UsageError(f"{'--private' if private else '--dry-run'}: goes with --push")
    from coatkit.errors import RunError
    from coatkit.run_folder import RunFolder

    if push:
        from coatkit.export.hub import check_name

        check_name(push)
    folder = RunFolder(run)  # what is wrong with the call is told before the model is loaded
    folder.read_record()
    folder.at(step)
    from coatkit.export.write import export

    done = export(run, to, merge=merge, dtype=dtype, step=step, base_model=base_model)
    for name, size in done.files:
        click.echo(f"{size / 1e6:10.2f} MB  {name}")
    click.echo(f"written: {click.format_filename(to)}")
    if done.local_base:
        told = f"the adapter names {done.local_base} as its base, which others do not have"
        if push:
            raise RunError(f"not uploaded: {told}; give --base-model OWNER/NAME, or --merge")
        click.echo(f"note: {told}; --base-model names another", err=True)
    if push and dry_run:
        click.echo(
            f"would be uploaded to {push}: {len(done.files)} files, {sum(s for _, s in done.files) / 1e6:.1f} MB"
        )
    elif push:
        from coatkit.export.hub import push as upload

        click.echo(f"uploaded: {upload(to, push, private=private)}")
