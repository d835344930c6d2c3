"""The three things a plugin can be (Expert, Head, Backbone) and the few containers they exchange.

Shapes use these letters: A audios in a batch, B rows, N samples, L frames or positions, T tokens, d features.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coatkit.errors import PluginError
from coatkit.losses import masked_mse
from coatkit.readout import Readout

if TYPE_CHECKING:
    from coatkit.data.rows import Row


@dataclass
class AudioBatch:
    """A batch of mono sounds, zero-padded on the right.

    Attributes:
        samples: [A, N] float32 in about [-1, 1].
        lengths: [A] int64, valid samples of each sound.
        sample_rate: Hz.
        backbone: The backbone's own features of these sounds; filled only for experts with `uses_backbone`.
    """

    samples: Tensor
    lengths: Tensor
    sample_rate: int
    backbone: BackboneAudio | None = None

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray], sample_rate: int) -> AudioBatch:
        """Pad 1-D float arrays, all at `sample_rate` Hz, into a batch.

        Raises:
            ValueError: If there is no array, or one is not 1-D, is empty, or is not finite.
        """
        if not arrays:
            raise ValueError("AudioBatch.from_arrays needs at least one array")
        for i, array in enumerate(arrays):
            if array.ndim != 1 or array.size == 0:
                raise ValueError(f"array {i} has shape {array.shape}; expected a non-empty mono signal [N]")
            if not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"array {i} is {array.dtype}; expected float samples in about [-1, 1]")
            if not np.isfinite(array).all():
                raise ValueError(f"array {i} holds NaN or infinite samples")
        lengths = torch.tensor([a.size for a in arrays])
        samples = torch.zeros(len(arrays), int(lengths.max()))
        for i, array in enumerate(arrays):
            samples[i, : array.size] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        return cls(samples, lengths, sample_rate)

    @property
    def seconds(self) -> Tensor:
        """[A] float64 duration of each sound in seconds."""
        return self.lengths.double() / self.sample_rate

    def to(self, device: torch.device | str) -> AudioBatch:
        backbone = None if self.backbone is None else self.backbone.to(device)
        samples, lengths = (t.to(device, non_blocking=True) for t in (self.samples, self.lengths))
        return AudioBatch(samples, lengths, self.sample_rate, backbone)

    def __len__(self) -> int:
        return self.samples.shape[0]


@dataclass
class Features:
    """Frames of an expert.

    Attributes:
        values: [A, L, d]; what lies beyond a sound's frames is not looked at.
        lengths: [A] int64, valid frames of each sound.
        frame_rate: Frames per second, Hz.
        offset: Time of the start of frame 0 in seconds; frame i covers [offset + i / rate, offset + (i + 1) / rate).
    """

    values: Tensor
    lengths: Tensor
    frame_rate: float
    offset: float = 0.0


@dataclass
class BackboneAudio:
    """The backbone's audio features, per sound: what the language model consumes, and the audio tower's own output.

    Attributes:
        consumed: [A, L, d_model], the embeddings at the audio placeholders.
        tower: [A, L, d_tower], the audio tower's last output at the same positions, or None where not captured.
        lengths: [A] int64, audio tokens of each sound.
        frame_rate: Audio tokens per second, Hz.
    """

    consumed: Tensor
    tower: Tensor | None
    lengths: Tensor
    frame_rate: float

    def to(self, device: torch.device | str) -> BackboneAudio:
        tower = None if self.tower is None else self.tower.to(device)
        return BackboneAudio(self.consumed.to(device), tower, self.lengths.to(device), self.frame_rate)


class Expert(ABC):
    """A frozen audio encoder that teaches: it turns sound into target features and owns the loss against them.

    Subclass it, set `sample_rate`, `frame_rate` and `dim`, and write `encode`. The keyword arguments of `__init__`
    are the options a spec may give. CoAT distils each expert at the thinking positions (paper section 3).
    """

    sample_rate: int = 16_000
    """Hz of the audio that `encode` receives."""
    frame_rate: float
    """Frames per second of `encode`'s output, Hz."""
    dim: int
    """Width of the features that the head predicts."""
    uses_backbone: bool = False
    """True when `encode` reads `audio.backbone` instead of the samples."""
    hears_all: bool = True
    """Whether the frames cover the whole sound; set it to False for an encoder that hears only part, and the last frame
    is held over the rest."""
    upsampling: Literal["linear", "repeat"] = "linear"
    """How frames slower than the thinking positions are spread over them; see `coatkit.align`."""

    def bind(self, backbone: Backbone) -> None:
        """Learn what depends on the backbone, e.g. `dim`. Called once, before `load`. Does nothing by default."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load weights onto a device. Does nothing by default; must never download.

        Raises:
            AssetError: If weights are missing; names the command that fetches them.
        """

    @abstractmethod
    def encode(self, audio: AudioBatch) -> Features:
        """Features of each sound, called under `torch.no_grad()`: values [A, L, dim], lengths [A], frame_rate."""

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Named loss terms of a prediction, each a mean over the positions in `mask`; they are logged, and summed.

        Args:
            predicted: [A, L, dim] head output, float32, with gradient.
            target: [A, L, dim] aligned features, float32, without gradient.
            mask: [A, L] bool, True at valid positions; at least one is.
        """
        return {"mse": masked_mse(predicted, target, mask)}

    def readout(self, features: Tensor, mask: Tensor) -> Readout | None:
        """What features say in terms people know, for looking at a prediction; None where there are no such terms.

        Args:
            features: [A, L, dim], a prediction or a target, float32.
            mask: [A, L] bool, True at valid positions.
        """
        return None

    def fingerprint(self) -> str:
        """Identity of the features: code, settings and weights."""
        digest = hashlib.sha256(type(self).__qualname__.encode())
        for source in _sources(type(self)):
            digest.update(source.read_bytes())
        for key, value in sorted(vars(self).items()):
            if isinstance(value, nn.Module | Tensor):
                tensors = value.state_dict() if isinstance(value, nn.Module) else {"": value}
                for name, tensor in sorted(tensors.items()):
                    digest.update(f"{key}.{name}".encode())
                    flat = tensor.detach().cpu().reshape(-1)  # a scalar, as batch norms hold, has no bytes to view
                    digest.update(flat.contiguous().view(torch.uint8).numpy().tobytes())
            elif isinstance(value, np.ndarray):
                digest.update(f"{key}={value.dtype}{value.shape}".encode() + value.tobytes())
            elif isinstance(value, set):  # in an order that is the same in every process
                digest.update(f"{key}={sorted(map(repr, value))}".encode())
            elif isinstance(value, str | int | float | bool | tuple | list | dict | Path):
                digest.update(f"{key}={value!r}".encode())
        return digest.hexdigest()


def _sources(cls: type) -> list[Path]:
    """The files a class's code is in: its own, and where it is part of a package, all of that package's."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return []
    top = getattr(sys.modules.get(cls.__module__.partition(".")[0]), "__path__", None)
    return sorted(path for folder in top for path in Path(folder).rglob("*.py")) if top else [Path(file)]


