"""`coatkit schema`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("of", type=click.Choice(["spec", "suite", "ablation"]), default="spec")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to this file instead of the screen.")
def command(of: str, output: Path | None) -> None:
    """Print the JSON Schema of a spec, a suite or an ablation, with the options of the installed plugins.

    An editor with a YAML language server completes and checks a file whose first line names the schema:
    `# yaml-language-server: $schema=coatkit.schema.json`. Make it anew after installing a plugin.

    \b
    Example:
      coatkit schema --output coatkit.schema.json
      coatkit schema suite --output suite.schema.json
    """
    import json

    from coatkit.errors import SpecError
    from coatkit.schema import schema

    text = json.dumps(schema(of), indent=1, ensure_ascii=False)
    if output is None:
        click.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpecError([f"--output {output}: cannot be written: {error.strerror or error}"]) from None
    click.echo(f"{output}: {of} schema")
