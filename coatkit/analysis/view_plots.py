"""Plots of one sound's thinking: each expert's target above the head's prediction, on one scale and one time axis.

All figures have the same width and the same place for their time axis (`SPAN`), so that one playhead fits them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coatkit.analysis import plots
from coatkit.analysis.agreement import cosines
from coatkit.readout import Readout
from coatkit.thought import Heard

SPAN = (0.2, 0.91)
"""Where time begins and ends, as shares of a figure's width."""
ROWS = 96
"""Rows of a feature map; features that stand together are averaged."""
_WIDTH = 9.0
_TALLEST = 2.0
"""Spreads from the mean at which the colours of a feature map end."""
_SHOWN = 10
"""Classes of a readout that are shown."""
_NAMED = 28
"""Characters of a label."""
_NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


@dataclass(frozen=True)
class _Panel:
    """One plot: `values` [M, R] from below to above as rows, or a line of [M]."""

    title: str
    values: Tensor
    height: float
    low: float
    high: float
    colors: str = "magma"
    ticks: tuple[tuple[float, str], ...] = ()
    axis: str = ""
    bar: str = ""
    against: Tensor | None = None


def expert(name: str, heard: Heard, seconds: float) -> Any:
    """The figure of one expert: readouts where it has them, feature maps, and the cosine at each position.

    Args:
        seconds: Of the sound.

    Raises:
        PluginError: If matplotlib is not installed.
    """
    panels: list[_Panel] = []
    if name in heard.readout:
        panels += _readouts(heard.readout[name], heard.target_readout.get(name))
    panels += _maps(heard.predicted[name], heard.target.get(name))
    if name in heard.target:
        target, predicted = heard.target[name], heard.predicted[name]
        mean = cosines(target.mean(0, keepdim=True).expand_as(target), target)
        values = cosines(predicted, target)
        low = min(0.0, math.floor(10 * float(torch.minimum(values, mean).min())) / 10)
        panels.append(_Panel("cosine of prediction and target", values, 0.9, low, 1.0, against=mean))
    return _figure(panels, heard.rate, seconds)


def overview(heard: Heard | None, samples: np.ndarray, rate: int) -> Any:
    """One figure of all heads under the waveform: readouts where there are any, else how strong the prediction is.

    Args:
        heard: None for a model that thinks nothing; the waveform is drawn then.
        samples: [N] mono, at `rate` Hz.

    Raises:
        PluginError: If matplotlib is not installed.
    """
    seconds = len(samples) / rate
    loudest = max(float(np.abs(samples).max()), 1e-6)
    panels = [_Panel("the sound", torch.zeros(0), 0.75, -loudest, loudest)]
    if heard is not None and len(heard.states):
        for name, readout in heard.readout.items():
            panels += [replace(panel, title=f"{name}: {readout.name}") for panel in _readouts(readout)]
        panels += [_strength(name, found) for name, found in heard.predicted.items() if name not in heard.readout]
    figure = _figure(panels, 1.0 if heard is None else heard.rate, seconds)
    wave = figure.axes[0]
    time, low, high = _envelope(samples, rate)
    wave.fill_between(time, low, high, color=plots.COLORS[0], linewidth=0.4)
    return figure


def _strength(name: str, predicted: Tensor) -> _Panel:
    """How large the predicted features are at each position: an expert without readout says no more that has a name."""
    values = predicted.square().mean(1).sqrt()
    low, high = float(values.min()), float(values.max())
    around = max(0.15 * (high - low), 0.05 * high, 1e-6)  # what hardly changes is not blown up to look like much
    title = f"{name}: strength of the predicted features (root mean square of {predicted.shape[1]:,})"
    return _Panel(title, values, 0.75, max(0.0, low - around), high + around)


