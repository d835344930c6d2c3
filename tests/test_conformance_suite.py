"""The conformance suite for experts: a good one passes, and each broken one fails the checks that name its fault."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

import coatkit.testing
from coatkit.testing import ExpertConformance
from coatkit.testing.guard import Watch, guarded
from coatkit.testing.sounds import FILES
from coatkit.verdict import Report, run_tests

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests" / "broken_experts.py"
NEW_PROCESS = ("test_entry_module_imports_no_torch", "test_works_in_a_fresh_process")
REACHING_OUT = ("test_uses_no_network", "test_writes_nothing_at_home")


def run_suite(folder: Path, source: str, *, without: tuple[str, ...] = (), site: Path | None = None) -> Report:
    """Run pytest on a file as an author would, in a process of its own."""
    words = ["-W", "error::pytest.PytestWarning", "-k", f"not ({' or '.join(without)})" if without else ""]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "" if site is None else str(site)}
    return run_tests(f"from coatkit.testing import ExpertConformance\n\n{source}", folder, words, environment)


def failed(report: Mapping[str, tuple[str, str]]) -> set[str]:
    assert not [text for outcome, text in report.values() if outcome == "error"]
    return {name for name, (outcome, _) in report.items() if outcome == "failed"}


def suite_of(name: str, body: str = "", use: str | None = None) -> str:
    """An author's test class for one of the broken experts, or for `use`."""
    head = f"class Test{name}(ExpertConformance):\n    name = {use or f'{BROKEN}:{name}'!r}\n"
    return f"{head}{textwrap.indent(body, '    ')}\n\n"


# --- one fault, the checks that name it, and what they say

