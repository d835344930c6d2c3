"""Filling the feature store: every distinct sound of a spec's rows through an expert or the audio tower, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coatkit import build
from coatkit.align import align
from coatkit.data import audio as sound
from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row, Rows
from coatkit.data.sources import open_data
from coatkit.errors import DataError, foreign_code
from coatkit.features import TOWER, about_expert, about_tower, root_of, source_of
from coatkit.model import check_features
from coatkit.precision import exact_float32
from coatkit.protocols import AudioBatch, Backbone, Expert, Features
from coatkit.recovery import start_worker
from coatkit.spec_data import DataSpec
from coatkit.spec_file import LoadedSpec
from coatkit.store import About, Dtype, StoreWriter, sound_key

_ROWS = 32
"""Rows a data worker reads at a time."""
_SAMPLE = 1000
_GROUP_SECONDS = 120.0
"""Seconds of sound that go through at once on a GPU. On a CPU each sound goes alone, as company gains nothing."""
BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass
class Wanted:
    """One thing to store, and what is known of it before.

    Attributes:
        about: What the features are.
        rows: Where the sounds are.
        seconds: Seconds of sound in the rows, about.
        bytes: What all would take, about; less where sounds come more than once.
    """

    name: str
    about: About
    rows: list[Rows]
    seconds: float
    bytes: float


@dataclass
class Report:
    """What was done for one name: sounds added, sounds known before or met again, and rows that could not be read."""

    name: str
    folder: Path
    added: int = 0
    known: int = 0
    bad: list[str] = field(default_factory=list)


class Extraction:
    """Experts and tower of a spec, ready to be run over its sounds; a context manager.

    Args:
        names: Experts, or `tower`.
        python: Interpreter to run the one named expert in; this one when left out.

    Raises:
        CoatkitError: If a name cannot be stored, or its weights are missing.
    """

    def __init__(
        self, loaded: LoadedSpec, names: Sequence[str], dtype: Dtype, python: Path | None, device: str
    ) -> None:
        self.loaded, self.device, self._open = loaded, torch.device(device), ExitStack()
        self.root = root_of(loaded)
        self.backbone: Backbone | None = None
        self.ratio = 1.0 if loaded.spec.thinking is None else loaded.spec.thinking.tokens_per_audio_token
        self._runs: dict[str, Callable[[list[sound.Samples], int], list[Tensor]]] = {}
        self._rates: dict[str, int] = {}
        try:
            self.rate = self._thinking_rate(TOWER in names)
            self.wanted = [self._want(name, dtype, python) for name in names]
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Extraction:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, wanted: Wanted, watch: Callable[[Iterable[Any], int], Iterable[Any]]) -> Report:
        """Compute and keep what is not there yet.

        Args:
            watch: Wraps an iterable of known length to show how far it is.
        """
        report = Report(wanted.name, wanted.about.folder(self.root))
        data, encode = self.loaded.spec.data, self._runs[wanted.name]
        with StoreWriter(wanted.about, self.root) as writer:
            waiting: list[tuple[str, sound.Samples, float]] = []

            def work() -> None:
                for (key, _, _), values in zip(
                    waiting, encode([samples for _, samples, _ in waiting], self._rates[wanted.name]), strict=True
                ):
                    writer.add(key, values)
                report.added += len(waiting)
                waiting.clear()

            met = set(writer.known)
            readers = [_SoundReader(rows, data, self._rates[wanted.name], frozenset(met)) for rows in wanted.rows]
            count = sum(map(len, readers))
            for found, bad in watch(_read(readers, data.workers), count):
                report.bad += bad
                for key, samples, seconds in found:
                    if key in met:
                        report.known += 1
                        continue
                    met.add(key)
                    waiting.append((key, samples, seconds))
                    if self.device.type == "cpu" or sum(one[2] for one in waiting) >= _GROUP_SECONDS:
                        work()
            if waiting:
                work()
        return report

    def _thinking_rate(self, tower: bool) -> float:
        loaded, spec = self.loaded, self.loaded.spec
        manifest = loaded.chosen["backbone"].component.manifest
        if tower or manifest is None or manifest.frame_rate is None:
            chosen = loaded.chosen["backbone"]
            self.backbone = build.load_backbone(
                chosen.component, chosen.options, spec.thinking, spec.seed, str(self.device)
            )
            self.backbone.model.eval()
            return self.backbone.preparer.thinking_rate
        return manifest.frame_rate * self.ratio

    def _want(self, name: str, dtype: Dtype, python: Path | None) -> Wanted:
        spec = self.loaded.spec
        stages = [stage for stage in spec.stages if name == TOWER or name in stage.active]
        sources = {data.model_dump_json(): data for data in map(self.loaded.rows_of, stages)}
        policy: dict[str, Any] = {"on_bad_row": spec.data.on_bad_row, "max_bad_rows": spec.data.max_bad_rows}
        rows = [open_data(data, **policy) for data in sources.values()]
        about = self._tower(dtype) if name == TOWER else self._expert(name, dtype, python)
        seconds = sum(map(_seconds, rows))
        each = about.identity["dim"] * BYTES[dtype] + (4 if dtype == "int8" else 0)
        return Wanted(name, about, rows, seconds, seconds * about.identity["rate"] * each)

    def _tower(self, dtype: Dtype) -> About:
        backbone = self.backbone
        assert backbone is not None
        about = about_tower(backbone, dtype)
        self._rates[TOWER] = backbone.preparer.sample_rate
        question = (Message("user", f"{AUDIO_TAG}?"),)
        ref = AudioRef(Path("sound"))

        def hear(samples: list[sound.Samples], rate: int) -> list[Tensor]:
            rows = [Row(str(i), question, (ref,)) for i in range(len(samples))]
            inputs = backbone.preparer.prepare(rows, AudioBatch.from_arrays(samples, rate), train=False)
            frames = backbone.hear(inputs)
            return [frames[i, :length] for i, length in enumerate(inputs.audio_lengths.tolist())]

        self._runs[TOWER] = hear
        return about

    def _expert(self, name: str, dtype: Dtype, python: Path | None) -> About:
        chosen = self.loaded.chosen[f"experts.{name}"]
        expert: Any
        if python is not None:
            from coatkit.foreign import ForeignExpert

            expert = self._open.enter_context(ForeignExpert(python, chosen.component, chosen.options))
            about = about_expert(name, expert, self.rate, dtype, source_of(chosen))
        else:
            cls = chosen.component.load_class()
            if getattr(cls, "uses_backbone", False):
                about_expert(name, cls, self.rate, dtype)  # says that it cannot be
            expert = build.load_expert(chosen.component, chosen.options, self.backbone, str(self.device))
            about = about_expert(name, expert, self.rate, dtype)
        self._rates[name] = expert.sample_rate

        def encode(samples: list[sound.Samples], rate: int) -> list[Tensor]:
            audio = AudioBatch.from_arrays(samples, rate).to(self.device)
            # More than the backbone may hear, by one audio token: it rounds their count in its own way.
            spare = max(1, math.ceil(self.ratio))
            lengths = torch.tensor([math.ceil(float(s) * self.rate) + spare for s in audio.seconds], device=self.device)
            describe = f"expert {name!r}: encode failed"
            with torch.no_grad(), exact_float32(self.device), foreign_code(lambda e: f"{describe}: {e}"):
                features: Features = expert.encode(audio)
                if isinstance(expert, Expert):
                    check_features(features, audio, expert)
                values = align(features, lengths.to(features.values.device), self.rate, expert.upsampling)
            return [values[i, :length] for i, length in enumerate(lengths.tolist())]

        self._runs[name] = encode
        return about


class _SoundReader(Dataset[tuple[list[tuple[str, sound.Samples, float]], list[str]]]):
    """Chunks of rows: their sounds that are not known yet, at one sample rate, and what was wrong."""

    def __init__(self, rows: Rows, data: DataSpec, rate: int, known: frozenset[str]) -> None:
        self.rows, self.data, self.rate, self.known = rows, data, rate, known

    def __len__(self) -> int:
        return -(-len(self.rows) // _ROWS)

    def __getitem__(self, chunk: int) -> tuple[list[tuple[str, sound.Samples, float]], list[str]]:
        found: list[tuple[str, sound.Samples, float]] = []
        bad = []
        for i in range(chunk * _ROWS, min((chunk + 1) * _ROWS, len(self.rows))):
            try:
                row = self.rows[i]
            except DataError as error:
                bad.append(str(error))
                continue
            for ref in row.audios:
                try:
                    samples, rate = sound.read(ref, self.data.max_seconds)
                except DataError as error:
                    bad.append(str(row.fail(str(error))))
                    continue
                key = sound_key(samples, rate)
                known = key in self.known
                at_rate = np.zeros(0, np.float32) if known else sound.resample(samples, rate, self.rate)
                found.append((key, at_rate, samples.size / rate))
        return found, bad


def _read(readers: Sequence[_SoundReader], workers: int) -> Iterator[tuple[list[tuple[str, Any, float]], list[str]]]:
    for reader in readers:
        yield from DataLoader(
            reader, batch_size=None, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=start_worker
        )


def _as_it_is(item: Any) -> Any:
    return item


def _seconds(rows: Rows) -> float:
    """Seconds of sound in all rows, from a sample of them."""
    step = max(1, len(rows) // _SAMPLE)
    total = looked = 0.0
    for i in range(0, len(rows), step):
        try:
            total += sum(sound.duration(ref) for ref in rows[i].audios)
        except DataError:
            continue
        looked += 1
    return total / max(1.0, looked) * len(rows)
