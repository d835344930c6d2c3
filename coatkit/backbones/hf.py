"""One adapter for transformers' audio language models: hooks instead of a rewritten forward.

Every such model embeds its tokens, scatters audio embeddings over the placeholders, runs a decoder and ends in
`lm_head`. Four hooks reach all we need without touching model code: the embedding's output gets the three thinking
rows, the decoder's input shows what the language model consumes, the tower's output is kept for reconstruction, and
`lm_head` sees only the positions whose logits are wanted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from coatkit.backbones.adapters import add_adapters
from coatkit.backbones.counting import DTYPES, TowerWork
from coatkit.backbones.options import BackboneOptions
from coatkit.backbones.preparer import HFPreparer as HFPreparer
from coatkit.backbones.publishing import Publishing
from coatkit.backbones.quantize import fingerprint, quantize
from coatkit.errors import DataError, PluginError
from coatkit.losses import projected_cross_entropy
from coatkit.protocols import Backbone, BackboneAudio, Inputs, Output, Sketch
from coatkit.spec import ThinkingSpec
from coatkit.thinking import IGNORE, gather


class ThinkingRows(nn.Module):
    """The embeddings of the three added tokens, [3, d], apart from the frozen embedding matrix.

    A parameter of its own costs nothing per step; training rows inside the matrix would make a dense gradient for all
    of it.
    """

    def __init__(self, embedding: Tensor, first: int) -> None:
        super().__init__()
        self.first = first
        # New tokens start at the mean embedding: in distribution, and the same on every machine.
        mean = embedding.detach().mean(0, dtype=torch.float32)
        self.rows = nn.Parameter(mean.expand(3, -1).clone())

    def replace(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Embeddings [B, T, d] with the thinking tokens' own rows in place."""
        offset = ids - self.first
        ours = (offset >= 0) & (offset < 3)
        rows = F.embedding(offset.clamp(0, 2), self.rows).to(embedded.dtype)
        return torch.where(ours[..., None], rows, embedded)


class _HeardError(Exception):
    """The audio has been heard, and no more is wanted of this pass."""


