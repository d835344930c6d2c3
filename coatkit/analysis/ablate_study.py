"""What an ablation is made of: a base spec, arms that change it, seeds, and a suite. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from coatkit.errors import SpecError
from coatkit.evaluation.suite import SuiteSpec, read_suite
from coatkit.spec_data import Strict, Text
from coatkit.spec_reader import SpecReader, near

Control = Literal["untrained", "vanilla", "text-cot", "shuffled-audio"]
CONTROLS: tuple[str, ...] = get_args(Control)
PAPER = ("sft", "block-only", "representational", "all", "linear-heads")
"""Arms of the preset `paper`."""


def _once(values: list[Any]) -> list[Any]:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return values


class ArmSpec(Strict):
    """How an arm differs from the base."""

    set: dict[Text, Any] = Field({}, description="key of the spec, as for --set, to value; stages by name or * too")
    keep: list[Text] | None = Field(None, description="the only experts that teach; with [] the block is alone")
    drop: list[Text] = Field([], description="experts that do not teach")
    head: Text | None = Field(None, description="head of every expert, with its default options")

    @model_validator(mode="after")
    def _one_of(self) -> ArmSpec:
        if self.keep is not None and self.drop:
            raise ValueError("give either keep or drop")
        return self


def _empty_is_plain(value: Any) -> Any:
    return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value


ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class StudySpec(Strict):
    """A study: arms by seeds, all trained and evaluated alike."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = Field(
        None, description="in the table; the file's name when left out"
    )
    base: Text = Field(description="the spec that every arm changes, relative to this file")
    suite: Text = Field(description="what every arm is evaluated on, relative to this file (docs/evaluation.md)")
    set: dict[Text, Any] = Field({}, description="changes to the base that every arm has")
    preset: Literal["paper"] | None = Field(None, description=f"paper: the arms {', '.join(PAPER)}")
    arms: Annotated[
        dict[ArmName, ArmSpec], BeforeValidator(_empty_is_plain, json_schema_input_type=dict[ArmName, ArmSpec | None])
    ] = Field({}, description="name of an arm to how it differs; beside a preset, or in place of an arm of it")
    grid: dict[Text, Annotated[list[Any], Field(min_length=1), AfterValidator(_once)]] = Field(
        {}, description="key of the spec to values: every arm is trained with every combination"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], AfterValidator(_once)] = Field(
        [0, 1, 2], min_length=1, description="seeds every arm is trained with"
    )
    baseline: Text | None = Field(None, description="arm the others are compared with; the first when left out")
    controls: Annotated[list[Control], AfterValidator(_once)] = Field(
        [], description="further ways to ask: untrained, vanilla, text-cot, shuffled-audio"
    )
    controls_of: Annotated[list[Text], Field(min_length=1), AfterValidator(_once)] | None = Field(
        None, description="arms whose runs are asked so; `all`, or else the last one, when left out"
    )
    batch: int = Field(8, ge=1, description="rows asked together")
    limit: int | None = Field(None, ge=1, description="only the first rows of each task")
    max_thought_tokens: int = Field(256, ge=1, le=4096, description="for text-cot: longest thought in tokens")
    output: Text | None = Field(None, description="folder of the study, relative to this file; runs/NAME when left out")


@dataclass(frozen=True)
class Study:
    """A checked study with its places, absolute.

    Attributes:
        reader: Has the line of every key.
        overrides: Changes of the command line to the base, `key=value`.
    """

    spec: StudySpec
    reader: SpecReader
    name: str
    base: Path
    suite_path: Path
    suite: SuiteSpec
    output: Path
    overrides: tuple[str, ...] = ()


def is_study(path: Path) -> bool:
    """Whether a file is a study and not a training spec: it names a base.

    Raises:
        SpecError: If it cannot be read.
    """
    return "base" in SpecReader(path).read()


def read_study(
    path: Path, *, seeds: Sequence[int] | None = None, out: Path | None = None, overrides: Sequence[str] = ()
) -> Study:
    """Read and check a study file, and the suite it names.

    Args:
        seeds: In place of the study's own.
        out: Folder of the study in place of its own.
        overrides: Changes to the base of the command line, `key=value`.

    Raises:
        SpecError: With every problem found, each with its line.
    """
    reader = SpecReader(path)
    return _study(path, reader, reader.read(), seeds, out, overrides)


def study_of_spec(
    path: Path,
    suite: Path,
    *,
    seeds: Sequence[int] | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
) -> Study:
    """The preset `paper` over a training spec.

    Args:
        seeds: Seeds of each arm; three when left out.
        out: Folder of the study; else `runs/NAME-ablation` beside the spec.

    Raises:
        SpecError: If the suite or the seeds are wrong.
    """
    data = {"name": f"{path.stem}-ablation", "base": path.name, "preset": "paper", "suite": str(suite.absolute())}
    return _study(path, SpecReader(path), data, seeds, out, overrides)


def _study(
    path: Path,
    reader: SpecReader,
    data: dict[str, Any],
    seeds: Sequence[int] | None,
    out: Path | None,
    overrides: Sequence[str],
) -> Study:
    try:
        spec = StudySpec.model_validate(data | ({} if seeds is None else {"seeds": list(seeds)}))
    except ValidationError as error:
        raise SpecError([reader.problem(e, StudySpec) for e in error.errors()]) from None
    problems = []
    if not spec.arms and spec.preset is None and not spec.grid:
        problems.append(reader.say((), "a study needs arms, a grid, or preset: paper"))
    if spec.controls_of is not None and not spec.controls:
        problems.append(reader.say(("controls_of",), f"there are no controls; known: {', '.join(CONTROLS)}"))
    folder = path.resolve().parent
    places = {key: _placed(folder, getattr(spec, key)) for key in ("base", "suite")}
    problems += [
        reader.say((key,), f"there is no file {place}")
        for key, place in places.items()
        if not os.path.isfile(place)  # also of a name the file system cannot hold
    ]
    if problems:
        raise SpecError(problems)
    name = spec.name or path.stem
    output = out.absolute() if out is not None else _placed(folder, spec.output or f"runs/{name}")
    suite = read_suite(places["suite"])
    return Study(spec, reader, name, places["base"], places["suite"], suite, output, tuple(overrides))


def named(study: Study, key: str, name: str, names: Sequence[str]) -> str:
    """The problem that `key` names no arm."""
    at = (key,) if key in study.spec.model_fields_set else ()
    return study.reader.say(at, f"no arm is called {name!r}{near(name, names)}")


def _placed(folder: Path, text: str) -> Path:
    return Path(os.path.realpath(folder / os.path.expanduser(text)))
