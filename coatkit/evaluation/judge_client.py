"""One question to a judge: a language model behind any endpoint that speaks OpenAI's chat completions.

The key comes from the environment alone. It is taken out of every text that leaves this module, since servers repeat
what they were sent.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from coatkit.errors import CoatkitError
from coatkit.evaluation.rubric import read_rating, rubric_digest
from coatkit.evaluation.suite import OPENAI, JudgeSpec, is_this_machine
from coatkit.evaluation.text import library
from coatkit.files import from_json

_SHOWN = 200
"""Most characters of what a server said that go into a reason."""
_SHORT = 8
"""A key of fewer characters is a word that a local server wants to see, and may stand in any reply."""


class JudgeError(CoatkitError):
    """The judge cannot be asked, or gave no rating at all. What was rated is kept."""


@dataclass(frozen=True)
class Judgement:
    """What came of one question.

    Attributes:
        rating: 0 to 5; None where there is none.
        reason: Why there is none.
        reply: What the judge wrote.
        served: The model that the server says replied.
        reached: Whether the server replied as it should; False for no connection, no time, or an HTTP error.
    """

    rating: int | None = None
    reason: str = ""
    reply: str = ""
    served: str = ""
    reached: bool = True


def judge_identity(spec: JudgeSpec) -> dict[str, Any]:
    """What ratings depend on beside the rows; where the model is served is not part of it."""
    said = {"model": spec.model, "temperature": spec.temperature, "max_tokens": spec.max_tokens}
    return {**said, "rubric": rubric_digest()}


def require_judge(spec: JudgeSpec) -> None:
    """Check that a judge can be asked: the library is there, and the key.

    Raises:
        PluginError: If openai is not installed.
        JudgeError: If there is no key in the environment, or it is not one.
    """
    library("openai", extra="judge")
    _key(spec)


def _key(spec: JudgeSpec) -> str:
    key = os.environ.get(spec.key_env, "").strip()
    if not key and is_this_machine(spec.base_url):
        return "none"  # servers on one's own machine rarely want one, and the library insists on something
    if not key:
        raise JudgeError(f"the judge at {spec.base_url} needs a key: set the environment variable {spec.key_env}")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise JudgeError(f"{spec.key_env} holds characters that no key has, such as a line break; set it again")
    return key


class JudgeClient:
    """Asks one judge; may be used by several threads at once.

    Raises:
        PluginError: If openai is not installed.
        JudgeError: If there is no key.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        self.spec = spec
        self._openai: Any = library("openai", extra="judge")
        self._secret = _key(spec)
        # A proxy of the environment does not lead to this machine, and a key does not follow a redirect.
        http = self._openai.DefaultHttpxClient(trust_env=not is_this_machine(spec.base_url), follow_redirects=False)
        self._client = self._openai.OpenAI(
            api_key=self._secret,
            base_url=spec.base_url,
            timeout=spec.timeout,
            max_retries=spec.max_retries,
            http_client=http,
            **self._own(),
        )

    def _own(self) -> dict[str, Any]:
        """What the library takes from the environment for its own service is for no other."""
        if self.spec.base_url == OPENAI:
            return {}
        names = ("OpenAI-Organization", "OpenAI-Project")
        custom = [line.partition(":")[0].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
        left_out = {name: self._openai.Omit() for name in (*names, *filter(None, custom))}
        return {"organization": "", "project": "", "default_headers": left_out}

    def close(self) -> None:
        self._client.close()

    def ask(self, prompt: str) -> Judgement:
        """The judgement on one prompt; a failure is a judgement without rating.

        Busy servers, server errors and lost connections are tried again by the library, which waits as `Retry-After`
        says, or longer each time.

        Raises:
            JudgeError: If no other question would fare better: the key is refused, or there is no such model.
        """
        wanted: dict[str, Any] = {"model": self.spec.model, "messages": [{"role": "user", "content": prompt}]}
        for name in ("temperature", "max_tokens"):
            if (value := getattr(self.spec, name)) is not None:
                wanted[name] = value
        try:
            # The raw text, for the library takes whatever comes for a completion.
            body = self._client.chat.completions.with_raw_response.create(**wanted).http_response.text
        except self._openai.APITimeoutError:
            return Judgement(reason=f"no reply within {self.spec.timeout:g} s", reached=False)
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            return Judgement(reason=self._said("no connection", str(cause) or type(cause).__name__), reached=False)
        except self._openai.APIStatusError as error:
            self._refuse_hopeless(error)
            reason = self._said(f"HTTP {error.status_code}", error.message)
            return Judgement(reason=reason, reached=error.status_code in (400, 413, 422))
        except self._openai.OpenAIError as error:
            return Judgement(reason=self._said(type(error).__name__, str(error)), reached=False)
        return self._read(body)

    def _refuse_hopeless(self, error: Any) -> None:
        where = f"the judge at {self.spec.base_url}"
        if error.status_code in (401, 403):
            raise JudgeError(
                self._said(f"{where} refuses the key (HTTP {error.status_code})", error.message)
                + f"\n  Set the environment variable {self.spec.key_env} to a key that may use {self.spec.model}."
            )
        if error.status_code == 404:
            what = f"{where} knows no model {self.spec.model!r}, or is no such endpoint (HTTP 404)"
            raise JudgeError(
                self._said(what, error.message)
                + "\n  Set the judge's `model` to one that is served there, and `base_url` to the part before"
                " /chat/completions (it mostly ends in /v1)."
            )

    def _read(self, body: str) -> Judgement:
        try:
            data = from_json(body)
        except ValueError:
            return Judgement(reason=self._said("the reply is not JSON", body), reached=False)
        try:
            choice, served = data["choices"][0], str(data.get("model") or "")
            reply, ended = choice["message"]["content"], choice.get("finish_reason")
        except (AttributeError, KeyError, IndexError, TypeError):
            return Judgement(reason=self._said("the reply is no chat completion", body), reached=False)
        if reply is not None and not isinstance(reply, str):
            return Judgement(reason=self._said("the reply is no chat completion", body), reached=False)
        found = Judgement(reply=self._hidden(reply or ""), served=self._hidden(served))
        # Whatever stands there may go on: 4 may be the start of 4.5.
        limit = f"max_tokens {self.spec.max_tokens}" if self.spec.max_tokens else "the server's limit"
        if ended == "length":
            read: int | str = f"the reply was cut off at {limit}"
        elif ended not in (None, "stop", "eos", "end_turn"):
            read = f"the reply was cut off: {str(ended)[:40]}"
        else:
            read = read_rating(found.reply)
        if isinstance(read, int):
            return Judgement(read, reply=found.reply, served=found.served)
        return Judgement(reason=read, reply=found.reply, served=found.served)

    def _said(self, what: str, detail: str) -> str:
        short = " ".join(self._hidden(detail).split())
        return f"{what}: {short[:_SHOWN]}{'...' if len(short) > _SHOWN else ''}" if short else what

    def _hidden(self, text: str) -> str:
        """The text without the key, and without halves of characters, which no file can hold."""
        text = text.encode("utf-8", "replace").decode()
        if len(self._secret) < _SHORT:
            return text
        for form in (self._secret, json.dumps(self._secret)[1:-1]):
            text = text.replace(form, "***")
        return text
