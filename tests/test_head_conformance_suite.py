"""The conformance suite for heads: good ones pass, and each broken one fails the checks that name its fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import pytest

from coatkit.testing import HeadConformance
from coatkit.verdict import Report, run_tests

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests" / "broken_heads.py"

FAULTS = {
    "OtherArguments": {"test_loads": "it could not be made with hidden_size 64 and dim 12"},
    "WrongDim": {"test_output_is_as_declared": "forward gave (4, 14, 13); expected (4, 14, 12)"},
    "OneValueForAll": {"test_output_is_as_declared": "forward gave (4, 12); expected (4, 14, 12)"},
    "NaNWithoutPositions": {"test_output_is_as_declared": "NaN or infinite values at a padded position"},
    "FixedLength": {"test_takes_any_length[750]": "forward on 750 position(s) raised IndexError"},
    "OwnWidth": {"test_other_widths": "with hidden_size 128 and dim 13 forward raised RuntimeError"},
    "AlwaysDropsOut": {
        "test_forward_is_repeatable": "the same states again give other values",
        "test_leaves_global_state_alone": "torch's global random state (in forward)",
    },
    "PoolsPadding": {
        "test_padding_changes_nothing": "what stands at padded positions leaks into a sound of 9 positions",
        "test_gradient_reaches_states_and_parameters": "padded states get gradient",
    },
    "DividesByPadding": {
        "test_padding_changes_nothing": "a sound of 9 positions has other values in a batch than alone"
    },
    "MixesSounds": {
        "test_padding_changes_nothing": "has other values in a batch than alone",
        "test_other_sounds_change_nothing": "a sound has other values beside another sound",
    },
    "Constant": {
        "test_states_matter": "24 of 24 positions have the same values for other states",
        "test_gradient_reaches_states_and_parameters": "24 of 24 valid states get no gradient",
    },
    "Detaches": {"test_gradient_reaches_states_and_parameters": "24 of 24 valid states get no gradient"},
    "IdleParameters": {
        "test_gradient_reaches_states_and_parameters": "2 of 6 parameters get no gradient, unused.weight"
    },
    "DrawsFromPython": {"test_seed_fixes_the_start": "two heads made with one seed differ in out.weight"},
    "SeedsGlobally": {"test_leaves_global_state_alone": "it changed Python's global random state (in making it)"},
    "PlainTensor": {
        "test_saves_and_loads": "its state dict gives other values",
        "test_moves_to_another_device": "moved to another device it raises RuntimeError",
    },
    "SharedTensor": {"test_saves_and_loads": "safetensors cannot store it"},
    "FloatsOnly": {"test_computes_in_bfloat16": "with states in bfloat16 under autocast it raises"},
    "ZeroesPadding": {"test_input_is_left_alone": "forward changed hidden in place"},
    "Downloads": {"test_uses_no_network": "look up 'weights.example'"},
}
GOOD = {"Good": "", "RefusesOptions": ""}


def suite_of(name: str) -> str:
    return f"class Test{name}(HeadConformance):\n    name = {f'{BROKEN}:{name}'!r}\n\n"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Report:
    source = "from coatkit.testing import HeadConformance\n\n" + "".join(map(suite_of, [*FAULTS, *GOOD]))
    return run_tests(source, tmp_path_factory.mktemp("heads"), ["-W", "error::pytest.PytestWarning"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_head_fails_the_checks_that_name_its_fault(reports: Report, name: str) -> None:
    found = reports[f"Test{name}"]
    assert {check for check, (outcome, _) in found.items() if outcome not in ("passed", "skipped")} == set(FAULTS[name])
    for check, said in FAULTS[name].items():
        assert said in found[check][1]
        assert f"head '{BROKEN}:{name}': " in found[check][1]
        assert "What to do: " in found[check][1]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_head_passes(reports: Report, name: str) -> None:
    outcomes = {check: outcome for check, (outcome, _) in reports[f"Test{name}"].items()}
    left_out = {"test_entry_module_imports_no_torch"}  # it is no installed plugin
    assert {check for check, outcome in outcomes.items() if outcome != "passed"} == left_out


def test_every_check_is_failed_by_some_broken_head() -> None:
    shared = {"test_entry_module_imports_no_torch", "test_writes_nothing_at_home"}  # tried with experts
    named = {check.partition("[")[0] for faults in FAULTS.values() for check in faults}
    assert named | shared == {name for name in dir(HeadConformance) if name.startswith("test_")}


def test_the_documentation_names_every_check_and_broken_head() -> None:
    text = (ROOT / "docs/testing.md").read_text()
    part = text[text.index("# Testing a head") : text.index("# Testing a backbone")]
    checks = {name for name in dir(HeadConformance) if name.startswith("test_")}
    assert checks <= set(re.findall(r"(test_\w+)", part))
    told = dict(re.findall(r"^\| head \| `(\w+)` \| (.*) \|$", text, re.M))
    assert told == {
        name: ", ".join(dict.fromkeys(c.partition("[")[0] for c in faults)) for name, faults in FAULTS.items()
    }


class TestTransformer(HeadConformance):
    name = "transformer"


class TestTransformerWithDropout(HeadConformance):
    name = "transformer"
    options: ClassVar = {"dropout": 0.1, "heads": 4}


class TestLinear(HeadConformance):
    name = "linear"
