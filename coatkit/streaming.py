"""An answer in pieces, as it is decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from coatkit.protocols import Backbone, Inputs


def pieces(backbone: Backbone, inputs: Inputs, *, max_new_tokens: int, **options: Any) -> Iterator[str]:
    """What `Backbone.generate` answers to the first row, piece by piece; together they are the same text.

    A backbone without a tokenizer of transformers gives its answer in one piece.

    Args:
        inputs: One row.
    """
    tokenizer = getattr(backbone.preparer, "tokenizer", None)
    if tokenizer is None:
        yield backbone.generate(inputs, max_new_tokens=max_new_tokens, **options)[0]
        return
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    nobody = threading.Event()
    failed: list[BaseException] = []

    class Unwanted(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids.new_full((input_ids.shape[0],), nobody.is_set(), dtype=bool)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def decode() -> None:
        try:
            stop = StoppingCriteriaList([Unwanted()])
            backbone.generate(
                inputs, max_new_tokens=max_new_tokens, streamer=streamer, stopping_criteria=stop, **options
            )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    begun, held = False, ""
    try:
        for piece in streamer:
            # White space around an answer is no part of it: what follows decides whether it was inside.
            text = held + piece if begun else piece.lstrip()
            begun = begun or bool(text)
            held = text[len(text.rstrip()) :]
            if text.rstrip():
                yield text.rstrip()
    finally:
        nobody.set()
        thread.join()
    if failed:
        raise failed[0]
