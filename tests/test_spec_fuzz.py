"""Whatever is done to a spec, it loads or is refused with a SpecError; never another exception."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coatkit.errors import SpecError
from coatkit.spec_file import load_spec

VALID = """\
name: quick
seed: 17
backbone: {use: mini, lora: {rank: 4}}
thinking: {placement: response_prefix, tokens_per_audio_token: 0.5}
experts:
  audio: {target: consumed, head: {use: linear}}
  mine: {use: "./mine.py:Mine", level: 3}
head: {use: transformer, heads: 2}
data: {train: train.jsonl, max_seconds: 30, workers: 2}
stages:
  - {name: one, steps: 10, lr: 1.0e-3, batch: {rows: 2}, weights: {audio: 1.0}}
  - {name: two, steps: 5, lr: {default: 1.0e-3, heads: 2.0e-3}, batch: {tokens: 4096}, weights: {mine: 0.5}}
optimizer: {betas: [0.9, 0.99], clip_norm: 1.0}
output: runs/quick
"""

# Words that mean something somewhere: to YAML, to a path, to the spec, to Python.
WORDS = [
    *("off", "~", "null", "true", ".nan", "-.inf", "1e400", "0x", "1_0", "2020-13-45", "<<", "=", "!!binary", "!!set"),
    *("&a", "*a", "{}", "[]", "[", "}", ":", "- ", "? ", "#", "|", ">", "---", "...", "%YAML 9", "\t", "\0", "\ufeff"),
    *("use", "steps", "weights", "head", "rows", "audio", "mine", "mini", "transformer", "default", "stages", "lora"),
    *("./mine.py:Mine", "./mine.py", "json:X", ":", "a:b:c", "__main__:X", "..", "~/x", "/", "\ud800", "'", '"', "\\"),
]
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS)
    | st.binary(max_size=3)
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    (path / "train.jsonl").write_text("{}\n")
    (path / "mine.py").write_text("class Mine(Expert):\n    def __init__(self, level): ...\n")
    return path


def check(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> bool:
    """Whether the spec is accepted; a refusal must say something, and name its origin."""
    file = folder / "spec.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    problems: list[str] | None = None
    try:
        loaded = load_spec(file, overrides)
        yaml.safe_dump(loaded.resolved())  # what a run writes first
    except SpecError as error:
        problems = error.problems
    assert problems is None or problems, "refused, but not told why"
    assert all(p.startswith((str(file), "--set ")) for p in problems or ())
    return problems is None


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


PLACES = places(yaml.safe_load(VALID))[1:]


def test_the_spec_that_is_mutated_is_valid(folder: Path) -> None:
    assert check(folder, VALID)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    edits=st.lists(st.sampled_from(["cut", "double", "swap", "insert", "drop line"]), min_size=1, max_size=4),
    words=st.lists(st.sampled_from(WORDS) | st.text(max_size=5), min_size=4, max_size=4),
)
def test_mutated_text(folder: Path, seed: int, edits: list[str], words: list[str]) -> None:
    draw = random.Random(seed)
    text = VALID
    for edit, word in zip(edits, words, strict=False):
        at, length = draw.randrange(len(text)), draw.randrange(1, 12)
        if edit == "cut":
            text = text[:at] + text[at + length :]
        elif edit == "double":
            text = text[: at + length] + text[at:]
        elif edit == "swap":
            text = text[:at] + word + text[at + length :]
        elif edit == "insert":
            text = text[:at] + word + text[at:]
        else:
            lines = text.splitlines(keepends=True)
            text = "".join(lines[: at % len(lines)] + lines[at % len(lines) + 1 :]) or VALID
    check(folder, text)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), values), min_size=1, max_size=3))
def test_mutated_values(folder: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    data = yaml.safe_load(VALID)
    for path, value in changes:
        inner = data
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change replaced the place
    check(folder, yaml.safe_dump(data, allow_unicode=False))


@settings(max_examples=150, deadline=None)
@given(
    overrides=st.lists(
        st.text(max_size=20)
        | st.builds(
            lambda path, extra, word: f"{'.'.join(map(str, (*path, *extra)))}={word}",
            st.sampled_from(PLACES),
            st.lists(st.sampled_from(WORDS) | st.integers(-3, 3), max_size=1),
            st.sampled_from(WORDS) | st.text(max_size=8),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_arbitrary_overrides(folder: Path, overrides: list[str]) -> None:
    check(folder, VALID, tuple(overrides))
