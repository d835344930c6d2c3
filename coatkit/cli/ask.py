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
@click.option("--vanilla", is_flag=True, help="As before training, and without the thinking block.")
@click.option("--cot", is_flag=True, help="Ask it to reason in words first (text chain-of-thought), a baseline.")
@click.option("--max-thought-tokens", type=click.IntRange(1, 4096), help="With --cot: longest thought. [default: 256]")
def command(
    run: Path,
    audio: Path,
    question: str,
    max_new_tokens: int,
    untrained: bool,
    vanilla: bool,
    cot: bool,
    max_thought_tokens: int | None,
) -> None:
    """Ask the trained model in RUN a QUESTION about the sound file AUDIO.

    The thinking block is part of the prompt: it costs one prefill and no extra decoding. It stays there with --cot and
    with --untrained; --vanilla leaves it out.

    \b
    Examples:
      coatkit ask examples/quickstart/runs/quickstart sound.flac "Is this speech, music or noise?"
      coatkit ask RUN sound.flac "Is this speech, music or noise?" --vanilla --cot
    """
    from coatkit.data.audio import duration
    from coatkit.data.rows import AudioRef
    from coatkit.errors import DataError
    from coatkit.run_folder import RunFolder

    if max_thought_tokens is not None and not cot:
        raise click.UsageError("--max-thought-tokens: there is no thought in words without --cot")
    # What is wrong with the call is told before the model is loaded, which takes a while.
    RunFolder(run).read_record()
    duration(AudioRef(audio))
    if not question.strip():
        raise DataError("the question is empty")
    from coatkit.infer import asked, load

    model = load(run, trained=not (untrained or vanilla))
    if vanilla:
        from coatkit.evaluation.cot import without_block

        without_block(model)
    if not cot:
        click.echo(model.ask(audio, question, max_new_tokens=max_new_tokens))
        return
    from coatkit.evaluation.cot import THOUGHT_TOKENS, reason

    most = max_thought_tokens or THOUGHT_TOKENS
    (said,) = reason(model, [asked(audio, question)], max_new_tokens=max_new_tokens, max_thought_tokens=most)
    if said.finished:
        click.echo(f"{said.thought}\n", err=True)
    else:
        click.echo(f"no 'Answer:' within {most + max_new_tokens} tokens; all that was said:", err=True)
    click.echo(said.answer)
