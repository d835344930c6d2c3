"""`coatkit ask`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("audio", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1, 4096), help="Longest answer.")
@click.option("--untrained", is_flag=True, help="Answer with the model as it was before training.")
def command(run: Path, audio: Path, question: str, max_new_tokens: int, untrained: bool) -> None:
    """Ask the trained model in RUN a QUESTION about the sound file AUDIO.

    The thinking block is part of the prompt: it costs one prefill and no extra decoding.

    \b
    Example:
      coatkit ask examples/quickstart/runs/quickstart sound.flac "Is this speech, music or noise?"
    """
    from coatkit.data.audio import duration
    from coatkit.data.rows import AudioRef
    from coatkit.errors import DataError
    from coatkit.run_folder import RunFolder

    # What is wrong with the call is told before the model is loaded, which takes a while.
    RunFolder(run).read_record()
    duration(AudioRef(audio))
    if not question.strip():
        raise DataError("the question is empty")
    from coatkit.infer import load

    model = load(run, trained=not untrained)
    click.echo(model.ask(audio, question, max_new_tokens=max_new_tokens))
