"""A trained backbone as files that plain transformers and peft read: stock names, no hook, no class of ours."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coatkit.backbones.adapters import merge
from coatkit.backbones.chat import thinking_template
from coatkit.backbones.preparer import HFPreparer
from coatkit.errors import PluginError
from coatkit.manifest import Asset

SHARD = "5GB"
SIDE_BY_SIDE = {
    "model.language_model": "language_model.model",
    "model.audio_tower": "audio_tower",
    "model.multi_modal_projector": "multi_modal_projector",
    "lm_head": "language_model.lm_head",
}
"""`published_names` of folders that hold tower, projector and a whole causal language model side by side."""


class Publishing:
    """A part of `HFBackbone`: what it takes to leave coatkit."""

    published_names: ClassVar[Mapping[str, str]] = {}
    """Where a published folder names a module otherwise than the stock class: the class's prefix to the folder's."""
    default_weights: ClassVar[Asset | None] = None
    """What `weights: default` fetches, where that is a whole stock model."""
    projector_path: ClassVar[str]
    thinking: Any
    options: Any
    dtype: torch.dtype
    preparer: HFPreparer
    stock: Any
    model: nn.Module
    peft: Any
    thinking_rows: Any

    def merge(self) -> None:
        """Put the adapters into the weights, for good; a quantised language model takes plain weights of `dtype`."""
        merge(self.model, self.dtype)

    def base_model(self) -> tuple[str, str | None]:
        """The stock model this one was made from: its name on the hub and revision, or its folder."""
        asset = self.default_weights
        found = re.fullmatch(r"hub:([^@]+)(?:@(.+))?", asset.source) if asset is not None else None
        if found and self.options.weights == "default":
            return found[1], found[2]
        return str(self.stock.name_or_path or self.options.weights), None

    def processor(self, chat_template: str) -> Any:
        """The stock processor, its tokenizer with the thinking tokens; None where tokenizer and front end are all."""
        return None

    def published_config(self) -> Any:
        """The configuration of the published folder, apart from the model's own."""
        return copy.deepcopy(self.stock.config)

    def published_parts(self) -> Mapping[str, Tensor]:
        """Tensors of the stock class that this backbone does not hold, by the folder's names; untrained ones."""
        return {}

    def save_merged(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a model folder that the stock class loads. Adapters are merged for good; this backbone is used up.

        Args:
            folder: Is there, and empty.
            dtype: Type of all weights; that of the frozen ones when left out.
        """
        from huggingface_hub import save_torch_state_dict

        dtype = dtype or self.dtype
        merge(self.model, dtype)
        embedding, output = self.stock.get_input_embeddings(), self.stock.get_output_embeddings()
        with torch.no_grad():
            self.stock.to(dtype)
            first = self.preparer.tokens.start
            if self.thinking is not None:
                embedding.weight[first : first + 3] = self.thinking_rows.rows.to(dtype)
        # Tied, the output matrix is the embedding, and a folder holds it once, under the embedding's name.
        twice = {n for n, p in self.stock.named_parameters(remove_duplicate=False) if p is output.weight}
        twice = {n for n in twice if output.weight is embedding.weight and n != f"{self._embedding_name()}.weight"}
        state = {self._published(n): t for n, t in self.stock.state_dict().items() if n not in twice}
        state = {n: t for n, t in state.items() if not n.startswith("thinking_rows.")}
        state |= {n: t.to(dtype) for n, t in self.published_parts().items()}
        save_torch_state_dict(state, folder, max_shard_size=SHARD, metadata={"format": "pt"})
        config = self.published_config()
        config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = config.architectures or [type(self.stock).__name__]
        config.save_pretrained(folder)
        generation = copy.deepcopy(self.stock.generation_config)
        # Their output rows are untrained: an answer never holds the block or a placeholder.
        generation.suppress_tokens = self.suppressed()
        generation.save_pretrained(folder)
        self.save_processor(folder)

    def suppressed(self) -> list[int]:
        """Tokens that are never generated: the block's and the placeholder of a sound."""
        return [*self.preparer.tokens.ids, self.preparer.audio_token]

    def _embedding_name(self) -> str:
        embedding = self.stock.get_input_embeddings()
        return next(str(name) for name, module in self.stock.named_modules() if module is embedding)

    def _published(self, name: str) -> str:
        for prefix, other in self.published_names.items():
            if name == prefix or name.startswith(f"{prefix}."):
                return other + name[len(prefix) :]
        return name

    def save_adapter(self, folder: Path, base_model: str | None = None) -> None:
        """Write a PEFT adapter that plain `peft` puts on the stock model, with the three token rows.

        Args:
            folder: Is there, and empty.
            base_model: Name of the stock model to write; where this one was had from when left out.

        Raises:
            PluginError: If more was trained than an adapter holds.
        """
        from peft import get_peft_model_state_dict

        train = self.options.train
        whole = {"lm": train.lm == "full", "tower": train.tower == "full", "tokens": train.tokens == "all"}
        if too_much := [f"train.{part}: {getattr(train, part)}" for part, is_whole in whole.items() if is_whole]:
            raise PluginError(f"{', '.join(too_much)}: an adapter cannot hold it; export the whole model with --merge")
        if self.peft is None:
            raise PluginError("the run trained no adapter (train.lm: none); export the whole model with --merge")
        config = copy.deepcopy(self.peft.peft_config["default"])
        state = dict(get_peft_model_state_dict(self.peft, save_embedding_layers=False))
        if self.thinking is not None:
            name = self._embedding_name()
            config.trainable_token_indices = {name.rpartition(".")[2]: list(self.preparer.tokens.ids)}
            state[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"] = self.thinking_rows.rows
        if train.projector == "full":
            config.modules_to_save = [self.projector_path]
            projector = self.stock.get_submodule(self.projector_path).state_dict()
            state |= {f"base_model.model.{self.projector_path}.{n}": t for n, t in projector.items()}
        config.base_model_name_or_path, config.revision = (base_model, None) if base_model else self.base_model()
        config.inference_mode = True
        config.save_pretrained(str(folder))
        tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """Write tokenizer, front end and the chat template that takes `audio_think_len`."""
        template, tokenizer = thinking_template(self.preparer), self.preparer.tokenizer
        before = tokenizer.chat_template
        try:
            tokenizer.chat_template = template
            processor = self.processor(template)
            if processor is None:
                tokenizer.save_pretrained(folder)
                extractor = getattr(self.preparer, "extractor", None)
                if extractor is not None:
                    extractor.save_pretrained(folder)
            else:
                processor.save_pretrained(folder)
        finally:
            tokenizer.chat_template = before
