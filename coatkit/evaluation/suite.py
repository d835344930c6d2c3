"""What is to be evaluated: tasks, each with rows and a metric, from a suite's YAML. Imports no torch."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from coatkit.errors import SpecError
from coatkit.spec_data import Source, SourceSpec, Strict, Text, unit
from coatkit.spec_reader import SpecReader, near

MetricName = Literal["exact", "choice", "likelihood", "f1", "note", "wer", "bleu", "chrf", "judge"]
METRICS: tuple[str, ...] = get_args(MetricName)
WITH_CHOICES = ("choice", "likelihood", "f1")
OPENAI = "https://api.openai.com/v1"
_SECRET = re.compile(r"key|token|secret|password|passwd|auth|bearer|credential", re.IGNORECASE)


def _speakable(names: list[str]) -> list[str]:
    said = Counter(" ".join(name.casefold().split()) for name in names)
    if twice := [name for name, count in said.items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return names


Choices = Annotated[list[Text], Field(min_length=2), AfterValidator(_speakable)]


class TaskSpec(Strict):
    """Rows and how their answers are scored."""

    name: Text = Field(description="what it is called in the results")
    data: Source = Field(description="rows: a path, or a source with format and filter")
    metric: MetricName = Field(description="how answers are scored (docs/evaluation.md)")
    max_new_tokens: int = Field(
        64, ge=1, le=4096, description="longest answer in tokens", json_schema_extra=unit("tokens")
    )
    choices: Choices | None = Field(
        None, description="answers there are, for `choice`, `likelihood` and `f1`; a row's own `choices` come first"
    )
    reference: Text | None = Field(
        None, description="key of a row that holds the right answer; the last assistant message when left out"
    )
    language: Text = Field("en", description="for `wer`: `en` takes Whisper's English normaliser, else its basic one")

    @model_validator(mode="after")
    def _fits(self) -> TaskSpec:
        if self.choices is not None and self.metric not in WITH_CHOICES:
            raise ValueError(f"choices: the metric {self.metric} takes none; {', '.join(WITH_CHOICES)} do")
        return self


class JudgeSpec(Strict):
    """A language model that rates answers, behind an endpoint that speaks OpenAI's chat completions."""

    model: Text = Field(description="its name at the endpoint")
    base_url: Text = Field(OPENAI, description="where it is served: what comes before /chat/completions")
    key_env: Text = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    allow_http: bool = Field(False, description="send the key and the answers unencrypted to another machine")
    concurrency: int = Field(8, ge=1, le=256, description="questions asked at once")
    timeout: float = Field(
        60, gt=0, le=3600, description="longest wait for a reply, in seconds", json_schema_extra=unit("seconds")
    )
    max_retries: int = Field(3, ge=0, le=20, description="tries again when the server is busy, fails or is not reached")
    temperature: float | None = Field(
        0, ge=0, le=2, description="temperature of sampling; null leaves it out, where a model refuses it"
    )
    max_tokens: int | None = Field(
        1024,
        ge=1,
        le=65_536,
        description="longest reply; null leaves it out, where a model refuses it",
        json_schema_extra=unit("tokens"),
    )

    # What might be a key is looked at before anything else, and never repeated.
    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unknown = [key for key in data if key not in cls.model_fields]
        if any(_SECRET.search(key) and not difflib.get_close_matches(key, cls.model_fields, 1, 0.8) for key in unknown):
            raise ValueError(
                "a key does not belong here: set the environment variable OPENAI_API_KEY, or one that key_env names"
            )
        if isinstance(name := data.get("key_env"), str) and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("key_env: must be the name of an environment variable, not the key itself")
        if isinstance(name, str) and not name.upper().endswith("API_KEY"):
            # A suite from somebody else must not send any secret of the environment to any address.
            raise ValueError(f"key_env: {name} does not end in API_KEY; put the judge's key into a variable that does")
        if isinstance(url := data.get("base_url"), str):
            parts = _split(url)
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("base_url: must be the address of an endpoint, such as https://HOST/v1")
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError("base_url: takes no user, password or query; a key comes from the environment")
        return data

    @model_validator(mode="after")
    def _encrypted(self) -> JudgeSpec:
        if self.base_url.lower().startswith("http:") and not (self.allow_http or is_this_machine(self.base_url)):
            raise ValueError(
                "base_url: http sends the key and the answers unencrypted; use https, or say allow_http: true"
            )
        return self


