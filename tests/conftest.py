"""Fixtures every test of the core may use: an own cache, small sounds, rows, and a folder that can be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from coatkit.data.rows import AudioRef, Message, Row
from coatkit.spec_file import LoadedSpec, load_spec

RATE = 16_000

LEVEL = '''
import torch
from coatkit import Expert, Features


class Level(Expert):
    """Mean power of each 1/50 s, as two features; hears 8 kHz."""

    sample_rate, frame_rate, dim = 8_000, 50.0, 2

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def encode(self, audio):
        hop = 160
        frames = -(-audio.lengths // hop)
        samples = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * hop - audio.samples.shape[1]))
        power = self.gain * samples.unflatten(1, (-1, hop)).square().mean(-1, keepdim=True)
        return Features(torch.cat([power, -power], -1), frames, self.frame_rate)
'''


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds nothing but what these tests make."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(cache: Path) -> Iterator[None]:
    """The user's cache is neither read nor written; module by module, for the plugins' tests may need the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COATKIT_CACHE", str(cache))
        torch.set_num_threads(1)
        yield


def sound_of(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """A decaying tone in noise, [N] float32."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * random.uniform(150, 1500) * time) * np.exp(-time)
    return (tone + 0.05 * random.normal(size=time.size)).astype(np.float32)


@pytest.fixture(scope="session")
def sound() -> Callable[..., np.ndarray]:
    return sound_of


def row_of(*turns: str, sounds: int = 0, name: str = "row") -> Row:
    """A row of turns, user first; a turn that starts with `system:` is the system's."""
    messages: list[Message] = []
    for turn in turns:
        if turn.startswith("system:"):
            messages.append(Message("system", turn.removeprefix("system:")))
        else:
            spoken = sum(m.role != "system" for m in messages)
            messages.append(Message("assistant" if spoken % 2 else "user", turn))
    return Row(name, tuple(messages), tuple(AudioRef(Path(f"{i}.wav")) for i in range(sounds)), f"data.jsonl:{name}")


@pytest.fixture(scope="session")
def row() -> Callable[..., Row]:
    return row_of


@dataclass
class Run:
    """A run folder, read."""

    folder: Path
    result: Any

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def tensors(self, checkpoint: int = -1, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
        """Tensors of one checkpoint, the last by default."""
        return load_file(self.checkpoints[checkpoint] / file)


@dataclass
class Project:
    """A folder with clips, rows, an expert of the user's own, and a spec of two stages for the tiny backbone."""

    folder: Path
    spec: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "clips").mkdir(parents=True)
        (self.folder / "level.py").write_text(LEVEL)
        for i in range(16):
            suffix = "flac" if i % 2 else "wav"
            self.add_clip(f"r{i:02d}", sound_of(0.1 + 0.025 * i, i), answer=f"clip {i}", suffix=suffix)
        for i in range(4):
            self.add_row(id=f"t{i}", messages=_talk(f"What is {i} plus 1?", str(i + 1)))
        self.spec = {
            "name": "test",
            "seed": 11,
            "backbone": {"use": "mini", "weights": "random", "lora": {"rank": 4, "alpha": 8}},
            "experts": {"audio": {}, "level": {"use": "./level.py:Level"}},
            "head": {"use": "transformer", "heads": 4, "feedforward": 1.0},
            "data": {"train": "train.jsonl"},
            "stages": [
                {"name": "one", "steps": 3, "lr": 2e-3, "batch": {"rows": 5}, "weights": {"audio": 1.0}},
                {
                    "name": "two",
                    "steps": 3,
                    "lr": 2e-3,
                    "batch": {"rows": 5},
                    "weights": {"audio": 0.5, "level": 2.0},
                },
            ],
            "checkpoint": {"every": 100, "keep": 100},
            "output": "run",
        }

    def add_clip(self, name: str, samples: np.ndarray, answer: str = "yes", suffix: str = "wav") -> None:
        """A row that asks about a sound of its own."""
        soundfile.write(self.folder / f"clips/{name}.{suffix}", samples, RATE)
        self.add_row(id=name, messages=_talk("<audio>What is heard?", answer), audio=f"clips/{name}.{suffix}")

    def add_row(self, **row: Any) -> None:
        self.rows.append(row)

    def write(self) -> Path:
        """The spec file, with everything it needs beside it."""
        (self.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(self.spec, sort_keys=False))
        return path

    def load(self, *overrides: str) -> LoadedSpec:
        return load_spec(self.write(), overrides)

    def train(self, *overrides: str, resume: bool = False) -> Run:
        from coatkit.trainer import train

        loaded = self.load(*overrides)
        return Run(loaded.output, train(loaded, resume=resume))


def _talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]


READING = """
    def readout(self, features, mask):
        from coatkit import Readout
        return Readout("level", features.sigmoid(), ("up <b>", "down"))
"""


@pytest.fixture(scope="session")
def stir() -> Callable[..., Any]:
    """Gives adapters an effect: they start at zero, where half of their gradients vanish."""

    def stirred(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        return model

    return stirred


@pytest.fixture(scope="module")
def thinking_run(new_project: Callable[[], Project]) -> Project:
    """A project whose expert `level` has a readout, and its run (`.run`), with every third checkpoint."""
    project = new_project()
    with (project.folder / "level.py").open("a") as stream:
        stream.write(READING)
    project.spec["checkpoint"] = {"every": 3, "keep": 10}
    project.run = project.train()
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def new_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    """Projects for fixtures that outlive a test."""
    return lambda: Project(tmp_path_factory.mktemp("projects") / "project")
