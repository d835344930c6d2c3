"""What parts of a model cost: operations and kept activations, counted on torch's meta device, and memory from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from coatkit.losses import CHUNK_VALUES
from coatkit.plan_rows import Layout, Lengths, Part
from coatkit.protocols import Backbone, Sketch

_PROBES = (256, 1024)


@dataclass(frozen=True)
class Work:
    """Floating-point operations, a multiply-add counted as two.

    Attributes:
        exact: Whether they are done in float32 whatever the backbone's type is.
    """

    forward: float
    backward: float
    exact: bool = False

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Curve:
    """What a network costs over n positions: a n + b n^2 operations each way, and c + d n bytes kept for the way back.

    Attributes:
        learns: Whether there is a way back.
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    kept: tuple[float, float]
    learns: bool

    def work(self, times: float, positions: float) -> Work:
        """Of `times` sequences of `positions` each."""
        forward, backward = (times * (a * positions + b * positions**2) for a, b in (self.forward, self.backward))
        return Work(forward, backward)

    def bytes(self, positions: float) -> float:
        """Kept for `positions` in all."""
        return self.kept[0] + self.kept[1] * positions


def language_curve(sketch: Sketch, width: int) -> Curve:
    """Of the decoder, without the output matrix."""
    decoder, dtype = sketch.decoder, sketch.dtype

    def run(tokens: int) -> Tensor:
        embeds = torch.zeros(1, tokens, width, device="meta", dtype=dtype, requires_grad=sketch.input_learns)
        # Given whole, the mask is used as it is; else transformers looks at values to make one.
        mask = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=dtype)
        hidden: Tensor = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    with _narrowing(decoder) if dtype == torch.bfloat16 else nullcontext():
        return _curve(run, decoder)


def head_curve(head: nn.Module, width: int, learns: bool, dtype: torch.dtype) -> Curve:
    """Of a head over one sound's positions.

    Args:
        learns: Whether something before the head learns too.
        dtype: Type of the backbone's products, in which the head's are computed.
    """

    def run(positions: int) -> Tensor:
        states = torch.zeros(1, positions, width, device="meta", requires_grad=learns)
        made: Tensor = head(states, torch.ones(1, positions, dtype=torch.bool, device="meta"))
        return made

    with _narrowing(head) if dtype == torch.bfloat16 else nullcontext():
        return _curve(run, head)


def _curve(run: Callable[[int], Tensor], network: nn.Module) -> Curve:
    """Count a network at two lengths: its operations are a quadratic without a constant."""
    counts, learns = [], False
    for positions in _PROBES:
        with FlopCounterMode(display=False) as counter:
            result = run(positions)
            forward = counter.get_total_flops()
            if learns := result.requires_grad:
                result.sum().backward()  # type: ignore[no-untyped-call]
            backward = counter.get_total_flops() - forward
        # Apart: what is recomputed is not kept, and recomputing hides from hooks what one layer keeps.
        with _without_checkpointing(network), _keeping(positions) as kept:
            result = run(positions)
        counts.append((float(forward), float(backward), float(sum(kept.values()))))
        del result
    (t, u), (one, two) = _PROBES, counts
    squares = [(two[i] / u - one[i] / t) / (u - t) for i in (0, 1)]
    ways = [(one[i] / t - squares[i] * t, squares[i]) for i in (0, 1)]
    slope = (two[2] - one[2]) / (u - t)
    return Curve(ways[0], ways[1], (max(0.0, one[2] - slope * t), slope), learns)


class _Narrowing(TorchFunctionMode):
    """What autocast does to products on a real device; torch has none for the meta device."""

    _PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, F.scaled_dot_product_attention)

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: dict[str, Any] = dict(kwargs or {})
        if function in self._PRODUCTS:
            args = [self._narrow(value) for value in args]
            given = {key: self._narrow(value) for key, value in given.items()}
        return function(*args, **given)

    @staticmethod
    def _narrow(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(torch.bfloat16) if wide else value


@contextmanager
def _narrowing(network: nn.Module) -> Iterator[None]:
    """Narrow in a network's forward and, as modes do not reach the way back, in all that is recomputed there."""
    entered: list[_Narrowing] = []

    def enter(*_: Any) -> None:
        entered.append(_Narrowing())
        entered[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    # A checkpointed layer's own hooks are not called again when it is recomputed; those of what it is made of are.
    layers = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False) is True]
    modules = {network, *(part for layer in layers for part in layer.children())}
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    # Recomputing stops amid a layer once it has what it needs.
    handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    switched: list[Any] = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


@contextmanager
def _keeping(positions: int) -> Iterator[dict[int, int]]:
    """Bytes autograd keeps, by storage, but for weights and attention maps, which fused attention does not keep."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        attention = tensor.ndim >= 3 and tuple(tensor.shape[-2:]) == (positions, positions)
        if not isinstance(base, nn.Parameter) and not attention:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in the worst step; the allocator's slack and the libraries' workspaces come on top.

    Attributes:
        weights: Of backbone and heads.
        experts: Of the active experts, as large as their files.
        gradients: Float32, with what exchanging them takes.
        optimizer: AdamW's two moments, float32.
        activations: What autograd keeps of language model, heads and, where it learns, tower.
        logits: Scores of the answers' tokens and their gradients, as many as are held at once.
        update: What AdamW computes with, after activations and logits are gone.
    """

    weights: float
    experts: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    update: float

    @property
    def total(self) -> float:
        stays = self.weights + self.experts + self.gradients + self.optimizer
        return stays + max(self.activations + self.logits, self.update)