IN_THIS_PROCESS = {
    "WrongRate": {
        "test_features_are_as_declared": "encode's frames cover 1.40 s of a sound of 2.10 s",
        "test_frame_rate_holds_over_a_long_sound": "50.000 per second; the expert declares frame_rate 75",
    },
    "DriftingRate": {
        "test_frame_rate_holds_over_a_long_sound": "50.000 per second; the expert declares frame_rate 49.5"
    },
    "WrongDim": {"test_features_are_as_declared": "encode gave values (4, 105, 2); expected [4, frames, 3] for dim 3"},
    "PaddedLengths": {
        "test_features_are_as_declared": "frames cover 2.10 s of a sound of 0.50 s",
        "test_padding_changes_nothing": "105 frames against 25",
    },
    "LengthsBeyondValues": {"test_features_are_as_declared": "lengths [26, 27, 51, 106] where values hold 105 frames"},
    "BarePlainEncode": {
        "test_features_are_as_declared": "encode raised AttributeError: 'BarePlainEncode' object has no"
    },
    "NothingGoesIn": {"test_loads": "cannot be loaded: OSError: no libgood.so"},
    "NotDeterministic": {"test_encoding_is_repeatable": "encoding the same batch again gives other features"},
    "MutatesInput": {"test_input_is_left_alone": "encode changed audio.samples in place"},
    "PadsWrongly": {
        "test_padding_changes_nothing": "a sound of 0.5 s in a batch padded to 2.1 s has other features than alone"
    },
    "SortsByLength": {"test_order_changes_nothing": "a sound's features depend on its place in the batch"},
    "NaNOnSilence": {"test_hears[silence]": "encode gave NaN or infinite values for silence"},
    "NeedsAFrame": {"test_hears[one_sample]": "encode failed on one sample with a bare RuntimeError"},
    "NoQuietSounds": {
        "test_hears[silence]": "encode failed on silence with a bare ValueError: math domain error",
        "test_hears_file[stereo]": "encode failed on 0.4 s from a file (stereo) with a bare ValueError",
    },
    "DropsABatchOfOne": {
        "test_padding_changes_nothing": "encode gave values (25, 2) for 1 sound(s); expected [1, frames, dim]",
        **{
            f"test_hears[{kind}]": "encode gave values "
            for kind in ("silence", "one_sample", "tenth_of_a_second", "longest")
        },
        **{f"test_hears_file[{kind}]": "encode gave values (20, 2) for 1 sound(s)" for kind in FILES},
    },
    "NoShortFrames": {"test_hears[tenth_of_a_second]": "encode gave no frame for tenth of a second"},
    "CannotHearLong": {"test_hears[longest]": "encode failed on a sound of 30 s with a bare IndexError: position 1001"},
    "CachesInInferenceMode": {
        "test_works_in_every_grad_mode": "encode under torch.no_grad() after a first call under torch.inference_mode()"
    },
    "SeedsGlobally": {"test_leaves_global_state_alone": "it changed torch's global random state (in encode)"},
    "SeedsNumpyInInit": {"test_leaves_global_state_alone": "it changed numpy's global random state (in loading)"},
    "LeavesGradOff": {"test_leaves_global_state_alone": "it changed torch's grad mode (in loading)"},
    "TrainingMode": {
        "test_modules_are_in_eval_mode": "net is in training mode",
        "test_encoding_is_repeatable": "gives other features",
        "test_leaves_global_state_alone": "torch's global random state (in encode)",
    },
    "TrainableJudge": {
        "test_weights_are_frozen": "2 of its tensors require gradient, judge.weight first",
        "test_gradient_stays_out_of_the_teacher": "the loss sends gradient to 2 tensor(s) of the teacher: judge.",
    },
    "LeaksOutOfALoss": {"test_gradient_stays_out_of_the_teacher": "1 tensor(s) of the teacher: a tensor (2,)"},
    "LossOverPadding": {
        "test_loss_ignores_padding": "loss term 'mse' is ",
        "test_gradient_reaches_valid_positions_only": "masked positions get gradient",
    },
    "LossDividesByPadding": {"test_loss_ignores_padding": "with other values and three more masked positions"},
    "LossOfFirstFrame": {"test_gradient_reaches_valid_positions_only": "98 of 102 valid positions get no gradient"},
    "LossWithoutGradient": {"test_gradient_reaches_valid_positions_only": "the loss carries no gradient"},
    "LossIsAVector": {"test_loss_gives_named_scalars": "loss term 'mse' is a tensor of shape (102,), not a scalar"},
    "LossOfOtherThings": {"test_loss_is_least_for_the_target": "the loss of the target itself is "},
    "LossZeroesItsTarget": {"test_loss_leaves_its_arguments_alone": "loss changed target in place"},
    "FingerprintIgnoresWeights": {"test_fingerprint_follows_the_weights": "does not change when net.0.weight changes"},
    "FingerprintOfTheInstance": {"test_fingerprint_is_stable": "two instances with the same options have different"},
    "FingerprintMoves": {"test_fingerprint_is_stable": "its fingerprint changes when it encodes"},
    "LoadsDiffer": {"test_second_load_is_equal": "a second instance with the same options gives other features"},
    "UnreadableCheckpoint": {"test_checkpoint_loads": "its own checkpoint does not load: PluginError: "},
    "LooseCheckpoint": {
        "test_damaged_checkpoint_is_refused[missing]": "0.weight is missing from the checkpoint, and it loads",
        "test_damaged_checkpoint_is_refused[unexpected]": "conformance_extra beside 0.weight, and it loads",
        "test_damaged_checkpoint_is_refused[shape]": "has another shape in the checkpoint, and the error is no",
        "test_damaged_checkpoint_is_refused[truncated]": "cut in half, and the error is no coatkit.AssetError but",
    },
}

CHECKPOINT = """
def checkpoint(self, folder):
    import torch
    from torch import nn
    network = nn.Sequential(nn.Linear(320, 4), nn.Linear(4, 2))
    torch.save(network.state_dict(), folder / "good.pt")
    return folder / "good.pt"
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Every expert whose fault shows in one process, without the checks that start another: that is seconds each."""
    source = "".join(
        suite_of(name, CHECKPOINT if name == "Good" or "Checkpoint" in name else "")
        for name in ("Good", "RefusesLong", *IN_THIS_PROCESS)
    )
    return run_suite(tmp_path_factory.mktemp("broken"), source, without=(*NEW_PROCESS, *REACHING_OUT))


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_a_broken_expert_fails_the_checks_that_name_its_fault(reports: Report, name: str) -> None:
    found = reports[f"Test{name}"]
    assert failed(found) == set(IN_THIS_PROCESS[name])
    for check, said in IN_THIS_PROCESS[name].items():
        text = found[check][1]
        assert said in text
        assert f"expert '{BROKEN}:{name}': " in text
        assert re.search(r"What to do: \w+", text)
        assert "Traceback" not in text


