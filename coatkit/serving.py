"""Asking a served run: a client of any server that speaks OpenAI's chat completions with audio."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from coatkit.data import audio as sound
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError, RunError
from coatkit.evaluation.text import library

RATE = 16_000
"""Sample rate that sounds are sent at, Hz: what all backbones here hear."""
_SHOWN = 500


def ask_server(
    url: str,
    audio: Path | AudioRef | None,
    question: str,
    *,
    model: str | None = None,
    history: Sequence[tuple[Path | AudioRef | None, str, str]] = (),
    max_new_tokens: int = 64,
    audio_think_len: int | Sequence[int] | None = None,
    timeout: float = 300.0,
) -> str:
    """The answer of a server to one question, decoded greedily.

    The sound is decoded, made mono and resampled here, as in training, and sent as float32 WAV at 16 kHz.

    Args:
        url: Of the server, with or without `/v1`.
        audio: None asks about text alone.
        model: Its name on the server; the first the server lists when left out.
        history: The turns before it, the earliest first: (sound or None, question, answer).
        audio_think_len: Thinking positions of the block, or of each block of a conversation, for a server that does
            not expand it by itself (docs/serving.md has the formula).
        timeout: Seconds to wait for the answer.

    Raises:
        DataError: If the question is empty or the sound cannot be read.
        RunError: If the server cannot be reached or refuses; says what it said.
        PluginError: If openai is not installed.
    """
    length = list(audio_think_len) if isinstance(audio_think_len, Sequence) else audio_think_len
    extra = {} if length is None else {"chat_template_kwargs": {"audio_think_len": length}}
    reply = _asked(url, [*history, (audio, question, None)], model, max_new_tokens, timeout, extra)
    try:
        return (reply.choices[0].message.content or "").strip()
    except (IndexError, AttributeError, TypeError) as error:
        raise RunError(f"{api_of(url)}: does not answer as OpenAI's API does: {error}") from None


def ask_ids(url: str, audio: Path | AudioRef | None, question: str) -> list[int]:
    """The ids of the prompt that a vLLM server makes of a question, its sounds and block expanded.

    Raises:
        RunError: As `ask_server`, or if the server does not tell.
    """
    reply = _asked(url, [(audio, question, None)], None, 1, 300.0, {"return_token_ids": True})
    ids = getattr(reply, "prompt_token_ids", None)
    if not isinstance(ids, list):
        raise RunError(f"{api_of(url)}: does not tell the prompt's ids; vLLM's server does")
    return ids


def api_of(url: str) -> str:
    """A server's address with `/v1`."""
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _asked(
    url: str,
    turns: Sequence[tuple[Path | AudioRef | None, str, str | None]],
    model: str | None,
    max_new_tokens: int,
    timeout: float,
    extra: dict[str, Any],
) -> Any:
    """A server's reply to the last of some turns, which has no answer, as openai gives it; errors as `ask_server`."""
    messages = [message for turn in turns for message in _messages(*turn)]
    openai, base = library("openai", extra="serve"), api_of(url)
    if re.fullmatch(r"https?://(\[[0-9a-fA-F:]+\]|[^/:\s]+)(:\d{1,5})?(/\S*)?", base) is None:
        shown = re.sub(r"//[^/]*@", "//...@", base)  # a password stays out of messages, which are kept in logs
        raise RunError(f"{shown}: is no address of a server; write it like http://localhost:8000, without a password")
    # A server of one's own wants no key; openai will not start without one.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    try:
        with openai.OpenAI(base_url=base, api_key=key, timeout=timeout, max_retries=1) as client:
            name = model or next(iter(client.models.list().data)).id
            return client.chat.completions.create(
                model=name,
                messages=messages,
                max_tokens=max_new_tokens,
                temperature=0,
                extra_body=extra,
            )
    except openai.APIStatusError as error:
        raise RunError(f"{base}: refused ({error.status_code}): {_said(error)}") from None
    except openai.APITimeoutError:
        raise RunError(f"{base}: gave no answer within {timeout:g} s") from None
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise RunError(f"{base}: cannot be reached: {reason}; is the server running?") from None
    except (openai.OpenAIError, StopIteration, IndexError, AttributeError, TypeError, ValueError) as error:
        raise RunError(f"{base}: does not answer as OpenAI's API does: {error or type(error).__name__}") from None


def _messages(audio: Path | AudioRef | None, question: str, answer: str | None) -> list[dict[str, Any]]:
    """A turn as OpenAI's API has it: the sound before the question, then the answer if there is one."""
    if not question.strip():
        raise DataError("the question is empty" if answer is None else "a question of the history is empty")
    if answer is not None and not answer.strip():
        raise DataError("an answer of the history is empty; give what was answered")
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if audio is not None:
        ref = audio if isinstance(audio, AudioRef) else AudioRef(audio)
        data = base64.b64encode(wav(ref)).decode()
        parts.insert(0, {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
    said = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [{"role": "user", "content": parts}, *said]


def wav(ref: AudioRef) -> bytes:
    """A sound as mono float32 WAV at 16 kHz.

    Raises:
        DataError: If it cannot be read.
    """
    samples, rate = sound.read(ref, sound.LONGEST_ASKED)
    file = io.BytesIO()
    soundfile.write(file, sound.resample(samples, rate, RATE), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _said(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error", body)
    text = inner.get("message") if isinstance(inner, dict) else None
    return " ".join(str(text or error.message).split())[:_SHOWN]
