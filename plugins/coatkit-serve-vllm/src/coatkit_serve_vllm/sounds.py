"""Sounds that cannot be decoded are the client's mistake, and answered with a 4xx."""

from __future__ import annotations

from functools import wraps
from typing import Any


def refuse_damaged() -> None:
    """Let vLLM's audio reader raise ValueError where libsndfile refuses a file: else it is an error of the server."""
    from vllm.multimodal.media.audio import AudioMediaIO

    for name in ("load_bytes", "load_base64"):
        setattr(AudioMediaIO, name, _told(getattr(AudioMediaIO, name)))


def _told(read: Any) -> Any:
    if getattr(read, "_coatkit", False):  # vLLM may call plugins twice in a process
        return read

    @wraps(read)
    def reading(*args: Any, **kwargs: Any) -> Any:
        import soundfile

        try:
            return read(*args, **kwargs)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"a sound cannot be decoded: {error.error_string}") from None

    reading._coatkit = True  # type: ignore[attr-defined]
    return reading
