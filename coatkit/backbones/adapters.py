"""Low-rank adapters on the parts of a stock model, and putting them into its weights for good."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from coatkit.backbones.options import BackboneOptions
from coatkit.backbones.quantize import dequantized, is_small
from coatkit.errors import PluginError


def add_adapters(stock: Any, options: BackboneOptions, paths: Mapping[str, str]) -> Any:
    """Put adapters on every part whose `train` option is `lora`; gives peft's handle, or None where there is none.

    Args:
        stock: The model; its modules are changed in place.
        options: `lora.targets` are names of linear layers of the language model; in tower and projector every linear
            layer gets an adapter.
        paths: Dotted place in the model of `lm`, `tower` and `projector`, of which the last may lie in the second.

    Raises:
        PluginError: If a part has no such layer.
    """
    from peft import LoraConfig, get_peft_model

    targets: list[str] = []
    if options.train.lm == "lora":
        names = "|".join(map(re.escape, options.lora.targets))
        # Anchored to the language model: bare names would reach the audio tower too.
        pattern = re.compile(rf"{re.escape(paths['lm'])}\.layers\.\d+\.(.*\.)?({names})")
        targets += (name for name, _ in stock.named_modules() if pattern.fullmatch(name))
        if not targets:
            raise PluginError(f"lora.targets {options.lora.targets} fit no layer of the language model")
    for part in ("tower", "projector"):
        if getattr(options.train, part) == "lora":
            found = _linear_layers(stock, paths, part)
            if not found:
                raise PluginError(f"train.{part}: lora: it has no linear layer; use full or none")
            targets += found
    if not targets:
        return None
    lora = options.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, targets)),
    )
    # By these peft chooses adapters that know quantised layers.
    stock.is_loaded_in_4bit, stock.is_loaded_in_8bit = options.quantize == "nf4", options.quantize == "int8"
    try:
        with warnings.catch_warnings():  # peft still reads a property that transformers renames
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(stock, config)
    except ValueError as error:
        raise PluginError(f"lora.targets {lora.targets}: {error}") from None


def _linear_layers(stock: Any, paths: Mapping[str, str], part: str) -> list[str]:
    """Full names of the linear layers of `tower` or `projector`; the projector's are not the tower's."""
    found = []
    for name, module in stock.named_modules():
        within, projects = (f"{name}.".startswith(f"{paths[place]}.") for place in (part, "projector"))
        if isinstance(module, nn.Linear) and within and (part == "projector" or not projects):
            found.append(name)
    return found


@torch.no_grad()
def merge(stock: nn.Module, dtype: torch.dtype) -> None:
    """Put every adapter into the weight it adapts and take it off, for good.

    Args:
        stock: Quantised layers in it become plain ones: rounded again, they would lose what the adapters say.
        dtype: Of the weights that were adapted or quantised; the others keep theirs.
    """
    from peft.tuners.lora import LoraLayer

    for module in list(stock.modules()):
        for name, child in list(module.named_children()):
            adapted: Any = child
            if isinstance(child, LoraLayer):
                base = adapted.get_base_layer()
                base = dequantized(base, torch.float32) if is_small(base.weight) else base
                merged = base.weight.float()
                for adapter in adapted.active_adapters:
                    merged = merged + adapted.get_delta_weight(adapter).float()
                base.weight.data = merged
                setattr(module, name, base.to(dtype))  # rounded once
            elif isinstance(child, nn.Linear) and is_small(child.weight):
                setattr(module, name, dequantized(child, dtype))
