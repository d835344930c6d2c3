"""Answers by likelihood: which option's first token is likeliest to begin the answer. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coatkit.errors import DataError, PluginError
from coatkit.evaluation.items import Item, Task
from coatkit.infer import AudioThinker


def likeliest(model: AudioThinker, items: Sequence[Item]) -> list[str]:
    """The option of each row whose first token has the highest probability where the answer begins.

    Options are compared by their first token alone, as they would be written at the start of an answer.

    Raises:
        DataError: If a sound cannot be read, or two options of a row begin with one token; names the row.
        PluginError: If the backbone gives no states before the answer, or has no output embeddings to read them by.
    """
    first = [first_tokens(model, item) for item in items]
    backbone: Any = model.backbone
    if not hasattr(backbone, "stock"):
        raise PluginError(_cannot(backbone))
    with torch.no_grad():
        last = backbone.forward(model.prepare([item.row for item in items])).last
        if last is None:
            raise PluginError(_cannot(backbone))
        output = backbone.stock.get_output_embeddings()
        logits = output(last.to(next(output.parameters()).dtype)).float()
    return [item.choices[int(row[tokens].argmax())] for item, tokens, row in zip(items, first, logits, strict=True)]


def indistinct(tasks: Sequence[Task], model: AudioThinker) -> None:
    """Set aside the rows of tasks by likelihood of which two options begin with one token."""
    for task in tasks:
        if task.spec.metric != "likelihood":
            continue
        good = []
        for item in task.items:
            try:
                first_tokens(model, item)
                good.append(item)
            except DataError as error:
                task.bad.append((item.index, item.row.id, str(error)))
        task.items = good


def first_tokens(model: AudioThinker, item: Item) -> list[int]:
    """The first token of each option of a row.

    Raises:
        DataError: If two options begin with one token.
    """
    tokenizer: Any = model.backbone.preparer.tokenizer  # type: ignore[attr-defined]
    found: dict[int, str] = {}
    for option in item.choices:
        token = tokenizer.encode(option, add_special_tokens=False)[0]
        if token in found:
            raise item.row.fail(
                f"the options {found[token]!r} and {option!r} begin with one token, so likelihood cannot tell"
                " them apart; use other words, or the metric choice"
            )
        found[token] = option
    return list(found)


def _cannot(backbone: Any) -> str:
    return f"{type(backbone).__name__} gives no probabilities of an answer's first token; use the metric choice"
