"""Spoiled plugins: broken metadata and entry points, manifests of wrong types, code that raises, exits, prints or lies.

What they are asked is what every command asks first: the list of plugins. It succeeds whatever one plugin does.
"""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mutate
from harness import Case, shell

_HOOK = "from coatkit import Manifest, hookimpl\n@hookimpl\ndef coatkit_manifests():\n    "
_MANIFEST = 'Manifest(kind="expert", name="fancy{number}", target="m:C", summary="s", frame_rate=50.0, dim=8)'
BODIES = [
    "raise ValueError('x' * 100_000)",
    "raise SystemExit(5)",
    "raise SystemExit('gone')",
    "raise BaseException('odd')",
    "raise GeneratorExit",
    "raise RecursionError",
    "raise MemoryError",
    "raise ExceptionGroup('many', [ValueError(i) for i in range(99)])",
    "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "raise UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'bad')",
    "raise ValueError('\\ud800 \\x1b[2J \\u202e \\0')",
    "raise ValueError('line\\n' * 500)",
    "import no_such_module_of_anyone",
    "import sys; sys.exit()",
    "return None",
    "return 3",
    "return ['text', 3, None]",
    "return [[1]]",
    "yield 1",
    "return {{'a': 1}}",
    "return (x for x in [1/0])",
    "print('spam ' * 200_000); return [" + _MANIFEST + "]",
    "import sys; sys.stderr.write('spam' * 100_000); return [" + _MANIFEST + "]",
    "def f(): return f()\n    return f()",
]
FIELDS = [
    *(
        'kind="model"',
        "kind=None",
        'name=""',
        "name=3",
        'name="../x"',
        'name="a/b"',
        'name="\\ud800"',
        'name="\\u202e"',
    ),
    *('target="none"', "target=3", 'target=":"', "target=None", 'target="a:b:c"', 'summary=b"x"', "summary=None"),
    *(
        'summary="\\x1b[2J"',
        'summary="<script>" * 9000',
        'summary="a\\nb"',
        'options="x"',
        "options=3",
        'options="a:b"',
    ),
    *(
        'frame_rate="fast"',
        "frame_rate=-1.0",
        'frame_rate=float("nan")',
        "frame_rate=[]",
        'dim="wide"',
        "dim=-1",
        "dim=2**80",
    ),
    *(
        "assets=3",
        "assets=[1]",
        'assets=("x",)',
        "weights_licence=None",
        "weights_licence=3",
        "sample_rate={}",
        "citation=0",
    ),
    *('name="n" * 5000', "code_licence=object()", 'flops_per_second="many"', "none_such=1"),
]


def _source(draw: random.Random, number: int) -> str:
    way, manifest = draw.random(), _MANIFEST.replace("{number}", str(number))
    if way < 0.4:
        return _HOOK + draw.choice(BODIES).replace("{number}", str(number)).replace("{{", "{").replace("}}", "}") + "\n"
    if way < 0.8:
        changes = ", ".join(draw.sample(FIELDS, draw.randrange(1, 3)))
        fields = f'{{**dict(kind="expert", name="fancy{number}", target="m:C"), **dict({changes})}}'
        return f"{_HOOK}return [Manifest(**{fields})]\n"
    if way < 0.9:
        return draw.choice(BODIES[:14]).replace("{{", "{").replace("}}", "}") + "\n"  # while it is imported
    return mutate.text(draw, f"{_HOOK}return [{manifest}]\n").encode("utf-8", "replace").decode()


def plugins(folder: Path, draw: random.Random) -> Iterator[Case]:
    """`coatkit plugins` and `coatkit check` beside a spoiled one."""
    from coatkit.plugins import registry

    site = folder / "site"
    sys.path.insert(0, str(site))
    for number in range(1, 1 << 30):
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir()
        module = f"fuzzed_{number}"
        (site / f"{module}.py").write_text(_source(draw, number))
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n".encode()
        entries = f"[coatkit]\n{module} = {module}\n".encode()
        way = draw.random()
        if way < 0.2:
            metadata = mutate.raw(draw, metadata)
        elif way < 0.4:
            entries = mutate.raw(draw, entries)
        elif way < 0.5:
            names = ("a b", "../x", "\u202eabc", "x" * 500, "a:b", "[x]", "1", "é")
            targets = (
                module,
                f"{module}:x",
                "no.such",
                ":",
                "os:system",
                "a b",
                f"{module}:coatkit_manifests",
                "1:2[x]",
            )
            entries = f"[coatkit]\n{draw.choice(names)} = {draw.choice(targets)}\n".encode()
        if draw.random() < 0.9:
            (info / "METADATA").write_bytes(metadata)
        (info / "entry_points.txt").write_bytes(entries)
        importlib.invalidate_caches()
        registry.cache_clear()
        yield f"plugins {number}", lambda: _listed(site)


def _listed(site: Path) -> None:
    said = shell("plugins")
    assert " mini " in said, "the other plugins are not listed"
    assert len(said) < 40_000, f"{len(said)} characters are listed"
