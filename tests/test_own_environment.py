"""An expert in another interpreter (coatkit.foreign, coatkit.worker).

The last tests need the environment that `make test-own-env` builds.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from coatkit.build import load_expert
from coatkit.cli import cli
from coatkit.errors import AssetError, PluginError
from coatkit.foreign import ForeignExpert
from coatkit.plugins import Component, registry
from coatkit.protocols import AudioBatch

ROOT = Path(__file__).parents[1]
HERE = Path(sys.executable)
OWN = ROOT / ".own-env/bin/python"
NOTES = "./tests/own_env/notes.py:Notes"

EXPERT = """
import importlib.util, os, signal, subprocess, sys, time
import torch
from coatkit import AssetError, Expert, Features

class Odd(Expert):
    sample_rate, frame_rate, dim = 8_000, 50.0, 2
    upsampling = "repeat"

    def __init__(self, trouble="", gain=1.0):
        self.trouble, self.gain = trouble, gain

    def load(self, device, dtype):
        print("loading", self.trouble)
        if self.trouble == "load":
            raise ValueError("no good weights")
        if self.trouble == "asset":
            raise AssetError("odd: w.pt is not in the cache. Fetch it with: coatkit fetch odd")
        if self.trouble == "leave":
            sys.exit("this package does not like it here")
        if self.trouble == "slow":
            time.sleep(600)
        if self.trouble == "no dim":
            self.dim = None
        if self.trouble == "bare":
            for name in ("pydantic", "pluggy", "transformers", "soundfile", "yaml", "click", "coatkit_expert_mert"):
                assert importlib.util.find_spec(name) is None, name
        self.noise = torch.randn(2)

    def encode(self, audio):
        print("x" * 200_000)  # more than a pipe holds
        print("last words")
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "orphan":
            if os.fork() == 0:
                time.sleep(600)
            os._exit(7)
        if self.trouble == "garbage":
            for descriptor in range(3, 4096):  # the pipe keeps the number it has in the client
                try:
                    os.write(descriptor, b"Epoch 1/3: 100%, loss 0.1")
                except OSError:
                    pass
        if self.trouble == "sleep":
            open(os.path.join(os.path.dirname(__file__), "asleep"), "w").close()
            time.sleep(600)
        size = int(audio.lengths[0])
        if size == 1:
            raise RuntimeError("cannot hear this")
        if size == 2:
            return None
        if size == 3:
            sys.exit(4)
        frames = -(-audio.lengths // 160)
        samples = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * 160 - audio.samples.shape[1]))
        power = self.gain * samples.unflatten(1, (-1, 160)).square().mean(-1, keepdim=True) + self.noise
        if size == 4:
            power = power[..., :1]
        if size == 5:
            frames = frames + 99
        return Features(power, frames, self.frame_rate, offset=-0.001)

class Reads(Odd):
    uses_backbone = True

class Plain:
    pass
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Component]:
    """The user's file; `odd(text)` makes another."""
    folder = tmp_path_factory.mktemp("odd")

    def component(name: str = "Odd", source: str = EXPERT, file: str = "odd.py") -> Component:
        (folder / file).write_text(source)
        return registry().resolve("expert", f"./{file}:{name}", folder)

    return component


@pytest.fixture(scope="module")
def running(odd: Callable[..., Component]) -> Iterator[ForeignExpert]:
    with ForeignExpert(HERE, odd(), {"gain": 2.0}) as expert:
        yield expert


def sounds(*sizes: int, rate: int = 8_000) -> AudioBatch:
    random = np.random.default_rng(0)
    return AudioBatch.from_arrays([random.normal(size=n).astype(np.float32) / 4 for n in sizes], rate)