@pytest.mark.parametrize("name", ["Good", "RefusesLong"])
def test_a_good_expert_fails_nothing(reports: Report, name: str) -> None:
    found = reports[f"Test{name}"]
    assert not failed(found)
    assert sum(outcome == "passed" for outcome, _ in found.values()) >= 25


def test_what_is_left_out_says_why(reports: Report) -> None:
    said = {name: text for name, (outcome, text) in reports["TestNothingGoesIn"].items() if outcome == "skipped"}
    assert len(said) >= 25
    assert "it could not be loaded; test_loads says why" in said["test_padding_changes_nothing"]
    assert "override checkpoint(folder) in this class" in reports["TestRefusesLong"]["test_checkpoint_loads"][1]
    assert "cannot be repeated" in reports["TestNotDeterministic"]["test_padding_changes_nothing"][1]


def test_every_check_is_failed_by_some_broken_expert() -> None:
    everything = [*IN_THIS_PROCESS.values(), *REACHES_OUT.values(), *INSTALLED_FAULTS.values()]
    assert {check.partition("[")[0] for faults in everything for check in faults} == checks()


# --- the network, the home folder and new processes

REACHES_OUT = {
    "DownloadsAtLoad": {"test_uses_no_network": "tried to reach the network: look up 'weights.example'"},
    "FetchesWithWget": {
        "test_loads": "OSError: coatkit.testing lets no expert reach the network",
        "test_uses_no_network": "run 'wget -q http://weights.example/good.pt'",
    },
    "WritesAtHome": {"test_writes_nothing_at_home": "wrote to the home folder: ~/good_data, ~/good_data/labels.csv"},
    "FingerprintOfTheProcess": {"test_works_in_a_fresh_process": "its fingerprint is another one in a new process"},
}


