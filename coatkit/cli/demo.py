"""`coatkit demo`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65_535), help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others can ask by 0.0.0.0.")
@click.option("--step", type=click.IntRange(1), help="Of the checkpoint; the newest when left out.")
@click.option("--max-seconds", default=30.0, show_default=True, type=click.FloatRange(0.1, 600), help="Longest sound.")
@click.option(
    "--max-megabytes", default=20.0, show_default=True, type=click.FloatRange(0.1, 2000), help="Largest file."
)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1, 4096), help="Longest answer.")
@click.option(
    "--max-answer-seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(1),
    help="An answer that takes longer is cut off.",
)
@click.option("--device", help="Torch device; the best there is when left out.")
def command(
    run: Path,
    port: int,
    host: str,
    step: int | None,
    max_seconds: float,
    max_megabytes: float,
    max_new_tokens: int,
    max_answer_seconds: float,
    device: str | None,
) -> None:
    """Try the trained model in RUN in the browser: record or upload a sound, ask, and see what its heads read.

    Serves one page on this machine alone. Beside the answer it can show that of the same model without its thinking
    block, or as before training. Nothing is sent anywhere; uploads are deleted when it ends. Needs the extra: pip
    install 'coatkit[demo]'.

    \b
    Examples:
      coatkit demo examples/quickstart/runs/quickstart
      coatkit demo RUN --port 8080 --max-seconds 60
    """
    from coatkit.run_folder import RunFolder

    # What is wrong with the call is told before the model is loaded, which takes a while.
    folder = RunFolder(run)
    folder.read_record()
    folder.learnt(step)
    from coatkit.demo import page, server

    bound = server.listen(host, port)
    if host not in server.LOCAL:
        click.echo(
            f"note: anyone who can reach {host} can use the page, which has no password and no encryption", err=True
        )
    page.gradio()
    from coatkit.demo.asking import Asker, Limits

    limits = Limits(
        seconds=max_seconds,
        bytes=round(max_megabytes * 1e6),
        new_tokens=max_new_tokens,
        answer_seconds=max_answer_seconds,
    )
    asker = Asker.of_run(run, step=step, device=device, limits=limits)
    for name, why in asker.unheard.items():
        click.echo(f"note: expert {name!r} cannot run here, so its head is shown without names: {why}", err=True)
    server.serve(asker, bound, host, say=lambda line: click.echo(line))