def is_this_machine(url: str) -> bool:
    """Whether an address is one of the machine's own (localhost, 127.0.0.1, ::1)."""
    parts = _split(url)
    host = parts.hostname or "" if parts else ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # a wrong one is told when it is looked at
    except ValueError:
        return None
    return parts


class SuiteSpec(Strict):
    """Tasks that are evaluated together."""

    name: Text | None = Field(None, description="what the results' folder is called; the file's name when left out")
    judge: JudgeSpec | None = Field(None, description="for the metric `judge`: the model that rates answers")
    tasks: list[TaskSpec] = Field(min_length=1, description="what is evaluated")

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str | None) -> str | None:
        if name is not None and (name in (".", "..") or "/" in name or os.sep in name):
            raise ValueError("must be the name of one folder")
        return name

    @field_validator("tasks")
    @classmethod
    def _named_once(cls, tasks: list[TaskSpec]) -> list[TaskSpec]:
        _speakable([task.name for task in tasks])
        return tasks

    @model_validator(mode="after")
    def _judged(self) -> SuiteSpec:
        wanted = [task.name for task in self.tasks if task.metric == "judge"]
        if wanted and self.judge is None:
            raise ValueError(f"judge: missing; task {wanted[0]!r} has the metric judge: say judge: {{model: NAME}}")
        if self.judge is not None and not wanted:
            raise ValueError("judge: no task has the metric judge")
        return self


def read_suite(path: Path, judge: Mapping[str, Any] | None = None) -> SuiteSpec:
    """Read and check a suite; its paths, relative to it in the file, come out absolute.

    Args:
        judge: Keys put over those of the suite's `judge`; from `read_options`.

    Raises:
        SpecError: With every problem found, each with its line.
    """
    reader = SpecReader(path)
    data = reader.read()
    if judge:
        block = data.get("judge")
        data["judge"] = {**block, **judge} if isinstance(block, dict) else dict(judge)
        reader.origin |= {("judge", key): "--judge" for key in judge}
    try:
        suite = SuiteSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError([reader.problem(e, SuiteSpec) for e in error.errors()]) from None
    tasks = [task.model_copy(update={"data": _located(task.data, path.resolve().parent)}) for task in suite.tasks]
    return suite.model_copy(update={"tasks": tasks, "name": suite.name or path.stem})


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` of `--judge` as keys and values; `null` is None.

    Raises:
        SpecError: If one is no such pair. It is not repeated: it may be a key.
    """
    found: dict[str, Any] = {}
    for number, text in enumerate(given, 1):
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise SpecError([f"--judge, number {number}: expected KEY=VALUE, such as model=NAME"])
        found[name.strip()] = None if value.strip() == "null" else value.strip()
    return found


def read_judge(given: Mapping[str, Any]) -> JudgeSpec:
    """The judge that `--judge` describes where there is no suite.

    Raises:
        SpecError: With every problem found.
    """
    try:
        return JudgeSpec.model_validate(dict(given))
    except ValidationError as error:
        problems = []
        for e in error.errors():
            name, said = ".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")
            hint = near(name, list(JudgeSpec.model_fields)) if e["type"] == "extra_forbidden" else ""
            said = "unknown key" if hint else "missing; say model=NAME" if e["type"] == "missing" else said
            problems.append(f"--judge {name}: {said}{hint}" if name else f"--judge: {said}")
        raise SpecError(problems) from None


def _located(source: SourceSpec, folder: Path) -> SourceSpec:
    return source.model_copy(update={"path": str(folder / os.path.expanduser(source.path))})