class Head(nn.Module, ABC):
    """Projects thinking states to one expert's space (paper section 3).

    A subclass takes `(hidden_size, dim, **options)`: the backbone's width and the expert's.
    """

    @abstractmethod
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[A, L, hidden_size] states and [A, L] bool mask (True = valid) to [A, L, dim]; padding must not leak in."""


@dataclass
class Inputs:
    """A prepared batch, ready for the backbone.

    Attributes:
        tokens: What the model's forward takes by name: `input_ids` [B, T], `attention_mask` [B, T] and audio features.
        labels: [B, T] int64, -100 outside the response; None when generating.
        audio_row: [A] row of each audio.
        audio_index: [A, L] positions of each audio's placeholders in its row, padded with 0.
        audio_lengths: [A] audio tokens of each audio.
        think_index: [A, M] positions of each audio's thinking tokens in its row, padded with 0.
        think_lengths: [A] thinking positions of each audio; all 0 when `thinking: off`.
        row_ids: The rows' ids, for messages.
        tower: [A, L, d_tower] the audio tower's frames at the audio tokens, from the feature store; None where the
            tower is to be run.
    """

    tokens: dict[str, Tensor]
    labels: Tensor | None
    audio_row: Tensor
    audio_index: Tensor
    audio_lengths: Tensor
    think_index: Tensor
    think_lengths: Tensor
    row_ids: list[str] = field(default_factory=list)
    tower: Tensor | None = None

    @property
    def think_mask(self) -> Tensor:
        """[A, M] bool, True at valid thinking positions."""
        return torch.arange(self.think_index.shape[1], device=self.think_index.device) < self.think_lengths[:, None]

    def to(self, device: torch.device | str) -> Inputs:
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        tokens = {k: v.to(device, non_blocking=True) for k, v in self.tokens.items()}
        return Inputs(**{**vars(self), **moved, "tokens": tokens})


@dataclass
class Output:
    """What a backbone's forward gives back.

    Attributes:
        ce_sum: Scalar, cross-entropy summed over the response tokens (nats).
        ce_count: Response tokens the sum runs over.
        thinking: [A, M, d_model] final-layer states at the thinking positions; None when no row has a block.
        audio: The backbone's audio features, without gradient; None when no row has audio.
        last: [B, d_model] final-layer states where the answer begins (the pre-generation states), when there are no
            labels; None where the backbone does not give them.
    """

    ce_sum: Tensor
    ce_count: int
    thinking: Tensor | None
    audio: BackboneAudio | None
    last: Tensor | None = None


class Preparer(ABC):
    """The part of a backbone that turns rows into inputs: tokenizer and audio front end, no weights.

    It is separate so that data workers can hold it without holding the model.
    """

    sample_rate: int
    """Hz of the audio the backbone hears."""
    frame_rate: float
    """Audio tokens per second, Hz (25 for the paper's backbones)."""
    thinking_rate: float
    """Thinking positions per second, Hz; the frame rate unless the spec shortens the block."""
    max_seconds: float | None = None
    """Longest audio the backbone hears in full, seconds; longer audio is refused, never cut silently."""

    max_tokens: int | None = None
    """Longest row the backbone reads, tokens; longer rows are refused by `prepare`."""

    def cannot_hear(self, seconds: float) -> str:
        """Why a sound of this length cannot be heard; empty when it can."""
        if self.max_seconds is not None and seconds > self.max_seconds:
            return f"{seconds:.1f} s is more than the {self.max_seconds:g} s this backbone hears"
        if self.audio_tokens(round(seconds * self.sample_rate)) < 1:
            return f"{seconds * 1000:.0f} ms is too short to give one audio token"
        return ""

    @abstractmethod
    def audio_tokens(self, samples: int) -> int:
        """Audio tokens for a sound of `samples` samples at `sample_rate`; 0 when it is too short to hear."""

    @abstractmethod
    def prepare(self, rows: Sequence[Row], audio: AudioBatch | None, *, train: bool) -> Inputs:
        """Tokenise, expand placeholders, splice the thinking block, label the response.

        Args:
            rows: B rows. When `train` is False the final assistant turn, if any, is left out and the inputs end where
                the answer begins (left-padded).
            audio: The rows' audios in order, at `sample_rate`; None when no row has one.
            train: Whether labels are wanted (right-padded).

        Raises:
            DataError: If a row cannot be prepared; names it.
        """


@dataclass(frozen=True)
class Sketch:
    """What planning needs of a backbone in its real size, without weights.

    Attributes:
        decoder: The language model on torch's meta device, with its adapters; takes `inputs_embeds` [1, T, d_model] and
            `attention_mask` [1, 1, T, T] and gives `last_hidden_state`.
        vocabulary: Rows of the output matrix.
        tower_flops: From seconds of one sound to floating-point operations of audio tower and projector, forward.
        tower_backward: The same for the way back: 0 where neither of them learns.
        dtype: Type that the model computes in.
        input_learns: Whether anything that makes the decoder's input learns.
        output_learns: Whether the output matrix learns.
        tower_window: Seconds of the windows that the tower cuts sounds into, each padded to the longest of a batch;
            None where it pads nothing.
        tower_kept: Bytes that are kept for the way back per second of sound; 0 where the tower does not learn.
        frozen: Parameters that do not learn, by part.
    """

    decoder: nn.Module
    vocabulary: int
    tower_flops: Callable[[float], float]
    tower_backward: Callable[[float], float]
    dtype: torch.dtype = torch.float32
    input_learns: bool = True
    output_learns: bool = False
    tower_window: float | None = None
    tower_kept: float = 0.0
    frozen: Mapping[str, int] = field(default_factory=dict)


class Backbone(ABC):
    """A large audio language model with the thinking block built in.

    It is made with `thinking=` (a `ThinkingSpec`, or None for none) and its own options as keyword arguments.
    """

    preparer: Preparer
    model: nn.Module
    """The network; its parameters with `requires_grad` are what training saves."""
    hidden_size: int
    """Width of the thinking states."""
    audio_dims: Mapping[str, int]
    """Width of `consumed` and, where captured, `tower` in `BackboneAudio`."""
    dtype: torch.dtype = torch.float32
    """Type that products are computed in, the heads' too; what learns is kept in float32."""
    cannot_pack: str = "its plugin does not say that it can"
    """Why rows cannot stand end to end in one sequence (`batch.pack`); empty where that is exact."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Build the network with its weights, adapters and the three token rows. Must never download.

        Raises:
            AssetError: If weights are missing; names the command that fetches them.
        """

    @abstractmethod
    def forward(self, inputs: Inputs) -> Output:
        """One pass over prompt, block and response."""

    @abstractmethod
    def generate(self, inputs: Inputs, *, max_new_tokens: int = 64, **options: Any) -> list[str]:
        """Answers to prepared prompts; prompt and block are consumed in one prefill (paper section 3.5)."""

    def hear(self, inputs: Inputs) -> Tensor:
        """The audio tower's frames at the audio tokens, [A, L, d_tower], without running the language model.

        Raises:
            PluginError: If this backbone cannot; its tower's output then cannot be stored.
        """
        raise PluginError(f"{type(self).__name__} cannot run its audio tower alone, so `tower` cannot be stored")

    def fingerprint(self) -> str:
        """Identity of the frozen weights, from their names, shapes and a sample of every tensor's values."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                digest.update(f"{name}{tuple(parameter.shape)}".encode())
                if not parameter.is_meta:
                    flat = parameter.detach().reshape(-1)
                    digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def sketch(self) -> Sketch:
        """Build the network in its real size on torch's meta device, where it has shapes and no values.

        `model`, `hidden_size`, `audio_dims`, `parts`, `units` and the preparer's two rates are then as after `load`;
        nothing else is there.

        Raises:
            PluginError: If this backbone cannot be planned.
        """
        raise PluginError(f"{type(self).__name__} gives no sketch, so `coatkit plan` cannot count it")

    def units(self) -> list[nn.Module]:
        """Modules that every forward pass calls once, whatever the rows; sharding gathers each as it is needed."""
        return []

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part (e.g. `lora`, `tokens`, `projector`), the names a stage's `lr` may use."""
        return {"model": [p for p in self.model.parameters() if p.requires_grad]}