class HFBackbone(Publishing, TowerWork, Backbone):
    """Base of backbones made from a transformers audio language model.

    A subclass sets `options_type`, writes `build`, and overrides `tower_frames` and the module paths where they differ.

    Args:
        thinking: The block's settings, or None for no block.
        options: Fields of `options_type`.
    """

    options_type: ClassVar[type[BackboneOptions]] = BackboneOptions
    model_class: ClassVar[Any] = None
    """The stock transformers class; needed for planning."""
    window_seconds: ClassVar[float] = 30.0
    """Length of the windows that the audio tower attends within, seconds."""
    language_model_path: ClassVar[str] = "model.language_model"
    tower_path: ClassVar[str] = "model.audio_tower"
    projector_path: ClassVar[str] = "model.multi_modal_projector"
    """May lie inside the tower."""
    tower_output_path: ClassVar[str] = ""
    """Module whose output is the tower's own, where the tower goes on to project it; the tower itself when empty."""
    cannot_pack = ""
    packs_sounds: ClassVar[bool] = False
    """Whether the tower takes sounds of unlike lengths without padding; for planning."""

    def __init__(self, *, thinking: ThinkingSpec | None = ThinkingSpec(), **options: Any) -> None:  # noqa: B008
        self.thinking = thinking
        self.options = self.options_type(**options)
        self.dtype = DTYPES[self.options.dtype]
        self.preparer: HFPreparer
        self.thinking_rows: ThinkingRows
        self._embeds: Tensor | None = None
        self._tower: Tensor | None = None
        self._hidden: Tensor | None = None
        self._only_hearing = self._own_logits = False
        self._made_small_from: str | None = None  # None, too, in a sketch, where nothing is quantised

    @abstractmethod
    def build(self, dtype: torch.dtype) -> tuple[Any, HFPreparer]:
        """The stock model with its weights in `dtype`, and the preparer; called once, by `load`."""

    @abstractmethod
    def tower_frames(self, output: Any, tokens: dict[str, Tensor]) -> Tensor:
        """The tower's output for all sounds in order without padding, [sum of audio tokens, d_tower]."""

    def plan_config(self) -> Any:
        """The stock model's configuration in its real size, for planning; no weights are there to be read.

        Raises:
            PluginError: If the plugin gives none.
        """
        raise PluginError(f"{type(self).__name__} gives no plan_config, so `coatkit plan` cannot count it")

    def load(self, device: torch.device) -> None:
        dtype, mode = self.dtype, self.options.quantize
        stock, self.preparer = self.build(dtype)
        if mode != "none":
            self._made_small_from = quantize(stock.get_submodule(self.language_model_path), mode, dtype, device)
        self._adopt(stock.to(device), self.preparer.tokens.start)
        # A published folder may ask for sampling or a repetition penalty, which would act on greedy answers too.
        kept = {name: getattr(stock.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        stock.generation_config = GenerationConfig(**{f"{name}_token_id": value for name, value in kept.items()})

    def sketch(self) -> Sketch:
        config = self.plan_config()
        with torch.device("meta"):
            stock = self.model_class(config).to(self.dtype)
            self._adopt(stock, 0)
        # A tokenizer would have to be fetched; experts bind to the two rates only.
        rates: Any = SimpleNamespace(sample_rate=HFPreparer.sample_rate, frame_rate=HFPreparer.frame_rate)
        self.preparer = rates
        frozen: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                frozen[self._part(name)] = frozen.get(self._part(name), 0) + parameter.numel()
        tower, output = [*self.tower.parameters()], stock.get_output_embeddings().weight
        inputs = [*tower, *self.projector.parameters(), self.thinking_rows.rows, stock.get_input_embeddings().weight]
        return Sketch(
            decoder=self.language_model,
            vocabulary=int(output.shape[0]),
            tower_flops=self.tower_flops,
            tower_backward=self.tower_backward,
            dtype=self.dtype,
            input_learns=any(p.requires_grad for p in inputs),
            output_learns=output.requires_grad,
            tower_window=None if self.packs_sounds else self.window_seconds,
            tower_kept=self._tower_kept() if any(p.requires_grad for p in tower) else 0.0,
            frozen=frozen,
        )

    def _adopt(self, stock: Any, first_token: int) -> None:
        """Take the stock model: freeze it, choose what learns in it, and put the hooks on."""
        self.stock = stock
        self.model = model = self.stock
        model.requires_grad_(False)
        self.language_model = model.get_submodule(self.language_model_path)
        self.tower = model.get_submodule(self.tower_path)
        embedding: Any = model.get_input_embeddings()
        self.hidden_size = int(embedding.weight.shape[1])
        self._choose_what_learns(embedding, first_token)
        self._hook(embedding)
        if self.options.gradient_checkpointing:
            # On the language model only: from the top, the frozen tower would be recomputed too.
            self.language_model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        if self.options.compile and self._made_small_from is None and not next(model.parameters()).is_meta:
            for layer in self.language_model.layers:  # one by one: they are alike, so one compilation serves all
                layer.compile(dynamic=True)
        model.train = self._train_mode
        self.audio_dims = {"consumed": self.hidden_size, "tower": self._tower_width()}

    def _choose_what_learns(self, embedding: Any, first_token: int) -> None:
        train, model = self.options.train, self.stock
        paths = {"lm": self.language_model_path, "tower": self.tower_path, "projector": self.projector_path}
        self.peft = add_adapters(model, self.options, paths)
        self.projector = model.get_submodule(self.projector_path)  # an adapter may stand in its place
        if train.lm == "full":
            self.language_model.requires_grad_(True)
        if train.tower == "full":
            for name, parameter in self.tower.named_parameters():
                parameter.requires_grad_("embed_positions" not in name)
        for name, parameter in self.projector.named_parameters():  # after the tower, which may hold it
            parameter.requires_grad_(train.projector == "full" or "lora_" in name)
        embedding.requires_grad_(train.tokens == "all")
        if train.lm == "full":  # where the output matrix is the embedding itself, that learns too
            model.get_output_embeddings().requires_grad_(True)
        rows = ThinkingRows(embedding.weight, first_token).to(embedding.weight.device)
        rows.requires_grad_(train.tokens != "none" and self.thinking is not None)
        self.thinking_rows = model.thinking_rows = rows
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # what learns stays in float32; autocast narrows per operation

    def _hook(self, embedding: nn.Module) -> None:
        def add_rows(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.thinking_rows.replace(args[0], output)

        def see_embeds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._embeds = kwargs.get("inputs_embeds")
            if self._only_hearing:
                raise _HeardError

        def see_tower(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._tower = output if isinstance(output, Tensor) else output.last_hidden_state

        def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if args[0].ndim == 2:  # states chosen by _cross_entropy
                return None
            self._hidden = args[0]
            # When generating, the last position's logits alone; in `forward`, which makes its own, none at all.
            return (args[0][:, :0] if self._own_logits else args[0][:, -1:], *args[1:])

        embedding.register_forward_hook(add_rows)
        self.language_model.register_forward_pre_hook(see_embeds, with_kwargs=True)
        self.stock.get_submodule(self.tower_output_path or self.tower_path).register_forward_hook(see_tower)
        self.stock.get_output_embeddings().register_forward_pre_hook(narrow)

    def _train_mode(self, mode: bool = True) -> nn.Module:
        """`model.train`, but a frozen tower stays in evaluation mode: no dropout in what is the teacher's input."""
        nn.Module.train(self.model, mode)
        if self.options.train.tower == "none":
            self.tower.eval()
        return self.model

    def _tower_width(self) -> int:
        widths = [p.shape[0] for n, p in self.tower.named_parameters() if n.endswith("layer_norm.weight")]
        return int(widths[-1])

    def forward(self, inputs: Inputs) -> Output:
        self._check_placeholders(inputs)
        device = next(self.model.parameters()).device
        inputs = inputs.to(device)
        with self._capturing(), self._narrowed(device), self._told(inputs):
            self._own_logits = True
            self.model(**self._cast(inputs.tokens), use_cache=False)
            hidden, embeds, tower = self._hidden, self._embeds, self._tower
            assert hidden is not None
            ce_sum, ce_count = self._cross_entropy(hidden, inputs.labels)
        heard = inputs.audio_row.numel() > 0
        blocks = heard and bool(inputs.think_lengths.any())
        return Output(
            ce_sum=ce_sum,
            ce_count=ce_count,
            thinking=gather(hidden, inputs.audio_row, inputs.think_index) if blocks else None,
            audio=self._audio(inputs, embeds, tower) if heard else None,
            last=hidden[:, -1] if inputs.labels is None else None,
        )

    @torch.no_grad()
    def hear(self, inputs: Inputs) -> Tensor:
        self._check_placeholders(inputs)
        device = next(self.model.parameters()).device
        inputs = inputs.to(device)
        with self._capturing(), self._narrowed(device):
            self._only_hearing = True
            try:
                self.model(**self._cast(inputs.tokens), use_cache=False)
            except _HeardError:  # raised where the language model would begin
                pass
            finally:
                self._only_hearing = False
            heard = self._audio(inputs, self._embeds, self._tower)
        assert heard.tower is not None
        return heard.tower

    def tower_output(self, frames: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """The inverse of `tower_frames`: what the tower's forward gives, from its frames at the audio tokens.

        Args:
            frames: [sum of audio tokens, d_tower].
        """
        if self.tower_output_path:  # the tower packs its sounds and projects them itself
            projected: Tensor = self.projector(frames)
            return projected
        windows, _, mel = tokens["input_features"].shape
        length = ((mel - 1) // 2 + 1 - 2) // 2 + 1
        numbers = torch.arange(windows * length, dtype=torch.float64, device=frames.device)
        places = self.tower_frames(numbers.view(windows, length, 1), tokens).long().flatten()
        out = frames.new_zeros(windows * length, frames.shape[1])
        out[places] = frames
        return out.view(windows, length, -1)

    @contextmanager
    def _told(self, inputs: Inputs) -> Iterator[None]:
        """Where the inputs hold the tower's frames, give them in place of running it."""
        if inputs.tower is None:
            yield
            return
        inside = torch.arange(inputs.tower.shape[1], device=inputs.tower.device) < inputs.audio_lengths[:, None]
        frames = inputs.tower[inside].to(self.dtype)
        output = BaseModelOutput(last_hidden_state=self.tower_output(frames, inputs.tokens))
        self.tower.forward = lambda *args, **kwargs: output
        try:
            if self.tower_output_path:  # its hook will not be called
                self._tower = frames
            yield
        finally:
            del self.tower.forward

    def _check_placeholders(self, inputs: Inputs) -> None:
        """Some models scatter a wrong number of features without a word; never rely on them to check."""
        found = int((inputs.tokens["input_ids"] == self.preparer.audio_token).sum())
        if found != int(inputs.audio_lengths.sum()):
            raise DataError(
                f"{found} placeholders for {int(inputs.audio_lengths.sum())} audio tokens in rows"
                f" {', '.join(inputs.row_ids)}"
            )

    def _cross_entropy(self, hidden: Tensor, labels: Tensor | None) -> tuple[Tensor, int]:
        if labels is None:
            return hidden.new_zeros(()), 0
        wanted = labels[:, 1:] != IGNORE
        # Logits at answer positions only: with a 150 k vocabulary the rest would be most of the step's memory.
        project = self.stock.get_output_embeddings()
        total = projected_cross_entropy(hidden[:, :-1][wanted], labels[:, 1:][wanted], project)
        return total, int(wanted.sum())

    def _audio(self, inputs: Inputs, embeds: Tensor | None, tower: Tensor | None) -> BackboneAudio:
        assert embeds is not None
        inside = torch.arange(inputs.audio_index.shape[1], device=embeds.device) < inputs.audio_lengths[:, None]
        consumed = gather(embeds.detach(), inputs.audio_row, inputs.audio_index).float()
        consumed = consumed.masked_fill(~inside[..., None], 0.0)
        frames = None
        if tower is not None:
            flat = self.tower_frames(tower.detach(), inputs.tokens).float()
            if flat.shape[0] != int(inputs.audio_lengths.sum()):
                raise DataError(
                    f"the audio tower gave {flat.shape[0]} frames for {int(inputs.audio_lengths.sum())} placeholders"
                    f" in rows {', '.join(inputs.row_ids)}"
                )
            frames = torch.zeros(*inside.shape, flat.shape[-1], device=flat.device)
            frames[inside] = flat
        return BackboneAudio(consumed, frames, inputs.audio_lengths, self.preparer.frame_rate)

    @torch.no_grad()
    def generate(self, inputs: Inputs, *, max_new_tokens: int = 64, **options: Any) -> list[str]:
        self._check_placeholders(inputs)
        tokenizer = self.preparer.tokenizer
        device = next(self.model.parameters()).device
        tokens = self._cast(inputs.to(device).tokens)
        with self._capturing(), self._narrowed(device):
            out = self.stock.generate(
                **tokens,
                max_new_tokens=max_new_tokens,
                do_sample=options.pop("do_sample", False),
                # An answer never holds the block or a placeholder; their output rows are untrained.
                suppress_tokens=[*self.preparer.tokens.ids, self.preparer.audio_token],
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        answers = out[:, tokens["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _cast(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tokens.items()}

    def _narrowed(self, device: torch.device) -> torch.autocast:
        """What learns is float32 amid bfloat16 weights: let torch narrow it in each operation, trainer or not."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """Forget what the hooks saw when the pass is over, so that no graph outlives it."""
        self._embeds = self._tower = self._hidden = None
        try:
            yield
        finally:
            self._embeds = self._tower = self._hidden = None
            self._own_logits = False

    def fingerprint(self) -> str:
        small = self._made_small_from
        return super().fingerprint() if small is None else fingerprint(self.model, small)

    def units(self) -> list[nn.Module]:
        # Not the tower's layers: a process whose rows have no sound does not call them.
        return list(self.language_model.layers)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        embedding, every = self.stock.get_input_embeddings().weight, self.options.train.tokens == "all"
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = "tokens" if parameter is embedding and every else self._part(name)
                found.setdefault(part, []).append(parameter)
        return found

    def _part(self, name: str) -> str:
        if name.startswith("thinking_rows"):
            return "tokens"
        if name.startswith(self.projector_path):
            return "projector"
        if name.startswith(self.tower_path):
            return "tower"
        return "lora" if "lora_" in name else "lm"
