"""One backbone on the bench: loaded once, its rows and passes shared between checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatkit import build, infer
from coatkit.backbones.folder import transformers_quiet
from coatkit.backbones.hf import HFBackbone
from coatkit.backbones.options import BackboneOptions
from coatkit.data.audio import Samples
from coatkit.data.rows import AudioRef, Message, Row
from coatkit.protocols import AudioBatch, Backbone, Inputs, Output, Sketch
from coatkit.spec import ThinkingSpec
from coatkit.testing.bench import Failed, Workbench
from coatkit.testing.sounds import tone

Look = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class BackboneBench(Workbench):
    """Loads and calls a backbone for the checks; nothing is loaded before it is asked for.

    The backbone that the checks use is awake: a tiny random model gives nearly the same answer to everything, and
    adapters start without any effect, so that most faults would not show in it.

    Args:
        name: What a spec's `use` takes.
        options: The backbone's options.
        folder: An empty folder of its own.
        seconds: Lengths of the three shared sounds.
        several_sounds: Whether a row may hold more than one sound.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], folder: Path, seconds: Sequence[float], several_sounds: bool
    ) -> None:
        super().__init__("backbone", name, options, folder)
        self.seconds, self.several_sounds = tuple(seconds), several_sounds
        self._variants: dict[str, Backbone | Failed] = {}
        self.faults: dict[str, tuple[str, str]] = {}
        """What checks found, where others need to know it: what is wrong and what to do, empty for nothing."""

    # Loading

    def load(self, thinking: ThinkingSpec | None = ThinkingSpec(), **changes: Any) -> Backbone:  # noqa: B008
        """A new instance with the author's options, `changes` apart; a dict changes only the keys it has."""
        options = self._options(changes)
        return self.call("loading", lambda: infer.load_backbone(self.name, thinking=thinking, device="cpu", **options))

    def _options(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.options)
        for key, value in changes.items():
            old = options.get(key)
            options[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        return options

    def sketched(self, **changes: Any) -> tuple[Backbone, Sketch]:
        """A new instance that was sketched and not loaded, and its sketch."""
        made: Backbone = build.construct(self.component, thinking=ThinkingSpec(), **self._options(changes))
        return made, self.call("sketch", made.sketch)

    def write_folder(self, folder: Path) -> Path | None:
        """What transformers saves of the stock model and its tokenizer; None where there is no stock model."""
        made: Any = build.construct(self.component, thinking=ThinkingSpec(), **self.options)
        if not isinstance(made, HFBackbone) or not isinstance(made.options, BackboneOptions):
            return None
        stock, preparer = made.build(torch.float32)
        with transformers_quiet():
            for part in (stock, preparer.tokenizer, *filter(None, [getattr(preparer, "extractor", None)])):
                part.save_pretrained(folder)
        return folder

    @cached_property
    def raw(self) -> Backbone | Failed:
        """As it was loaded; nothing changes it."""
        return self.attempt(self.load)

    @cached_property
    def second(self) -> Backbone | Failed:
        """Another one like `raw`."""
        return self.attempt(self.load)

    @cached_property
    def loads_differ(self) -> str:
        """Name of a tensor that is another one in the second instance; empty where there is none."""
        one, other = self.raw, self.second
        assert isinstance(one, Backbone)
        assert isinstance(other, Backbone)
        a, b = tensors(one.model), tensors(other.model)
        if set(a) != set(b):
            return min(set(a) ^ set(b))
        return next((name for name in a if not torch.equal(a[name], b[name])), "")

    def awake(self, thinking: ThinkingSpec | None = ThinkingSpec(), **changes: Any) -> Backbone:  # noqa: B008
        """A new instance whose layers and adapters have an effect, in evaluation mode."""
        return stir(self.load(thinking, **changes))

    @cached_property
    def backbone(self) -> Backbone | Failed:
        """The one that most checks use; no check changes it."""
        return self.attempt(self.awake)

    def variant(self, thinking: ThinkingSpec | None = ThinkingSpec(), **changes: Any) -> Backbone | Failed:  # noqa: B008
        """An awake one with other settings, which no check changes."""
        key = repr((thinking, sorted(changes.items())))
        if key not in self._variants:
            self._variants[key] = self.attempt(lambda: self.awake(thinking, **changes))
        return self._variants[key]

    def remade(self, change: Callable[[Any], None]) -> Backbone:
        """An awake `HFBackbone` whose stock model was changed before the adapter was put on it."""
        found: Any = self.component.load_class()

        def make(self: Any, dtype: torch.dtype) -> Any:
            stock, preparer = found.build(self, dtype)
            change(stock)
            return stock, preparer

        def load() -> Backbone:
            remade: Backbone = type(found.__name__, (found,), {"build": make})(thinking=ThinkingSpec(), **self.options)
            with build.seeded(0, "backbone"):
                remade.load(torch.device("cpu"))
            return remade

        return stir(self.call("loading", load))

    # Rows

    @cached_property
    def sample_rate(self) -> int:
        assert isinstance(self.backbone, Backbone)
        return self.backbone.preparer.sample_rate

    def sound(self, seconds: float, seed: int = 0) -> Samples:
        return tone(seconds, self.sample_rate, seed)

    @cached_property
    def rows(self) -> list[Row]:
        """A row with one sound, one of text alone, and one of two turns (with two sounds, where a row may)."""
        turns = ("<audio>What?", "Rain.", "And <audio>?", "A bell.")
        if not self.several_sounds:
            turns = ("<audio>What?", "Rain.", "And now?", "A bell.")
        return [
            a_row("one", "<audio>Which animal is it?", "A dog."),
            a_row("text", "Capital of France?", "Paris."),
            a_row("two", *turns),
        ]

    @cached_property
    def sounds(self) -> dict[str, list[Samples]]:
        """The sounds of each shared row, by its id."""
        made = [self.sound(seconds, seed) for seed, seconds in enumerate(self.seconds)]
        return {"one": made[:1], "text": [], "two": made[1:] if self.several_sounds else made[2:]}

    def prepare(
        self,
        backbone: Backbone,
        rows: Sequence[Row] | None = None,
        sounds: Sequence[Samples] | None = None,
        *,
        train: bool = True,
    ) -> Inputs:
        """Inputs of rows with their sounds; the shared ones where none are given."""
        rows = self.rows if rows is None else rows
        sounds = [sound for row in rows for sound in self.sounds[row.id]] if sounds is None else sounds
        audio = AudioBatch.from_arrays(sounds, backbone.preparer.sample_rate) if sounds else None
        return self.call("prepare", lambda: backbone.preparer.prepare(rows, audio, train=train))

    # Passes

    def forward(self, backbone: Backbone, inputs: Inputs, *, grad: bool = False) -> Output:
        """One pass; inputs are given as a copy, so that a pass that changes them spoils no other check.

        In training mode it is not watched: dropout may draw from the global generator there.
        """

        def run() -> Output:
            with torch.set_grad_enabled(grad):
                return backbone.forward(copy(inputs))

        return run() if backbone.model.training else self.call("forward", run)

    def generate(self, backbone: Backbone, inputs: Inputs, count: int, **options: Any) -> list[str]:
        return self.call("generate", lambda: backbone.generate(copy(inputs), max_new_tokens=count, **options))

    @cached_property
    def inputs(self) -> Inputs | Failed:
        """The shared rows, to learn from."""
        backbone = self.backbone
        assert isinstance(backbone, Backbone)
        return self.attempt(lambda: self.prepare(backbone))

    @cached_property
    def output(self) -> Output | Failed:
        """One pass over the shared rows, without gradient."""
        backbone, inputs = self.backbone, self.inputs
        assert isinstance(backbone, Backbone)
        assert isinstance(inputs, Inputs)
        return self.attempt(lambda: self.forward(backbone, inputs))

    def gradients(self, backbone: Backbone, inputs: Inputs) -> dict[str, Tensor | None]:
        """What every parameter of the network gets from one pass and its loss."""
        backbone.model.zero_grad(set_to_none=True)
        output = self.forward(backbone, inputs, grad=True)
        loss(output, inputs).backward()  # type: ignore[no-untyped-call]
        found = {name: parameter.grad for name, parameter in backbone.model.named_parameters()}
        backbone.model.zero_grad(set_to_none=True)
        return found

    def step(self, backbone: Backbone, inputs: Inputs, count: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every tensor before and after some steps of an optimizer, with weight decay as it finds all it may change."""
        before = {name: tensor.detach().clone() for name, tensor in tensors(backbone.model).items()}
        backbone.model.train()
        learn = [parameter for part in backbone.parts().values() for parameter in part]
        optimizer = torch.optim.AdamW(learn, lr=1e-2, weight_decay=0.1)
        for _ in range(count):
            output = self.forward(backbone, inputs, grad=True)
            loss(output, inputs).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        backbone.model.eval()
        return before, tensors(backbone.model)

    def use(self) -> None:
        """Load it, prepare, pass and answer, for the sake of what it does meanwhile."""
        backbone = self.backbone
        if isinstance(backbone, Failed) or isinstance(self.inputs, Failed) or isinstance(self.output, Failed):
            return
        asked = self.attempt(lambda: self.prepare(backbone, train=False))
        if not isinstance(asked, Failed):
            self.attempt(lambda: self.generate(backbone, asked, 2))


def a_row(name: str, *turns: str) -> Row:
    """User and assistant in turn; every `<audio>` tag stands for a sound."""
    messages = tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns))
    count = sum(turn.count("<audio>") for turn in turns)
    audios = tuple(AudioRef(Path(f"{name} {i}.wav")) for i in range(count))
    return Row(name, messages, audios, f"data.jsonl:{name}")


def copy(inputs: Inputs, **changes: Any) -> Inputs:
    """Inputs with tensors of their own; `changes` replace fields."""
    held = {key: value.clone() if isinstance(value, Tensor) else value for key, value in vars(inputs).items()}
    tokens = {key: value.clone() for key, value in inputs.tokens.items()}
    return Inputs(**{**held, "tokens": tokens, **changes})


def loss(output: Output, inputs: Inputs) -> Tensor:
    """A loss that everything that may learn has a part in."""
    total = output.ce_sum / max(1, output.ce_count)
    if output.thinking is not None:
        total = total + output.thinking[inputs.think_mask].float().square().mean()
    return total


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved among them."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def stir(backbone: Backbone) -> Backbone:
    """Give layers and adapters an effect, and each thinking row a value of its own; the same in every instance."""
    generator = torch.Generator().manual_seed(5)
    rows = backbone.stock.get_input_embeddings().weight if isinstance(backbone, HFBackbone) else None
    with torch.no_grad():
        for name, layer in backbone.model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv1d) and layer.weight is not rows and "lora_" not in name:
                # How much louder the output is than the input. Trained layers are near 1; tiny random ones near 0.1,
                # so that all they say is drowned in what the residual stream carries past them.
                gain = float(layer.weight.float().std()) * layer.weight[0].numel() ** 0.5
                if 0 < gain < 0.5:
                    layer.weight.mul_(0.8 / gain)
        for parameter in backbone.model.parameters():
            if parameter.requires_grad:
                size = float(parameter.float().square().mean().sqrt())
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((noise * (0.3 * size if size else 0.1)).to(parameter.dtype))
    backbone.model.eval()
    return backbone


@contextmanager
def calls(module: nn.Module, look: Look) -> Iterator[list[Any]]:
    """What `look` makes of the arguments of each call of a module."""
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(look(args, kwargs)), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """A module's outputs, or the `last_hidden_state` of those that are not tensors."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
        seen.append((output[0] if found is None else found).detach().clone())

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
