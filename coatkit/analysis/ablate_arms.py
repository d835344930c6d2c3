"""From a study to its arms: every arm a checked training spec for each seed. Imports no torch."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from coatkit.analysis.ablate_study import PAPER, ArmSpec, Study, named
from coatkit.errors import SpecError
from coatkit.plugins import Component
from coatkit.spec import Spec
from coatkit.spec_file import LoadedSpec, load_spec
from coatkit.spec_reader import Path_, near


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        changes: How it differs from the base, `key=value` as for --set.
        baseline: Name of the arm it is compared with; its own for the baseline itself.
        runs: Seed to the checked spec, whose output is in the study's folder.
        overrides: Seed to every `key=value` that makes that spec of the base.
        base: The spec's file.
    """

    name: str
    changes: tuple[str, ...]
    baseline: str
    runs: Mapping[int, LoadedSpec]
    overrides: Mapping[int, tuple[str, ...]]
    base: Path

    @property
    def spec(self) -> Spec:
        return next(iter(self.runs.values())).spec

    @property
    def rows(self) -> int | None:
        """Rows that training takes in all, every time a row is taken counted; None where steps go by tokens."""
        each = [stage.batch.rows for stage in self.spec.stages]
        if any(rows is None for rows in each):
            return None
        return sum(stage.steps * (rows or 0) for stage, rows in zip(self.spec.stages, each, strict=True))

    def parts_from(self, other: Arm) -> list[str]:
        """In which of steps, rows a step, and data the training of another arm is planned otherwise."""
        mine, its = self._budget(), other._budget()
        return [name for name in mine if mine[name] != its[name]]

    def _budget(self) -> dict[str, Any]:
        # Of the first seed: an arm's seeds differ in nothing else.
        loaded, stages = next(iter(self.runs.values())), self.spec.stages
        return {
            "steps": [stage.steps for stage in stages],
            "rows a step": [(stage.batch.rows, stage.batch.tokens) for stage in stages],
            "data": [loaded.rows_of(stage).model_dump_json(exclude={"seed"}) for stage in stages],
        }


def arms_of(study: Study) -> tuple[list[Arm], list[str]]:
    """Every arm of a study in its order, and what is worth saying of them.

    Raises:
        SpecError: If the base is wrong, or with every problem of the arms; names file, line and arm.
    """
    common = [*_texts(study.spec.set), *study.overrides]
    base = load_spec(study.base, common)
    common = [*_named_stages(_pairs(study.spec.set), base.spec, study, ("set",)), *study.overrides]
    base = load_spec(study.base, common)
    notes = [f"base: {note}" for note in base.notes]
    problems: list[str] = []
    planned: list[tuple[str, str, tuple[str, ...], Path_]] = []
    for name, arm, place in _named_arms(study, base):
        try:
            planned.append((name, "", tuple(_changes(arm, base, study, place)), place))
        except SpecError as error:
            problems += error.problems
    planned = [p for one in planned for p in _crossed(one, base, study)]
    if problems:
        raise SpecError(problems)
    names = [name + suffix for name, suffix, _, _ in planned]
    plain = [name for name, *_ in planned]
    wanted = study.spec.baseline or plain[0]
    if wanted not in names and wanted not in plain:
        problems.append(named(study, "baseline", wanted, list(dict.fromkeys([*plain, *names]))))
    found: dict[str, Arm] = {}
    of_preset = {full for full, (*_, place) in zip(names, planned, strict=True) if place == ("preset",)}
    for (_, suffix, changes, place), full in zip(planned, names, strict=True):
        # Within a grid, an arm is compared with the baseline of the same combination.
        against = wanted if wanted in names else wanted + suffix
        made, wrong = _checked(study, full, changes, against, common, place)
        problems += wrong
        if made is None:
            continue
        if (same := next((other for other in found.values() if _alike(other, made)), None)) is not None:
            if not {full, same.name} & of_preset:
                problems.append(study.reader.say(place, f"trains just as the arm {same.name!r}; leave one out"))
                continue
            # What the user named stays.
            gone, stays = (full, same.name) if full in of_preset else (same.name, full)
            notes.append(f"arm {gone!r} of the preset is left out: with this base it is {stays!r}")
            if gone == full:
                continue
            del found[gone]
        found[full] = made
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    lost = [("baseline", arm.baseline) for arm in found.values()]
    lost += [("controls_of", name) for name in study.spec.controls_of or ()]
    if unknown := list(dict.fromkeys(pair for pair in lost if pair[1] not in found)):
        why = {name: "".join(f"; {note}" for note in notes if f" {name!r} " in note) for _, name in unknown}
        raise SpecError([named(study, key, name, list(found)) + why[name] for key, name in unknown])
    return list(found.values()), notes


