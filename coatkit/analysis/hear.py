"""Hearing what is thought: from the reconstruction expert's features, target or prediction, back to a sound.

A linear map from features (each position's and its neighbours') to log-mel frames of the same time is fitted on the
run's own training clips by ridge regression: linear, so that what is heard was in the features and is not made up by a
strong decoder. Griffin-Lim gives the phase. It is fitted on the expert's features, then given the prediction.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coatkit.data import audio as sound
from coatkit.data.filters import Sieve
from coatkit.data.rows import AudioRef, Row
from coatkit.data.sources import open_data
from coatkit.data.steps import load_batch
from coatkit.errors import DataError, PluginError, foreign_code
from coatkit.evaluation.text import library
from coatkit.files import from_json, written_beside
from coatkit.infer import AudioThinker, asked
from coatkit.spec_data import SourceSpec
from coatkit.spec_file import load_spec
from coatkit.store import sound_key

RATE = 16_000
"""Hz of the sound that is made."""
HOP, FFT, WINDOW, BANDS = 160, 1024, 640, 80
"""Samples between log-mel frames, of the Fourier transform and its window; mel bands from 0 to 8 kHz."""
FLOOR = 1e-4
"""Least mel amplitude; 80 dB below 1."""
CONTEXT = 1
"""Neighbours on each side whose features the map sees too."""
RIDGES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Strengths that are tried, as shares of the number of positions."""
SECONDS = 600.0
"""Of training sound that is fitted on, at most."""
LEAST_CLIPS = 5
_BATCH_SECONDS = 40.0
_QUESTION = "What is heard?"

Decode = Callable[[Tensor, float], Any]
"""From features [M, dim] and positions per second to log-mel frames [T, BANDS], or to (samples [N], sample rate)."""