def venv(folder: Path, *packages: str) -> Path:
    """A real environment that has nothing but links to these entries of this one's site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", place], check=True, capture_output=True, text=True).stdout.strip())
    for package in packages:
        if (found := Path(sysconfig.get_path("purelib"), package)).exists():
            (site / package).symlink_to(found)
    return python


TORCH = (
    *("torch", "torchgen", "functorch", "numpy", "numpy.libs", "nvidia", "cuda", "triton", "typing_extensions.py"),
    *("sympy", "mpmath", "filelock", "jinja2", "markupsafe", "networkx", "fsspec", "setuptools"),
)

PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")


def gone(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process, which may be nobody's child here, has ended within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # nobody's child any more, and process 1 of a container may not care
            return True
        time.sleep(0.05)
    return False


# What it gives


def test_gives_what_the_expert_gives_here(running: ForeignExpert) -> None:
    audio = sounds(8_000, 1_600, 4_001)
    here = load_expert(running.component, {"gain": 2.0}, None, "cpu")
    with torch.no_grad():
        expected = here.encode(audio)
    found = running.encode(audio)
    assert torch.equal(found.values, expected.values)  # its noise, too: both draw from the same start
    assert torch.equal(found.lengths, expected.lengths)
    assert (found.frame_rate, found.offset) == (50.0, -0.001)
    assert found.values.dtype == torch.float32
    assert running.fingerprint == here.fingerprint()
    assert (running.sample_rate, running.frame_rate, running.dim) == (8_000, 50.0, 2)
    assert running.upsampling == "repeat"


def test_a_large_batch_goes_through(running: ForeignExpert) -> None:
    audio = sounds(*[400_000] * 8)
    assert torch.isfinite(running.encode(audio).values).all()
    assert running.encode(sounds(8_000)).values.shape == (1, 50, 2)


def test_a_bare_interpreter_with_torch_and_numpy_is_enough(odd: Callable[..., Component], tmp_path: Path) -> None:
    python = venv(tmp_path / "bare", *TORCH)
    with ForeignExpert(python, odd(), {"trouble": "bare"}) as expert:
        assert expert.encode(sounds(8_000)).values.shape == (1, 50, 2)


def test_a_plugin_needs_what_its_expert_imports_and_no_pluggy(tmp_path: Path) -> None:
    python = venv(tmp_path / "bare", *TORCH, "safetensors", *PYDANTIC)
    component = registry().resolve("expert", "basic-pitch", tmp_path)
    here = load_expert(component, {}, None, "cpu")
    audio = sounds(30_000, 50_000, rate=here.sample_rate)
    with ForeignExpert(python, component, {}) as expert, torch.no_grad():
        assert torch.equal(expert.encode(audio).values, here.encode(audio).values)
        assert expert.fingerprint == here.fingerprint()


def test_a_class_of_a_module_is_found_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/odd_module.py").write_text(
        EXPERT + "\nimport importlib.util\nassert importlib.util.find_spec('odd_neighbour') is None\n"
    )
    (tmp_path / "site/odd_neighbour.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with ForeignExpert(HERE, registry().resolve("expert", "odd_module:Odd", tmp_path), {}) as expert:
        assert expert.dim == 2


def test_ends_with_its_block_and_leaves_nothing(
    odd: Callable[..., Component], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    expert = ForeignExpert(HERE, odd(), {})
    with pytest.raises(PluginError, match="not running; use it as a context manager"):
        expert.encode(sounds(8_000))
    with expert:
        assert expert._process is not None
        pid = expert._process.pid
        assert list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):  # a zombie would still be there
        os.kill(pid, 0)
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(PluginError, match="not running"):
        expert.encode(sounds(8_000))


# What fails before the expert is there


def refusal(python: Path, component: Component, options: dict[str, Any] | None = None, **times: float) -> str:
    with pytest.raises(PluginError) as caught, ForeignExpert(python, component, options or {}, **times):
        pass
    assert component.use in str(caught.value)
    return str(caught.value)


def test_interpreters_that_are_none(odd: Callable[..., Component], tmp_path: Path) -> None:
    assert "is not there; name an interpreter" in refusal(tmp_path / "no/python", odd())
    environment = venv(tmp_path / "empty").parents[1]
    assert f"is a folder; name the interpreter in it, {environment}/bin/python" in refusal(environment, odd())
    (tmp_path / "notes.txt").write_text("hello")
    assert "cannot be run; name an interpreter" in refusal(tmp_path / "notes.txt", odd())
    (tmp_path / "notes.txt").chmod(0o755)
    assert "cannot be run (Exec format error)" in refusal(tmp_path / "notes.txt", odd())
    said = refusal(Path(shutil.which("ls") or "ls"), odd())
    assert "is no Python that coatkit can use: it ended with exit code 2" in said
    assert "the last it printed:\n" in said


def test_an_interpreter_without_torch(odd: Callable[..., Component], tmp_path: Path) -> None:
    python = venv(tmp_path / "empty")
    said = refusal(python, odd())
    assert "has no torch that can be imported (No module named 'torch')" in said
    assert f"{python} -m pip install torch numpy" in said


def test_an_interpreter_that_hangs(odd: Callable[..., Component], tmp_path: Path) -> None:
    python = venv(tmp_path / "empty")
    site = next((tmp_path / "empty/lib").glob("python*/site-packages"))
    (site / "sitecustomize.py").write_text("import time; print('waiting for the disk'); time.sleep(600)\n")
    said = refusal(python, odd(), start_seconds=3.0)
    assert "took more than 3 s to start, and was stopped" in said
    assert "waiting for the disk" in said


def test_an_interpreter_that_is_too_old(odd: Callable[..., Component]) -> None:
    siblings = Path(sys.base_prefix).parent
    known = [Path(f) for n in (7, 8, 9, 10) if (f := shutil.which(f"python3.{n}"))]
    for python in [*known, *sorted(siblings.glob("3.10.*/bin/python3")), *sorted(siblings.glob("3.9.*/bin/python3"))]:
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            assert "there, too, coatkit needs 3.11 or newer" in refusal(python, odd())
            return
    pytest.skip("this machine has no Python older than 3.11")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("Plain", {}, ["cannot be imported", "Plain is not a subclass of coatkit.Expert"]),
        ("Reads", {}, ["it reads the backbone's features, which are not here"]),
        ("Odd", {"gian": 2.0}, ["cannot be made with {'gian': 2.0}", "unexpected keyword argument 'gian'"]),
        ("Odd", {"trouble": "load"}, ["cannot be loaded: ValueError: no good weights", "in load: raise ValueError"]),
        ("Odd", {"trouble": "load"}, ["the last it printed:", "loading load"]),
        ("Odd", {"trouble": "leave"}, ["cannot be loaded: SystemExit: this package does not like it here"]),
        ("Odd", {"trouble": "no dim"}, ["is not complete", "the expert's dim is None; set it to a positive number"]),
        ("Odd", {"gain": torch.ones(1)}, ["the option 'gain' cannot be sent to another interpreter"]),
    ],
)
def test_experts_that_cannot_be_had(
    odd: Callable[..., Component], name: str, options: dict[str, Any], expected: list[str]
) -> None:
    said = refusal(HERE, odd(name), options)
    assert all(part in said for part in expected), said
    assert str(HERE) in said


def test_packages_and_classes_that_are_not_there(odd: Callable[..., Component]) -> None:
    said = refusal(HERE, odd(file="needs.py", source=EXPERT.replace("import torch\n", "import old_toolkit\n")))
    assert "ModuleNotFoundError: No module named 'old_toolkit'" in said
    assert "needs.py:3, in <module>: import old_toolkit" in said
    assert "the package that has 'old_toolkit' is not installed there" in said
    component = odd(file="later.py", source=EXPERT + "\nif 'soundfile' not in dir():\n    del Odd\n")
    assert "there is no 'Odd' in" in refusal(HERE, component)


def test_missing_weights_stay_missing_weights(odd: Callable[..., Component]) -> None:
    with pytest.raises(AssetError, match="coatkit fetch odd"), ForeignExpert(HERE, odd(), {"trouble": "asset"}):
        pass


def test_an_expert_that_takes_too_long_to_load(odd: Callable[..., Component]) -> None:
    assert "took more than 1 s to load the expert" in refusal(HERE, odd(), {"trouble": "slow"}, load_seconds=1.0)


# What fails while it encodes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, r"encode failed: RuntimeError: cannot hear this\n  at .*odd\.py:\d+, in encode: raise RuntimeError"),
        (2, r"encode must give Features, not NoneType"),
        (3, r"encode failed: SystemExit: 4"),
        (4, r"encode gave values \(1, 1, 1\); expected \[1, frames, 2\] for dim 2"),
        (5, r"encode gave lengths \[100\] for 1 sounds of 1 frames at most"),
    ],
)
def test_a_failing_encode_is_told_and_the_expert_lives_on(running: ForeignExpert, size: int, expected: str) -> None:
    with pytest.raises(PluginError, match=expected) as caught:
        running.encode(sounds(size))
    assert running.component.use in str(caught.value)
    assert running.encode(sounds(8_000)).values.shape == (1, 50, 2)


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [("kill", r"was ended by SIGKILL \(was there too little memory\?\)"), ("orphan", r"ended with exit code 7")],
)
def test_a_process_that_dies(odd: Callable[..., Component], trouble: str, expected: str) -> None:
    with ForeignExpert(HERE, odd(), {"trouble": trouble}) as expert:
        assert expert._process is not None
        group = expert._process.pid
        with pytest.raises(PluginError, match=expected) as caught:
            expert.encode(sounds(8_000))
        assert "last words" in str(caught.value)
        with pytest.raises(PluginError):
            expert.encode(sounds(8_000))
    with pytest.raises(ProcessLookupError):  # nor is a program left that it had started
        os.killpg(group, 0) if trouble == "kill" else _until_no_group(group)


def _until_no_group(group: int) -> None:
    for _ in range(200):
        os.killpg(group, 0)
        time.sleep(0.05)


def test_an_expert_that_writes_into_the_pipe(odd: Callable[..., Component]) -> None:
    with ForeignExpert(HERE, odd(), {"trouble": "garbage"}) as expert:
        with pytest.raises(PluginError, match=r"not what coatkit's own code there would send \(b'Epoch 1/'\)"):
            expert.encode(sounds(8_000))
        with pytest.raises(PluginError, match="broken off"):  # what is left in the pipe is nobody's answer
            expert.encode(sounds(8_000))


CLIENT = """
import sys
from pathlib import Path
import numpy as np
from coatkit.foreign import ForeignExpert
from coatkit.plugins import registry
from coatkit.protocols import AudioBatch