def _envelope(samples: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times and the least and greatest sample around each, at most 1,000."""
    edges = np.linspace(0, len(samples), min(len(samples), 1000) + 1).astype(int)[:-1]
    ends = np.append(edges[1:], len(samples))
    return (edges + ends) / 2 / rate, np.minimum.reduceat(samples, edges), np.maximum.reduceat(samples, edges)


def spectrograms(mels: Sequence[tuple[str, Tensor]], frame_rate: float, seconds: float) -> Any:
    """Log-mel spectrograms [T, bands], named, on the scale of the first."""
    first = mels[0][1]
    high = float(first.max())
    low = max(float(first.min()), high - math.log(10) * 3.5)  # 70 dB
    to_db = 20 / math.log(10)
    panels = [
        _Panel(title, mel * to_db, 1.25, low * to_db, high * to_db, ticks=_mel_ticks(mel.shape[1]), axis="Hz", bar="dB")
        for title, mel in mels
    ]
    return _figure(panels, frame_rate, seconds)


def _mel_ticks(bands: int) -> tuple[tuple[float, str], ...]:
    """Where frequencies lie among bands of the HTK scale from 0 to 8 kHz."""
    top = math.log10(1 + 8000 / 700)
    shown = ((250, "250"), (1000, "1k"), (3000, "3k"), (7000, "7k"))
    return tuple((math.log10(1 + hz / 700) / top * (bands + 1) - 1, name) for hz, name in shown)


def order(target: Tensor) -> Tensor:
    """[dim] dimensions such that those that change together stand together.

    Their loadings on the two strongest principal components of the target [M, dim] lie around a circle; the order goes
    once around it. It is one order for target and prediction.
    """
    around = target - target.mean(0)
    around = around / around.std(0, correction=0).clamp(min=1e-6)
    if min(target.shape) < 3:  # no circle to go around
        return around.mean(0).argsort()
    _, _, loadings = torch.linalg.svd(around, full_matrices=False)
    return torch.atan2(loadings[1], loadings[0]).argsort()


def gathered(values: Tensor) -> Tensor:
    """[M, at most `ROWS`] means of neighbouring columns of [M, dim], for a plot has no more rows to show."""
    return torch.stack([part.mean(1) for part in values.tensor_split(min(ROWS, values.shape[1]), 1)], 1)


def _maps(predicted: Tensor, target: Tensor | None) -> list[_Panel]:
    base = predicted if target is None else target
    mean, spread = base.mean(0), base.std(0, correction=0)
    # A feature that hardly changes would otherwise fill its row with colour for nothing.
    spread = spread.clamp(min=0.1 * float(spread.square().mean().sqrt()) + 1e-9)
    dims = order(base)
    of = "its own" if target is None else "the target's"
    style: dict[str, Any] = {"colors": "RdBu_r", "axis": f"{len(dims):,} features", "bar": f"s.d. from {of} mean"}
    shown = [("prediction: features", predicted)]
    if target is not None:
        shown = [("target: features", target), *shown]
    return [
        _Panel(title, gathered(((values - mean) / spread)[:, dims]), 1.35, -_TALLEST, _TALLEST, **style)
        for title, values in shown
    ]


def note_name(midi: int) -> str:
    """A MIDI note as people write it: 69 is A4."""
    return f"{_NOTES[midi % 12]}{midi // 12 - 1}"


def _readouts(predicted: Readout, target: Readout | None = None) -> list[_Panel]:
    both = [predicted] if target is None else [target, predicted]
    shown, ticks, axis, height = _frequencies(both) if predicted.hertz else _classes(both)
    high = max(float(values.max()) for values in shown)
    low = 0.0 if predicted.unit == "probability" else min(float(values.min()) for values in shown)
    high = max(high, 0.05 if predicted.unit == "probability" else low + 1e-6)
    titles = ["prediction"] if target is None else ["target", "prediction"]
    return [
        _Panel(f"{title}: {predicted.name}", values, height, low, high, ticks=ticks, axis=axis, bar=predicted.unit)
        for title, values in zip(titles, shown, strict=True)
    ]


def _classes(both: Sequence[Readout]) -> tuple[list[Tensor], tuple[tuple[float, str], ...], str, float]:
    """The channels that are strongest in either, the target's strongest above."""
    peaks = torch.stack([readout.values.amax(0) for readout in both])
    chosen = peaks.amax(0).argsort(descending=True, stable=True)[:_SHOWN]
    chosen = chosen[peaks[0][chosen].argsort(stable=True)]
    names = [both[0].labels[i] for i in chosen.tolist()]
    ticks = tuple((float(i), n if len(n) <= _NAMED else n[: _NAMED - 1] + "…") for i, n in enumerate(names))
    return [readout.values[:, chosen] for readout in both], ticks, "", 0.35 + 0.17 * len(chosen)


def _frequencies(both: Sequence[Readout]) -> tuple[list[Tensor], tuple[tuple[float, str], ...], str, float]:
    """Whole octaves around what is present in either; every C has a tick, and more notes where octaves are few."""
    hertz = np.asarray(both[0].hertz)
    midi = 69 + 12 * np.log2(hertz / 440)
    peak = torch.stack([readout.values.amax(0) for readout in both]).amax(0)
    loud = np.flatnonzero((peak >= min(both[0].threshold, 0.5 * float(peak.max()))).numpy())
    low, high = math.floor(midi[loud[0]] / 12 - 0.25) * 12, math.ceil(midi[loud[-1]] / 12 + 0.25) * 12
    inside = np.flatnonzero((midi >= low - 0.5) & (midi <= high + 0.5))
    begin, end = int(inside[0]), int(inside[-1]) + 1
    wanted = (0, 2, 4, 5, 7, 9, 11) if high - low <= 12 else (0, 7) if high - low <= 24 else (0,)
    ticks = []
    for note in range(low, high + 1):
        at = float(np.interp(note, midi, np.arange(len(midi)))) - begin
        if note % 12 in wanted and midi[0] - 0.5 <= note <= midi[-1] + 0.5:
            ticks.append((at, note_name(note)))
    return [readout.values[:, begin:end] for readout in both], tuple(ticks), "note", 1.5


def _figure(panels: Sequence[_Panel], rate: float, seconds: float) -> Any:
    gap, top, bottom = 0.38, 0.3, 0.5
    height = top + bottom + sum(panel.height for panel in panels) + gap * (len(panels) - 1)
    figure, axes = plots.figure(
        _WIDTH, height, len(panels), 1, sharex=True, gridspec_kw={"height_ratios": [panel.height for panel in panels]}
    )
    figure.set_layout_engine(None)  # it would choose another place for every figure
    mean = sum(panel.height for panel in panels) / len(panels)
    figure.subplots_adjust(SPAN[0], bottom / height, SPAN[1], 1 - top / height, hspace=gap / mean)
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        axis.set_title(plots.plain(panel.title), loc="left", fontsize=9, pad=4)
        axis.tick_params(labelsize=8)
        if panel.values.ndim == 1:
            _line(axis, panel, rate)
        else:
            _image(axis, panel, rate)
    axes[0, 0].set_xlim(0, seconds)
    axes[-1, 0].set_xlabel("seconds", fontsize=9)
    return figure


def _line(axis: Any, panel: _Panel, rate: float) -> None:
    time = (np.arange(len(panel.values)) + 0.5) / rate
    axis.plot(time, panel.values.numpy(), color=plots.COLORS[0], linewidth=1.6, label="prediction")
    if panel.against is not None:
        label = "the target's mean instead"
        axis.plot(time, panel.against.numpy(), color=plots.COLORS[1], linewidth=1, linestyle="--", label=label)
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
    axis.set_ylim(panel.low, panel.high + 0.02 * (panel.high - panel.low))
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)


def _image(axis: Any, panel: _Panel, rate: float) -> None:
    rows = panel.values.shape[1]
    image = axis.imshow(
        panel.values.T.numpy(),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=panel.colors,
        vmin=panel.low,
        vmax=panel.high,
        extent=(0, len(panel.values) / rate, -0.5, rows - 0.5),
    )
    axis.set_yticks([place for place, _ in panel.ticks], [name for _, name in panel.ticks])
    if panel.axis:
        axis.set_ylabel(panel.axis, fontsize=8)
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((1.015, 0, 0.014, 1)))
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    bar.set_label(panel.bar, fontsize=7)
