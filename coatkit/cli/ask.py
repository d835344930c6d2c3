"""`coatkit ask`."""

from __future__ import annotations

from pathlib import Path

import click


class _Words(click.Command):
    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS] RUN AUDIO QUESTION"]


@click.command(cls=_Words)
@click.argument("words", nargs=-1, metavar="RUN AUDIO QUESTION")
@click.option(
    "--turn",
    "turns",
    nargs=3,
    multiple=True,
    metavar="AUDIO QUESTION ANSWER",
    help="An earlier turn of the conversation; give it again for each, the earliest first. AUDIO - for none.",
)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1, 4096), help="Longest answer.")
@click.option("--untrained", is_flag=True, help="Answer with the model as it was before training.")
@click.option("--vanilla", is_flag=True, help="As before training, and without the thinking block.")
@click.option("--cot", is_flag=True, help="Ask it to reason in words first (text chain-of-thought), a baseline.")
@click.option("--max-thought-tokens", type=click.IntRange(1, 4096), help="With --cot: longest thought. [default: 256]")
@click.option("--stream", is_flag=True, help="Print the answer while it is decoded.")
@click.option("--server", metavar="URL", help="Ask this server in place of RUN, e.g. vLLM's; AUDIO QUESTION are left.")
@click.option("--model", metavar="NAME", help="With --server: the model's name there.  [default: the first]")
@click.option(
    "--think-len",
    "think_lens",
    multiple=True,
    type=click.IntRange(1),
    help="With --server: thinking positions, if it makes none itself; once for each block.",
)
def command(
    words: tuple[str, ...],
    turns: tuple[tuple[str, str, str], ...],
    max_new_tokens: int,
    untrained: bool,
    vanilla: bool,
    cot: bool,
    max_thought_tokens: int | None,
    stream: bool,
    server: str | None,
    model: str | None,
    think_lens: tuple[int, ...],
) -> None:
    """Ask the trained model in RUN a QUESTION about the sound file AUDIO; AUDIO - asks without a new sound.

    The thinking block is part of the prompt: it costs one prefill and no extra decoding. It stays there with --cot and
    with --untrained; --vanilla leaves it out.

    \b
    Examples:
      coatkit ask examples/quickstart/runs/quickstart sound.flac "Is this speech, music or noise?"
      coatkit ask RUN sound.flac "Is this speech, music or noise?" --vanilla --cot
      coatkit ask RUN other.flac "And this?" --turn sound.flac "Is this speech, music or noise?" "Music."
      coatkit ask RUN - "Are you sure?" --turn sound.flac "Is this speech, music or noise?" "Music."
      coatkit ask --server http://localhost:8000 sound.flac "Is this speech, music or noise?"
    """
    names = ["AUDIO", "QUESTION"] if server else ["RUN", "AUDIO", "QUESTION"]
    if len(words) != len(names):
        raise click.UsageError(f"{'with --server: ' if server else ''}give {' '.join(names)}")
    from coatkit.data.audio import duration
    from coatkit.data.rows import AudioRef
    from coatkit.errors import DataError
    from coatkit.run_folder import RunFolder

    if max_thought_tokens is not None and not cot:
        raise click.UsageError("--max-thought-tokens: there is no thought in words without --cot")
    if stream and (cot or server):
        raise click.UsageError("--stream: not with --cot or --server")
    audio, question = _sound(words[-2]), words[-1]
    history = [(_sound(heard), said, answer) for heard, said, answer in turns]
    if server:
        if untrained or vanilla or cot:
            raise click.UsageError(
                "--untrained, --vanilla, --cot: a server has one model, and its block is always there"
            )
        from coatkit.serving import ask_server

        answer = ask_server(
            server,
            audio,
            question,
            history=history,
            model=model,
            max_new_tokens=max_new_tokens,
            audio_think_len=(think_lens[0] if len(think_lens) == 1 else think_lens) or None,
        )
        click.echo(answer)
        return
    if model or think_lens:
        raise click.UsageError(f"{'--model' if model else '--think-len'}: goes with --server")
    run = Path(words[0])
    # What is wrong with the call is told before the model is loaded, which takes a while.
    RunFolder(run).read_record()
    for file in (audio, *(heard for heard, _, _ in history)):
        if file is not None:
            duration(AudioRef(file))
    if not question.strip():
        raise DataError("the question is empty")
    from coatkit.infer import asked, load

    row = asked(audio, question, history=history)
    thinker = load(run, trained=not (untrained or vanilla))
    if vanilla:
        from coatkit.evaluation.cot import without_block

        without_block(thinker)
    if stream:
        for piece in thinker.stream(audio, question, history=history, max_new_tokens=max_new_tokens):
            click.echo(piece, nl=False)
        click.echo()
        return
    if not cot:
        click.echo(thinker.answer([row], max_new_tokens=max_new_tokens)[0])
        return
    from coatkit.evaluation.cot import THOUGHT_TOKENS, reason

    most = max_thought_tokens or THOUGHT_TOKENS
    (said,) = reason(thinker, [row], max_new_tokens=max_new_tokens, max_thought_tokens=most)
    if said.finished:
        click.echo(f"{said.thought}\n", err=True)
    else:
        click.echo(f"no 'Answer:' within {most + max_new_tokens} tokens; all that was said:", err=True)
    click.echo(said.answer)


def _sound(word: str) -> Path | None:
    """A sound file's name, or None for `-`; a file of that name is ./-"""
    return None if word == "-" else Path(word)
