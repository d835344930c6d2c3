"""What features say in terms people know: sound classes, pitches, energies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """Features of an expert as something to look at, made by the expert's own frozen parts.

    Attributes:
        name: What is read, e.g. `sound events`.
        values: [A, M, C] of C channels at the thinking positions; meaningless where padded.
        labels: [C] name of each channel.
        unit: Of the values, e.g. `probability`.
        hertz: [C] frequency of each channel, Hz, where channels are frequencies in rising order; else empty.
        threshold: A channel counts as present from this value on, for counting how often two readouts agree.
    """

    name: str
    values: Tensor
    labels: tuple[str, ...]
    unit: str = "probability"
    hertz: tuple[float, ...] = ()
    threshold: float = 0.5

    def of(self, sound: int, positions: int) -> Readout:
        """The readout of one sound without padding, values [positions, C] on the CPU."""
        values = self.values[sound, :positions].detach().float().cpu()
        return Readout(self.name, values, self.labels, self.unit, self.hertz, self.threshold)
