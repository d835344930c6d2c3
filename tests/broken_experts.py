"""A good expert, and experts that are broken on purpose: each has one fault that the conformance suite must name."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coatkit import AudioBatch, CoatkitError, Expert, Features, fill_weights, masked_mse, read_weights

HOP = 320


class Good(Expert):
    """A linear map of each 20 ms, with weights drawn at random or read from a file."""

    sample_rate, frame_rate, dim = 16_000, 50.0, 2

    def __init__(self, weights: str = "random") -> None:
        self.weights = weights

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(HOP, 4), nn.Linear(4, 2))

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        net = self.network()
        if self.weights != "random":
            self.read(net, Path(self.weights))
        self.net = net.eval().requires_grad_(False).to(device)

    def read(self, net: nn.Module, path: Path) -> None:
        fill_weights("good", path, net, read_weights("good", path))

    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return samples

    def encode(self, audio: AudioBatch) -> Features:
        samples = self.prepare(audio.samples, audio.lengths)
        frames = -(-audio.lengths // HOP)
        samples = F.pad(samples, (0, int(frames.max()) * HOP - samples.shape[1]))
        values = self.net(samples.unflatten(1, (-1, HOP)))
        beyond = torch.arange(values.shape[1]) >= frames[:, None]
        return Features(values.masked_fill(beyond[..., None], 0.0), frames, self.frame_rate)


class RefusesLong(Good):
    """No fault: it says clearly what it cannot hear."""

    def encode(self, audio: AudioBatch) -> Features:
        if float(audio.seconds.max()) > 20:
            raise CoatkitError("refuses-long: hears 20 s at most")
        return super().encode(audio)


# What is declared


class WrongRate(Good):
    frame_rate = 75.0


class DriftingRate(Good):
    frame_rate = 49.5


class WrongDim(Good):
    dim = 3


class PaddedLengths(Good):
    def encode(self, audio: AudioBatch) -> Features:
        found = super().encode(audio)
        return Features(found.values, found.lengths.max().expand(len(audio)), found.frame_rate)


class LengthsBeyondValues(Good):
    def encode(self, audio: AudioBatch) -> Features:
        found = super().encode(audio)
        return Features(found.values, found.lengths + 1, found.frame_rate)


class BarePlainEncode(Good):
    def encode(self, audio: AudioBatch) -> Features:
        return Features(self.gone, audio.lengths, 50.0)  # type: ignore[attr-defined]


class NothingGoesIn(Good):
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        raise OSError("no libgood.so")


# What encode does


class NotDeterministic(Good):
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        super().load(device, dtype)
        self.own = torch.Generator().manual_seed(0)

    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return samples + 1e-3 * torch.randn(samples.shape, generator=self.own)


class MutatesInput(Good):
    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return samples.mul_(0.5)


class PadsWrongly(Good):
    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return samples / (samples.square().mean(1, keepdim=True).sqrt() + 1e-3)


class SortsByLength(Good):
    def encode(self, audio: AudioBatch) -> Features:
        found = super().encode(audio)
        order = audio.lengths.argsort()
        return Features(found.values[order], found.lengths[order], found.frame_rate)


class NaNOnSilence(Good):
    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return samples / samples.abs().amax(1, keepdim=True)


class NeedsAFrame(Good):
    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return F.avg_pool1d(samples, 10).repeat_interleave(10, 1)


class NoQuietSounds(Good):
    """Refuses what it takes for silence, with an error that names nothing."""

    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        if float(samples.abs().max()) < 0.2:
            raise ValueError("math domain error")
        return samples


class DropsABatchOfOne(Good):
    def encode(self, audio: AudioBatch) -> Features:
        found = super().encode(audio)
        return Features(found.values.squeeze(0), found.lengths, found.frame_rate)


class NoShortFrames(Good):
    def encode(self, audio: AudioBatch) -> Features:
        found = super().encode(audio)
        return Features(found.values, found.lengths.where(found.lengths > 5, 0), found.frame_rate)


class CannotHearLong(Good):
    def encode(self, audio: AudioBatch) -> Features:
        if float(audio.seconds.max()) > 20:
            raise IndexError("position 1001 of 1000")
        return super().encode(audio)


class CachesInInferenceMode(Good):
    """Keeps a tensor of its first call, as an ALiBi bias is kept, and changes it in place later."""

    def encode(self, audio: AudioBatch) -> Features:
        if not hasattr(self, "_kept"):
            self._kept = [torch.zeros(1)]  # in a list: the fingerprint does not see tensors there
        self._kept[0].zero_()
        return super().encode(audio)

    def fingerprint(self) -> str:
        kept = self.__dict__.pop("_kept", None)
        found = super().fingerprint()
        if kept is not None:
            self._kept = kept
        return found


class SeedsGlobally(Good):
    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        torch.manual_seed(0)
        return samples


class SeedsNumpyInInit(Good):
    def __init__(self) -> None:
        super().__init__()
        np.random.seed(0)


class LeavesGradOff(Good):
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        super().load(device, dtype)
        torch.set_grad_enabled(False)


class TrainingMode(Good):
    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(HOP, 2), nn.Dropout(0.5))

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        super().load(device, dtype)
        self.net.train()


# The loss


class TrainableJudge(Good):
    """The frozen classifier inside the loss was not frozen."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        super().load(device, dtype)
        self.judge = nn.Linear(2, 8).eval()

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"judged": masked_mse(self.judge(predicted), self.judge(target).detach(), mask)}