def controls_of(study: Study, arms: Sequence[Arm]) -> list[str]:
    """Names of the arms whose runs are asked as the study's controls say."""
    if not study.spec.controls:
        return []
    names = [arm.name for arm in arms]
    return study.spec.controls_of or (["all"] if "all" in names else names[-1:])


def _named_arms(study: Study, base: LoadedSpec) -> Iterator[tuple[str, ArmSpec, Path_]]:
    preset = _paper(base) if study.spec.preset == "paper" else {}
    for name, arm in preset.items():
        if name not in study.spec.arms:
            yield name, arm, ("preset",)
    for name, arm in study.spec.arms.items():
        yield name, arm, ("arms", name)
    if not preset and not study.spec.arms:
        yield "base", ArmSpec.model_validate({}), ("grid",)


def _paper(base: LoadedSpec) -> dict[str, ArmSpec]:
    """The paper's arms. Which experts are its "representational" ones is our reading: those whose loss is the distance
    of features alone, so that their classes define no loss of their own."""
    plain = [name for name in base.spec.experts if not own_loss(base.chosen[f"experts.{name}"].component)]
    arms: tuple[dict[str, Any], ...] = (
        {"set": {"thinking": False}},
        {"keep": []},
        {"keep": plain},
        {},
        {"head": "linear"},
    )
    # Where every expert is one of them, the arm is the one with all.
    wanted = [name for name in PAPER if name != "representational" or len(plain) < len(base.spec.experts)]
    return {name: ArmSpec.model_validate(arm) for name, arm in zip(PAPER, arms, strict=True) if name in wanted}


def own_loss(component: Component) -> bool:
    """Whether an expert's class defines a loss of its own, read from its source without running it."""
    # Without its manifest, a plugin's class is found as a user's is.
    source = replace(component, manifest=None).source_file()
    if source is None:
        return False
    classes = {n.name: n for n in ast.walk(ast.parse(source.read_bytes())) if isinstance(n, ast.ClassDef)}
    todo, seen = [component.target.rpartition(":")[2]], set()
    while todo:
        name = todo.pop()
        if name in classes and name not in seen:
            seen.add(name)
            if any(isinstance(n, ast.FunctionDef) and n.name == "loss" for n in classes[name].body):
                return True
            todo += [ast.unparse(parent) for parent in classes[name].bases]
    return False


def _changes(arm: ArmSpec, base: LoadedSpec, study: Study, place: Path_) -> Iterator[str]:
    """An arm as changes to the base: what `set` says comes last."""
    experts = list(base.spec.experts)
    key = "keep" if arm.keep is not None else "drop"
    for name in [*(arm.keep or ()), *arm.drop]:
        if name not in experts:
            raise SpecError([study.reader.say((*place, key), f"the base has no expert {name!r}{near(name, experts)}")])
    gone = arm.drop if arm.keep is None else [name for name in experts if name not in arm.keep]
    for i, stage in enumerate(base.spec.stages):
        yield from (f"stages.{i}.weights.{name}=0" for name in gone if name in stage.active)
    if arm.head is not None:
        yield f"head={{use: {_text(arm.head)}}}"
        # An expert's own head would stand before it.
        yield from (
            f"experts.{name}.head=null" for name, expert in base.spec.experts.items() if expert.head is not None
        )
    yield from _named_stages(_pairs(arm.set), base.spec, study, (*place, "set"))