@pytest.fixture(scope="module")
def reaching(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_suite(tmp_path_factory.mktemp("reaching"), "".join(suite_of(name) for name in REACHES_OUT))


@pytest.mark.parametrize("name", REACHES_OUT)
def test_reaching_out_is_seen(reaching: Report, name: str) -> None:
    assert failed(reaching[f"Test{name}"]) == set(REACHES_OUT[name])
    for check, said in REACHES_OUT[name].items():
        assert said in reaching[f"Test{name}"][check][1]


ENTRY = """
from coatkit import Manifest, hookimpl
{more}

@hookimpl
def coatkit_manifests():
    return [Manifest(kind="expert", name="{name}", target="{target}", sample_rate=16_000, frame_rate={rate}, dim=2)]
"""
INSTALLED_FAULTS = {
    "Careless": {
        "test_entry_module_imports_no_torch": "importing coatkit_expert_careless imports torch",
        "test_manifest_is_true": "its manifest says frame_rate 25, the loaded expert 50",
    },
    "Downloading": {"test_uses_no_network": "look up 'weights.example'"},
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Plugins laid out as pip does: a good one, and two with faults that only an installed plugin can have."""
    site = tmp_path_factory.mktemp("site")
    (site / "good_code.py").write_text(BROKEN.read_text())
    downloads = "import contextlib, urllib.request\nwith contextlib.suppress(OSError):\n    urllib.request.urlopen("
    (site / "downloading_code.py").write_text(f"{downloads}'http://weights.example/x')\nfrom good_code import Good\n")
    for name, more, target, rate in (
        ("fine", "", "good_code:Good", 50),
        ("careless", "import torch", "good_code:Good", 25),
        ("downloading", "", "downloading_code:Good", 50),
    ):
        module = f"coatkit_expert_{name}"
        (site / f"{module}.py").write_text(ENTRY.format(name=name, more=more, target=target, rate=rate))
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: coatkit-expert-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[coatkit]\n{name} = {module}\n")
    # The author's other tests import the plugin first, so that only a new process sees what an import does.
    source = "import downloading_code\n\n" + "".join(
        suite_of(name.title(), CHECKPOINT, use=name) for name in ("fine", "careless", "downloading")
    )
    env = site / "authors"
    env.mkdir()
    return run_suite(env, source, site=site)


def test_a_good_plugin_passes_every_check(installed: Report) -> None:
    assert {outcome for outcome, _ in installed["TestFine"].values()} == {"passed"}
    assert {name.partition("[")[0] for name in installed["TestFine"]} == checks()


@pytest.mark.parametrize("name", INSTALLED_FAULTS)
def test_faults_of_an_installed_plugin_are_seen(installed: Report, name: str) -> None:
    assert failed(installed[f"Test{name}"]) == set(INSTALLED_FAULTS[name])
    for check, said in INSTALLED_FAULTS[name].items():
        assert said in installed[f"Test{name}"][check][1]


# --- the kit itself


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A user's home, with the temporary folder in it, and an empty one."""
    for name in ("real/tmp", "empty"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "real"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "real" / "tmp"))
    return tmp_path / "real", tmp_path / "empty"


def test_the_guard_sees_what_is_written_at_home(homes: tuple[Path, Path]) -> None:
    real, empty = homes
    watch = Watch()
    (real / "read.txt").write_text("before")
    with guarded(watch, empty):
        (real / "read.txt").read_text()
        (real / "tmp" / "scratch").write_text("none of our business")
        (real / "worked_out_before").write_text("x")
        Path("~/new").expanduser().mkdir()
        os.rename(real / "read.txt", real / "renamed")
    (real / "later").write_text("x")
    assert watch.home == [str(real / "worked_out_before"), "~/new", str(real / "renamed")]
    assert os.environ["HOME"] == str(real)


def test_the_guard_lets_nothing_through_to_the_network(homes: tuple[Path, Path]) -> None:
    watch = Watch()
    with guarded(watch, homes[1]):
        with pytest.raises(OSError, match="connect to 127"), socket.socket() as remote:
            remote.connect(("127.0.0.1", 9))
        with pytest.raises(OSError, match="look up 'localhost'"):
            socket.create_connection(("localhost", 9), timeout=1)
        with pytest.raises(OSError, match="pip download"):
            subprocess.run([sys.executable, "-m", "pip", "download", "torch"])
        with pytest.raises(FileNotFoundError), socket.socket(socket.AF_UNIX) as local:
            local.connect(str(homes[0] / "no such socket"))
        subprocess.run([sys.executable, "-c", ""], check=True)
    command = f"run '{sys.executable} -m pip download torch'"
    assert watch.network == ["connect to 127.0.0.1:9", "look up 'localhost'", command]
    assert socket.getaddrinfo("127.0.0.1", 9)  # outside, nothing is held back


def checks() -> set[str]:
    return {name for name in dir(ExpertConformance) if name.startswith("test_")}


def test_the_documentation_names_every_check_and_setting() -> None:
    text = (ROOT / "docs" / "testing.md").read_text()
    assert set(re.findall(r"`(test_\w+)`", text)) == checks()
    own = {name for name in dir(ExpertConformance) if not name.startswith("_")} - checks()
    settings = {name for name in own if not callable(getattr(ExpertConformance, name))} - {"kind"}
    assert {name for name in settings | {"backbone", "checkpoint"} if f"`{name}" not in text} == set()


def test_the_documentation_names_every_broken_expert() -> None:
    every = {**IN_THIS_PROCESS, **REACHES_OUT, **INSTALLED_FAULTS}
    text = (ROOT / "docs" / "testing.md").read_text()
    told = dict(re.findall(r"^\| expert \| `(\w+)` \| (.*) \|$", text, re.M))
    assert told == {
        name: ", ".join(dict.fromkeys(c.partition("[")[0] for c in faults)) for name, faults in every.items()
    }


def test_the_suite_is_loaded_on_first_use() -> None:
    code = "import sys, coatkit.testing, coatkit.testing.fresh; print('torch' in sys.modules, 'pytest' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="suites: ExpertConformance"):
        coatkit.testing.ExpartConformance  # noqa: B018


def test_pytest_says_which_coatkit_it_is_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import sys\n\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"coatkit: {coatkit.__version__}" in done.stdout


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("coatkit.testing.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match=r"pip install 'coatkit\[testing\]'"):
        coatkit.testing.ExpertConformance  # noqa: B018