class LeaksOutOfALoss(Good):
    """Nothing is unfrozen after loading; the loss makes a tensor that learns."""

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        scale = torch.ones(2, requires_grad=True)
        return {"mse": masked_mse(predicted * scale, target, mask)}


class LossOverPadding(Good):
    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(predicted, target)}


class LossDividesByPadding(Good):
    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": ((predicted - target).square().mean(-1) * mask).mean()}


class LossOfFirstFrame(Good):
    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": F.mse_loss(predicted[:, 0], target[:, 0])}


class LossWithoutGradient(Good):
    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": masked_mse(predicted.detach(), target, mask)}


class LossIsAVector(Good):
    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": (predicted - target)[mask].square().mean(-1)}


class LossOfOtherThings(Good):
    """The target goes through a nonlinearity, and the prediction does not."""

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": masked_mse(predicted, torch.sigmoid(target), mask)}


class LossZeroesItsTarget(Good):
    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mse": masked_mse(predicted, target.mul_(1.01), mask)}


# Identity


class FingerprintIgnoresWeights(Good):
    def fingerprint(self) -> str:
        return "good, version 1"


class FingerprintOfTheInstance(Good):
    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {id(self)}"


class FingerprintMoves(Good):
    calls = 0

    def encode(self, audio: AudioBatch) -> Features:
        self.calls += 1
        return super().encode(audio)


class FingerprintOfTheProcess(Good):
    """Strings are hashed with another seed in every process."""

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {hash('good')}"


_loads = itertools.count()


class LoadsDiffer(Good):
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        super().load(device, dtype)
        # Not in the fingerprint, so that only the features tell.
        self.shift = (bool(next(_loads)),)

    def prepare(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return samples + 0.1 * self.shift[0]

    def fingerprint(self) -> str:
        shift, self.shift = self.shift, (False,)
        found = super().fingerprint()
        self.shift = shift
        return found


class LooseCheckpoint(Good):
    def read(self, net: nn.Module, path: Path) -> None:
        net.load_state_dict(torch.load(path), strict=False)


class UnreadableCheckpoint(Good):
    def read(self, net: nn.Module, path: Path) -> None:
        net.load_state_dict(read_weights("good", path)["model"])


# Reaching out, alone and in a new process


class DownloadsAtLoad(Good):
    """It copes without a network, so that only a watcher sees it."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        import contextlib
        import urllib.request

        with contextlib.suppress(OSError):
            urllib.request.urlopen("http://weights.example/good.pt", timeout=1)
        super().load(device, dtype)


class FetchesWithWget(Good):
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        import os

        os.system("wget -q http://weights.example/good.pt")
        super().load(device, dtype)


class WritesAtHome(Good):
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        folder = Path.home() / "good_data"
        folder.mkdir(exist_ok=True)
        (folder / "labels.csv").write_text("speech\n")
        super().load(device, dtype)