component = registry().resolve("expert", "./odd.py:Odd", Path(sys.argv[1]))
with ForeignExpert(Path(sys.executable), component, {"trouble": sys.argv[2]}) as expert:
    print(expert._process.pid, flush=True)
    if sys.argv[2] == "sleep":
        expert.encode(AudioBatch.from_arrays([np.ones(8000, np.float32)], 8000))
    sys.stdin.read()
"""


@pytest.mark.parametrize(("sent", "trouble"), [(signal.SIGINT, "sleep"), (signal.SIGKILL, "")])
def test_the_worker_ends_with_its_client(tmp_path: Path, sent: int, trouble: str) -> None:
    (tmp_path / "odd.py").write_text(EXPERT)
    command = [sys.executable, "-c", CLIENT, str(tmp_path), trouble]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # What is killed cannot tidy up: its temporary folder goes with the test's.
    with subprocess.Popen(command, **pipes, env={**os.environ, "TMPDIR": str(tmp_path)}) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        while trouble and not (tmp_path / "asleep").exists():
            assert client.poll() is None
            time.sleep(0.05)
        client.send_signal(sent)
        _, errors = client.communicate(timeout=60)
    assert gone(pid)
    if sent == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors


# The real thing

real = pytest.mark.skipif(not (ROOT / ".own-env/.installed").exists(), reason="`make test-own-env` builds .own-env")


@real
def test_the_environment_cannot_be_this_one() -> None:
    code = "import importlib.metadata as m; print(m.version('tensorboard'), *m.requires('tensorflow'), sep='\\n')"
    version, *requires = subprocess.check_output([OWN, "-c", code], text=True).splitlines()
    assert version.startswith("2.15.")
    assert any(r.startswith("tensorboard") and "<2.16" in r for r in requires)
    with open(ROOT / "pyproject.toml") as stream:
        assert '"tensorboard>=2.18"' in stream.read()


@real
def test_notes_are_what_the_package_itself_gives(tmp_path: Path, sound: Callable[..., np.ndarray]) -> None:
    rate = 22_050
    time_ = np.arange(rate) / rate
    tone = (0.3 * np.sin(2 * np.pi * 440 * time_)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", tone, rate, subtype="FLOAT")
    code = textwrap.dedent("""
        import sys, numpy
        from basic_pitch import ICASSP_2022_MODEL_PATH
        from basic_pitch.inference import run_inference
        numpy.save(sys.argv[2], run_inference(sys.argv[1], ICASSP_2022_MODEL_PATH)["note"])
    """)
    subprocess.run([OWN, "-c", code, tmp_path / "a.wav", tmp_path / "a.npy"], check=True, capture_output=True)
    upstream = np.load(tmp_path / "a.npy")
    with ForeignExpert(OWN, registry().resolve("expert", NOTES, ROOT), {}) as expert:
        found = expert.encode(AudioBatch.from_arrays([tone, sound(4.0, rate=rate)], rate))
    assert found.values.shape == (2, 345, 88)
    assert found.lengths.tolist() == [87, 345]
    assert len(upstream) == 86  # the package takes 86 frames a second for its trimming
    np.testing.assert_allclose(found.values[0, :86].numpy(), upstream, atol=1e-6)
    assert int(found.values[0, 5:80].mean(0).argmax()) == 48  # A4


@real
def test_its_features_are_stored_and_trained_on(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_ALLOW_CODE", "1")  # the expert's file lies outside the spec's folder
    project.spec["experts"]["notes"] = {"use": f"{ROOT / 'tests/own_env/notes.py'}:Notes"}
    project.spec["stages"][1]["weights"]["notes"] = 1.0
    project.spec["cache"] = ["notes"]
    arguments = ["cache", str(project.write()), "--expert", "notes", "--python", str(OWN), "--yes"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    run = project.train()
    assert any("notes" in key for line in run.metrics for key in line)
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 0, again.output