def log_mel(samples: Any) -> Tensor:
    """Samples [N] at `RATE` to log-mel frames [1 + N // HOP, BANDS]: natural logarithm of the amplitude.

    Raises:
        PluginError: If torchaudio is not installed.
    """
    make = library("torchaudio.transforms").MelSpectrogram(RATE, FFT, WINDOW, HOP, n_mels=BANDS, power=1.0)
    given = torch.as_tensor(samples, dtype=torch.float32)
    # The transform mirrors the ends, so it needs as much sound as its window.
    padded = torch.nn.functional.pad(given, (0, max(0, FFT - len(given))))
    mel: Tensor = make(padded).T[: 1 + len(given) // HOP]
    return mel.clamp(min=FLOOR).log()


def audible(mel: Tensor, samples: int) -> np.ndarray:
    """Log-mel frames [T, BANDS] as `samples` samples at `RATE`, by Griffin-Lim; the same each time.

    Raises:
        PluginError: If torchaudio is not installed.
    """
    amplitude = mel.float().clamp(math.log(FLOOR), 4.0).exp() - FLOOR
    amplitude = torch.nn.functional.pad(amplitude.clamp(min=0), (0, 0, 0, max(0, 1 + FFT // HOP - len(mel))))
    flat = library("torchaudio.transforms").InverseMelScale(FFT // 2 + 1, BANDS, RATE)(amplitude.T)
    window = torch.hann_window(WINDOW)
    with torch.random.fork_rng(devices=[]):  # the phase starts at random
        torch.manual_seed(0)
        made = library("torchaudio.functional").griffinlim(flat, window, FFT, HOP, WINDOW, 1.0, 60, 0.99, None, True)
    out = np.zeros(samples, np.float32)
    out[: min(samples, len(made))] = made[:samples].numpy()
    return out


@dataclass(frozen=True)
class Fit:
    """What a decoder was fitted on and how well it does.

    Attributes:
        r2: Share of the log-mel frames' variance that it explains, on clips it was neither fitted nor chosen on.
        clips: Clips in all; `held_out` of them are what `r2` is of.
        seconds: Of all of them.
        ridge: The strength that did best on further clips that were kept back.
        sounds: Keys of the clips it was fitted on (`coatkit.store.sound_key`).
    """

    r2: float
    clips: int
    held_out: int
    seconds: float
    ridge: float
    sounds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """A linear map from features to log-mel frames.

    Attributes:
        weight: [(2 CONTEXT + 1) dim + 1, frames per position x BANDS]; its last row is added always.
        mean: [dim] that is taken off features before.
        scale: [dim] that they are divided by then.
    """

    weight: Tensor
    mean: Tensor
    scale: Tensor
    fit: Fit

    def __call__(self, features: Tensor, rate: float) -> Tensor:
        """Features [M, dim] at `rate` Hz to log-mel frames [T, BANDS]."""
        out = _seen((features - self.mean) / self.scale) @ self.weight
        where = _frames_of(len(features), rate)
        total = torch.zeros(int(where.max()) + 1, BANDS)
        counts = torch.zeros(len(total), 1)
        total.index_add_(0, where.flatten(), out.view(-1, BANDS))
        counts.index_add_(0, where.flatten(), torch.ones(where.numel(), 1))
        return total / counts


def _frames_of(positions: int, rate: float) -> Tensor:
    """[M, K] log-mel frames that lie in each position; the last may lie in the next too, where K is rounded up."""
    per = RATE / HOP / rate
    first = (torch.arange(positions, dtype=torch.float64) * per + 1e-6).floor().long()
    return first[:, None] + torch.arange(math.ceil(per - 1e-6))


def _seen(features: Tensor) -> Tensor:
    """[M, (2 CONTEXT + 1) dim + 1]: each position's features, its neighbours' (the ends are held), and 1."""
    ends = [features[:1]] * CONTEXT, [features[-1:]] * CONTEXT
    padded = torch.cat([*ends[0], features, *ends[1]])
    shifted = [padded[i : i + len(features)] for i in range(2 * CONTEXT + 1)]
    return torch.cat([*shifted, torch.ones(len(features), 1)], 1)


def _pair(features: Tensor, mel: Tensor, rate: float) -> Tensor:
    """[M, K x BANDS] frames for each position; beyond the sound its last frame is held."""
    return mel[_frames_of(len(features), rate).clamp(max=len(mel) - 1)].flatten(1)


def fit(clips: Sequence[tuple[Tensor, Tensor]], rate: float, keys: Sequence[str] = ()) -> Decoder:
    """Ridge regression from features to log-mel frames, clip by clip held out.

    Args:
        clips: Of each, features [M, dim] at `rate` Hz and its log-mel frames [T, BANDS].
        keys: What each clip is known by.

    Raises:
        DataError: If there are fewer than `LEAST_CLIPS`.
    """
    if len(clips) < LEAST_CLIPS:
        raise DataError(
            f"{len(clips)} clips are too few to fit a decoder on and to hold some out; it takes {LEAST_CLIPS}"
        )
    turn = 10 if len(clips) >= 20 else 5
    parts = [[c for i, c in enumerate(clips) if pick(i % turn)] for pick in _parts(turn)]
    learnt = torch.cat([features for features, _ in parts[0]])
    mean, scale = learnt.mean(0), learnt.std(0).clamp(min=1e-6)
    sides = [_sides(part, mean, scale, rate) for part in parts]
    x, y = (side.double() for side in sides[0])
    square, cross = x.T @ x, x.T @ y
    free = torch.ones(len(square), dtype=torch.float64)
    free[-1] = 0.0  # what is added always costs nothing
    best: tuple[float, float, Tensor] | None = None
    for ridge in RIDGES:
        weight = torch.linalg.solve(square + torch.diag(free * ridge * len(x) + 1e-9), cross).float()
        score = _r2(*sides[1], weight, sides[0][1])
        if best is None or score > best[0]:
            best = (score, ridge, weight)
    assert best is not None
    _, ridge, weight = best
    seconds = sum(len(mel) for _, mel in clips) * HOP / RATE
    used = tuple(key for i, key in enumerate(keys) if _parts(turn)[0](i % turn))
    r2 = _r2(*sides[2], weight, sides[0][1])
    return Decoder(weight, mean, scale, Fit(r2, len(clips), len(parts[2]), seconds, ridge, used))


def _parts(turn: int) -> list[Callable[[int], bool]]:
    """Which clips of a turn are fitted on, choose the ridge, and are held out."""
    return [lambda i: i < turn - 2, lambda i: i == turn - 2, lambda i: i == turn - 1]


def _sides(part: Sequence[tuple[Tensor, Tensor]], mean: Tensor, scale: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    x = torch.cat([_seen((features - mean) / scale) for features, _ in part])
    return x, torch.cat([_pair(features, mel, rate) for features, mel in part])


def _r2(x: Tensor, y: Tensor, weight: Tensor, learnt: Tensor) -> float:
    """Against saying the mean of what was learnt, band by band."""
    return 1 - float((x @ weight - y).square().sum() / (learnt.mean(0) - y).square().sum())


def reconstructing(model: AudioThinker) -> str | None:
    """The expert whose features are the backbone's own; None where the run has none."""
    return next((name for name, expert in model.mind.model.experts.items() if expert.uses_backbone), None)


def decoder_of(model: AudioThinker, name: str, seconds: float = SECONDS, say: Callable[[str], None] = print) -> Decoder:
    """The linear decoder for a run's reconstruction expert: that in RUN/view, or one fitted now and kept there.

    Args:
        name: The expert.
        seconds: Of training sound, at most.
        say: Is told what takes a while.

    Raises:
        DataError: If the run's training data cannot be opened, or holds too few clips.
    """
    assert model.run is not None
    expert = model.mind.model.experts[name]
    data = model.run.read_record().get("data", {})
    settings = [RATE, HOP, FFT, WINDOW, BANDS, FLOOR, CONTEXT, RIDGES, LEAST_CLIPS, 1]
    tied = [expert.fingerprint(), model.step, seconds, data, settings]
    key = hashlib.sha256(json.dumps(tied, sort_keys=True).encode()).hexdigest()
    path = model.run.path / "view" / f"decoder-{name}.safetensors"
    if (kept := _read(path, key)) is not None:
        return kept
    say(f"fitting a linear decoder for {name!r} on training clips, once ...")
    clips, keys = [], []
    for features, mel, known in _clips(model, name, seconds):
        clips.append((features, mel))
        keys.append(known)
    made = fit(clips, model.backbone.preparer.thinking_rate, keys)
    _write(path, key, made, say)
    return made


def _clips(model: AudioThinker, name: str, limit: float) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Features, log-mel frames and key of training clips, in an order of their own, up to `limit` seconds in all."""
    preparer, batch, total, held = model.backbone.preparer, [], 0.0, 0.0
    for ref in _refs(model):
        try:
            seconds = sound.duration(ref)
        except DataError:
            continue
        if preparer.cannot_hear(seconds):
            continue
        if total + seconds > limit and total:
            break
        total, held = total + seconds, held + seconds
        batch.append(ref)
        if held > _BATCH_SECONDS:
            yield from _features(model, name, batch)
            batch, held = [], 0.0
    yield from _features(model, name, batch)


def _refs(model: AudioThinker) -> Iterator[AudioRef]:
    """Sounds of the rows the run was trained on, each once; bad rows are passed over, as training did or would."""
    assert model.run is not None
    loaded, seen, opened = load_spec(model.run.spec, need="components"), set(), set()
    for stage in loaded.spec.stages:
        source = loaded.rows_of(stage)
        if (said := source.model_dump_json()) in opened:
            continue
        opened.add(said)
        rows = open_data(source)
        sieve = Sieve({"filter": source.filter} if isinstance(source, SourceSpec) else {})
        for index in np.random.default_rng(0).permutation(len(rows)):
            try:
                row = rows.row(int(index))
                if not row.audios or not sieve.takes(row):
                    continue
            except DataError:
                continue
            for ref in row.audios:
                if ref not in seen:
                    seen.add(ref)
                    yield ref


@torch.no_grad()
def _features(model: AudioThinker, name: str, refs: Sequence[AudioRef]) -> Iterator[tuple[Tensor, Tensor, str]]:
    rows: list[Row] = []
    heard: list[tuple[sound.Samples, int]] = []
    for ref in refs:
        try:
            samples, rate = sound.read(ref, sound.LONGEST_ASKED)
        except DataError:
            continue  # a file whose end is missing shows only now
        heard.append((samples, rate))
        rows.append(asked(AudioRef(ref.path, samples=(samples, rate)), _QUESTION, f"clip {len(rows)}"))
    if not rows:
        return
    backbone = model.backbone
    batch = load_batch(rows, backbone.preparer, (), sound.LONGEST_ASKED, train=False)
    out, lengths = backbone.forward(batch.inputs), batch.inputs.think_lengths
    if out.audio is None:
        return
    found = model.mind.model.target(name, batch, out.audio, lengths.to(out.audio.lengths.device)).cpu()
    for i, (samples, rate) in enumerate(heard):
        yield found[i, : int(lengths[i])], log_mel(sound.resample(samples, rate, RATE)), sound_key(samples, rate)


def _read(path: Path, key: str) -> Decoder | None:
    """A decoder that was kept; None where there is none, it is damaged, or it was fitted on something else."""
    try:
        with safe_open(path, "pt") as file:
            about = from_json(file.metadata()["coatkit"])
            if about.pop("key") != key:
                return None
            about["sounds"] = tuple(about["sounds"])
            weight, mean, scale = (file.get_tensor(part) for part in ("weight", "mean", "scale"))
            return Decoder(weight, mean, scale, Fit(**about))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _write(path: Path, key: str, made: Decoder, say: Callable[[str], None]) -> None:
    about = json.dumps({"key": key, **asdict(made.fit)})
    tensors = {part: getattr(made, part).contiguous() for part in ("weight", "mean", "scale")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as partial:
            save_file(tensors, partial, {"coatkit": about})
    except OSError as error:
        say(f"note: {path.parent} cannot be written ({error.strerror or error}), so the decoder is not kept")


def own_decoder(use: str) -> Decode:
    """A decoder of the user's: `FILE.py`, whose `decode` is taken, or `FILE.py:NAME`.

    Raises:
        PluginError: If there is no such file or function, or it cannot be imported.
    """
    file, _, name = use.rpartition(":") if use.rpartition(":")[0].endswith(".py") else (use, "", "")
    path, name = Path(file), name or "decode"
    if path.suffix != ".py":
        raise PluginError(
            f"--decoder {use}: a decoder is given as FILE.py with `decode(features, rate)`; a bare checkpoint does"
            " not say what it is to be fed with. docs/analysis.md says how to wrap one, Sim-Whisper's too"
        )
    if not path.is_file():
        raise PluginError(f"--decoder {use}: there is no file {path}")
    with foreign_code(lambda error: f"--decoder {use}: importing it failed: {type(error).__name__}: {error}"):
        spec = importlib.util.spec_from_file_location(f"coatkit_decoder_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    made = getattr(module, name, None)
    if not callable(made):
        raise PluginError(f"--decoder {use}: {path} has no function {name!r}")
    return made  # type: ignore[no-any-return]


def decoded(decode: Decode, features: Tensor, rate: float, samples: int) -> tuple[Tensor, np.ndarray]:
    """Log-mel frames [T, BANDS] and `samples` samples at `RATE` that a decoder makes of features [M, dim].

    Raises:
        PluginError: If a decoder of the user's fails or gives something else.
    """
    with foreign_code(lambda error: f"--decoder: it failed: {type(error).__name__}: {error}"), torch.no_grad():
        made = decode(features, rate)
        if isinstance(made, tuple):
            given = np.asarray(torch.as_tensor(made[0]).cpu(), np.float32).reshape(-1)
            out = np.zeros(samples, np.float32)
            found = sound.resample(given, int(made[1]), RATE)[:samples]
            out[: len(found)] = found
            return log_mel(out), out
        mel = torch.as_tensor(made).float().cpu()
    if mel.ndim != 2 or mel.shape[1] != BANDS or not len(mel) or not bool(mel.isfinite().all()):
        raise PluginError(
            f"--decoder: it gave {tuple(mel.shape)}; wanted are finite log-mel frames [T, {BANDS}] at {RATE // HOP} Hz,"
            " or (samples [N], sample rate)"
        )
    return mel, audible(mel, samples)
