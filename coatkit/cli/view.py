"""`coatkit view`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("audio", type=click.Path(path_type=Path))
@click.option(
    "--question", default="", help="Ask this, and show the answer too.  [default: What is heard?, unanswered]"
)
@click.option("--start", type=click.FloatRange(0), help="Seconds in the file where to begin.")
@click.option("--end", type=click.FloatRange(0, min_open=True), help="Seconds in the file where to end.")
@click.option("--step", type=click.IntRange(1), help="Of the checkpoint; the newest when left out.")
@click.option("--untrained", is_flag=True, help="Show the model as it was before training.")
@click.option("--decoder", default="", metavar="FILE.py[:NAME]", help="Decode features with this, not linearly.")
@click.option(
    "--decoder-seconds",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Training sound that the linear decoder is fitted on, once; 0 leaves decoding out.",
)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1, 4096), help="Longest answer.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; else RUN/view/NAME.")
@click.option("--device", help="Torch device; the best there is when left out.")
def command(
    run: Path,
    audio: Path,
    question: str,
    start: float | None,
    end: float | None,
    step: int | None,
    untrained: bool,
    decoder: str,
    decoder_seconds: float,
    max_new_tokens: int,
    out: Path | None,
    device: str | None,
) -> None:
    """See and hear what the trained model in RUN thinks of the sound file AUDIO.

    For each expert: its target above what the head predicts from the thinking states, on one scale, with numbers; and
    the reconstruction as a sound beside the original. Writes PNGs, results.json and one page, view.html, that needs no
    network. Needs the extra: pip install 'coatkit[analysis]'.

    \b
    Examples:
      coatkit view examples/quickstart/runs/quickstart sound.flac
      coatkit view RUN sound.flac --question "Is this speech, music or noise?" --out shown
      coatkit view RUN sound.flac --decoder ./vocoder.py:decode
    """
    from coatkit.data.audio import duration
    from coatkit.data.rows import AudioRef
    from coatkit.run_folder import RunFolder

    if untrained and step is not None:
        raise click.UsageError("--step: there is no step before training (--untrained)")
    if start is not None and end is not None and end <= start:
        raise click.UsageError(f"--end {end:g} is not after --start {start:g}")
    # What is wrong with the call is told before the model is loaded, which takes a while.
    folder = RunFolder(run)
    folder.read_record()
    folder.at(step)
    ref = AudioRef(audio, start, end)
    duration(ref)
    from coatkit.analysis import hear, view
    from coatkit.infer import load

    if decoder:
        hear.own_decoder(decoder)
    model = load(run, trained=not untrained, step=step, device=device)
    seen = view.look(
        model,
        ref,
        question=question.strip(),
        max_new_tokens=max_new_tokens,
        decoder=decoder,
        decoder_seconds=decoder_seconds,
        say=lambda line: click.echo(line, err=True),
    )
    path = view.write(seen, run / "view" / view.folder_name(ref, model.step) if out is None else out)
    for line in view.lines(seen):
        click.echo(line)
    click.echo(f"page: {click.format_filename(path)}")