def _crossed(
    one: tuple[str, str, tuple[str, ...], Path_], base: LoadedSpec, study: Study
) -> Iterator[tuple[str, str, tuple[str, ...], Path_]]:
    """An arm with every combination of the grid, the combination as a suffix of its name."""
    name, _, changes, place = one
    grid = study.spec.grid
    if not grid:
        yield one
        return
    ends = [key.rpartition(".")[2] for key in grid]
    labels = [end if ends.count(end) == 1 else key for key, end in zip(grid, ends, strict=True)]
    for picks in itertools.product(*(enumerate(values) for values in grid.values())):
        suffix = "".join(f"+{label}={_short(value, i)}" for label, (i, value) in zip(labels, picks, strict=True))
        pairs = [(key, value) for key, (_, value) in zip(grid, picks, strict=True)]
        yield name, suffix, (*changes, *_named_stages(pairs, base.spec, study, ("grid",))), place


def _checked(
    study: Study, name: str, changes: tuple[str, ...], baseline: str, common: Sequence[str], place: Path_
) -> tuple[Arm | None, list[str]]:
    """An arm with the spec of each seed, or what is wrong with it."""
    runs, overrides = {}, {}
    for seed in study.spec.seeds:
        output = study.output / "arms" / name / f"seed-{seed}"
        overrides[seed] = (*common, *changes, f"seed={seed}", f"output={_text(str(output))}")
        try:
            runs[seed] = load_spec(study.base, overrides[seed])
        except SpecError as error:
            return None, [study.reader.say(place, f"arm {name!r}: {problem}") for problem in error.problems]
    return Arm(name, changes, baseline, runs, overrides, study.base), []


def _alike(one: Arm, other: Arm) -> bool:
    specs = [{**next(iter(arm.runs.values())).resolved(), "output": ""} for arm in (one, other)]
    for spec in specs:  # a head nobody has trains nothing
        spec["head"] = {} if all(expert["head"] for expert in spec["experts"].values()) else spec["head"]
    return specs[0] == specs[1]


def _pairs(changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(changes.items())


def _texts(changes: Mapping[str, Any]) -> list[str]:
    """Changes that need no stage's name, so that the base can be read, which has the names."""
    return [f"{key}={_text(value)}" for key, value in changes.items() if not re.match(r"stages\.(?!\d+(\.|$))", key)]


def _named_stages(pairs: Sequence[tuple[str, Any]], base: Spec, study: Study, place: Path_) -> Iterator[str]:
    """Changes with numbers for the names of stages, and one for each stage where `*` stands."""
    names = [stage.name for stage in base.stages]
    for key, value in pairs:
        text, rest = _text(value), key.removeprefix("stages.")
        if rest == key or re.match(r"\d+(\.|$)", rest):
            yield f"{key}={text}"
        elif rest.startswith("*."):
            yield from (f"stages.{i}.{rest[2:]}={text}" for i in range(len(names)))
        elif (i := next((i for i, name in enumerate(names) if rest.startswith(f"{name}.")), None)) is not None:
            yield f"stages.{i}.{rest[len(names[i]) + 1 :]}={text}"
        else:
            word = rest.partition(".")[0]
            raise SpecError([study.reader.say((*place, key), f"the base has no stage {word!r}{near(word, names)}")])


def _text(value: Any) -> str:
    """A value as YAML on one line; JSON would write numbers that YAML reads as text."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return dumped.removesuffix("...\n").strip()


def _short(value: Any, index: int) -> str:
    """A value within a folder's name; its number where it does not fit."""
    text = _text(value)
    return text if re.fullmatch(r"[A-Za-z0-9._-]{1,24}", text) else str(index)
