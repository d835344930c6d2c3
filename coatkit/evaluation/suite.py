"""What is to be evaluated: tasks, each with rows and a metric, from a suite's YAML. Imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from coatkit.errors import SpecError
from coatkit.spec_data import Source, SourceSpec, Strict, Text
from coatkit.spec_reader import SpecReader

MetricName = Literal["exact", "choice", "f1", "note", "wer", "bleu", "chrf"]
METRICS: tuple[str, ...] = get_args(MetricName)


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
    max_new_tokens: int = Field(64, ge=1, le=4096, description="longest answer in tokens")
    choices: Choices | None = Field(
        None, description="answers there are, for `choice` and `f1`; a row's own `choices` come first"
    )
    reference: Text | None = Field(
        None, description="key of a row that holds the right answer; the last assistant message when left out"
    )
    language: Text = Field("en", description="for `wer`: `en` takes Whisper's English normaliser, else its basic one")

    @model_validator(mode="after")
    def _fits(self) -> TaskSpec:
        if self.choices is not None and self.metric not in ("choice", "f1"):
            raise ValueError(f"choices: the metric {self.metric} takes none; choice and f1 do")
        return self


class SuiteSpec(Strict):
    """Tasks that are evaluated together."""

    name: Text | None = Field(None, description="what the results' folder is called; the file's name when left out")
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


def read_suite(path: Path) -> SuiteSpec:
    """Read and check a suite; its paths, relative to it in the file, come out absolute.

    Raises:
        SpecError: With every problem found, each with its line.
    """
    reader = SpecReader(path)
    data = reader.read()
    try:
        suite = SuiteSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError([reader.problem(e, SuiteSpec) for e in error.errors()]) from None
    tasks = [task.model_copy(update={"data": _located(task.data, path.resolve().parent)}) for task in suite.tasks]
    return suite.model_copy(update={"tasks": tasks, "name": suite.name or path.stem})


def _located(source: SourceSpec, folder: Path) -> SourceSpec:
    return source.model_copy(update={"path": str(folder / os.path.expanduser(source.path))})