@dataclass(frozen=True)
class Network:
    """Everything that was counted of a spec's model.

    Attributes:
        language: Of the decoder.
        heads: Those that could be built.
        curves: Of the heads that could be counted.
        quantized: Bytes per parameter of the decoder's linear layers where they are quantised.
    """

    backbone: Backbone
    sketch: Sketch
    language: Curve
    heads: dict[str, nn.Module]
    curves: dict[str, Curve]
    lengths: Lengths
    checkpointing: bool
    quantized: float | None = None

    def work(self, active: Sequence[str], layout: Layout, expert_flops: dict[str, float]) -> dict[str, Work]:
        """Operations of a mean step, padding included, by part.

        Args:
            active: Experts that teach.
            expert_flops: Operations of an expert per second of sound, where they are declared.
        """
        parts = layout.parts

        def mean(works: Sequence[Work], exact: bool = False) -> Work:
            return Work(layout.mean([w.forward for w in works]), layout.mean([w.backward for w in works]), exact)

        found = {"language model": mean([self.language.work(len(part.rows), part.width) for part in parts])}
        found["output logits"] = mean([self._logits(part) for part in parts])
        found["audio tower"] = mean([self._tower(part) for part in parts])
        for name in active:
            if name in self.curves:
                curve = self.curves[name]
                longest = [self.lengths.thinking(max(part.seconds, default=0.0)) for part in parts]
                heads = [curve.work(len(part.seconds), m) for part, m in zip(parts, longest, strict=True)]
                found[f"head {name}"] = mean(heads, exact=False)
            if name in expert_flops:
                flops = [expert_flops[name] * sum(part.seconds) for part in parts]
                found[f"expert {name}"] = mean([Work(f, 0.0) for f in flops], exact=True)
        return found

    def _logits(self, part: Part) -> Work:
        """Scores of the answers' tokens; a matrix that learns computes long answers a second time on the way back."""
        values = self.sketch.vocabulary * part.answers
        again = self.sketch.output_learns and values > CHUNK_VALUES
        forward = 2.0 * self.backbone.hidden_size * values
        return Work(forward, forward * (self.language.learns + self.sketch.output_learns + again))

    def _tower(self, part: Part) -> Work:
        """Tower and projector; shorter sounds, or windows of sounds, are padded to the longest where it pads."""
        window, sketch = self.sketch.tower_window, self.sketch
        heard = part.seconds
        if window is not None and heard:
            pieces = sum(-(-s // window) for s in heard)
            longest = min(max(heard), window)
            return Work(pieces * sketch.tower_flops(longest), pieces * sketch.tower_backward(longest))
        return Work(sum(map(sketch.tower_flops, heard)), sum(map(sketch.tower_backward, heard)))

    def memory(self, active: Sequence[str], layout: Layout, experts: float, devices: int, shards: bool) -> Memory:
        """Bytes on one device of several that repeat the model (DDP) or spread it (FSDP).

        Args:
            active: Experts that teach.
            experts: Bytes of the experts' weights.
        """
        learning = [p for p in self.backbone.model.parameters() if p.requires_grad]
        taught = [p for name in active if name in self.heads for p in self.heads[name].parameters()]
        everything = [*self.backbone.model.parameters(), *(p for h in self.heads.values() for p in h.parameters())]
        learnt = 4.0 * sum(p.numel() for p in [*learning, *taught])
        units = self.backbone.units()
        sizes = [self._size(unit.parameters(), unit) for unit in units]
        weights = self._size(everything, self.sketch.decoder)
        gradients = learnt
        if shards:
            inside = 4.0 * sum(p.numel() for unit in units for p in unit.parameters() if p.requires_grad)
            largest = max(sizes, default=0.0)
            # What is in no unit is whole while a step lasts, gradients too; of the units, one is used while the next
            # is gathered.
            weights = weights / devices + (weights - sum(sizes)) + 2 * largest
            gradients = learnt / devices + (learnt - inside) + inside / max(1, len(units))
            learnt /= devices
        elif devices > 1:
            gradients *= 2  # DDP exchanges them in buffers of its own
        parts = [*layout.parts, layout.heaviest]
        return Memory(
            weights=weights,
            experts=experts,
            gradients=gradients,
            optimizer=2 * learnt,
            activations=max(self._kept(active, part) for part in parts),
            # Scores in float32, their logarithm and its gradient.
            logits=max(3 * 4.0 * min(self.sketch.vocabulary * part.answers, CHUNK_VALUES) for part in parts),
            update=learnt,
        )

    def _kept(self, active: Sequence[str], part: Part) -> float:
        kept = self.language.bytes(part.positions)
        if self.checkpointing:
            layers = max(1, len(self.backbone.units()))
            kept = kept / layers + layers * self.backbone.hidden_size * self.sketch.dtype.itemsize * part.positions
        longest = self.lengths.thinking(max(part.seconds, default=0.0))
        kept += sum(self.curves[n].bytes(len(part.seconds) * longest) for n in active if n in self.curves)
        return kept + self.sketch.tower_kept * sum(part.seconds)

    def _size(self, parameters: Iterable[nn.Parameter], decoder: nn.Module) -> float:
        """Bytes of some parameters, `decoder`'s among them."""
        size = float(sum(p.numel() * p.element_size() for p in parameters))
        if self.quantized is None:
            return size
        frozen = [m.weight for m in decoder.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        return size - sum(w.numel() * (w.element_size() - self.quantized) for w in frozen)
