"""Holding a frozen language model in 8 or 4 bits with bitsandbytes, so that adapters alone are learnt over it (QLoRA).

The layers are replaced after our own strict loading, not by `from_pretrained`: that works for every backbone however
it reads its weights, random ones among them, and no weight can be missing unseen.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from coatkit.errors import PluginError

EXTRA = "coatkit[qlora]"
_SAMPLE = 1024


def quantize(language_model: nn.Module, mode: str, dtype: torch.dtype, device: torch.device) -> str:
    """Replace the linear layers of a language model's decoder layers by bitsandbytes' on `device`, one at a time.

    Embeddings and norms, and what is no part of the language model (tower, projector, output matrix), stay as they are.

    Args:
        language_model: On the CPU, with `layers`.
        mode: `nf4` (with the scales quantised too) or `int8` (LLM.int8(), inputs beyond 6 apart).
        dtype: Type of the matrix products.
        device: Where the layers are to be.

    Returns:
        Digest of a sample of the weights as they were: the same whatever the device that made them small.

    Raises:
        PluginError: If bitsandbytes is not installed, cannot be loaded, or has no code for this device.
    """
    bnb = _bitsandbytes()
    digest = hashlib.sha256(mode.encode())
    for parent, name, path in _linear_layers(language_model):
        old = getattr(parent, name)
        digest.update(f"{path}{tuple(old.weight.shape)}".encode() + _sample(old.weight))
        try:
            setattr(parent, name, _small(bnb, old, mode, dtype).to(device))
        except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
            raise PluginError(
                f"quantize: {mode}: bitsandbytes {bnb.__version__} cannot hold weights on {device.type}: {error};"
                " set `quantize: none`"
            ) from None
    return digest.hexdigest()


def _bitsandbytes() -> Any:
    # In every call it would warn that LLM.int8() rounds inputs to float16, as that does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except Exception as error:  # a half-installed one fails in many ways
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
        raise PluginError(f"quantize: bitsandbytes {why}; install it with: pip install '{EXTRA}'") from None
    return bitsandbytes


def _linear_layers(language_model: Any) -> list[tuple[nn.Module, str, str]]:
    """Each with the module that holds it, its name there, and its path in the layers."""
    return [
        (module, name, f"{path}.{name}")
        for path, module in language_model.layers.named_modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]


def _small(bnb: Any, old: nn.Linear, mode: str, dtype: torch.dtype) -> Any:
    made: Any
    shape = (old.in_features, old.out_features, old.bias is not None)
    with torch.device("meta"):  # the weights come from the layer it replaces
        if mode == "nf4":
            made = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
        else:
            made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
    weight = old.weight.detach()
    if mode == "nf4":
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
        # On some CPUs it would repack weights in place when it answers, and compute in bfloat16 whatever `dtype` says.
        made.support_avx512bf16_for_cpu = False
    else:
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = old.bias
    return made


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    taken: bytes = flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu().numpy().tobytes()
    return taken


def fingerprint(model: nn.Module, digest: str) -> str:
    """Identity of the frozen weights, those that were made small by what they were made from (`quantize`'s digest)."""
    found = hashlib.sha256(digest.encode())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not is_small(parameter):
            found.update(f"{name}{tuple(parameter.shape)}".encode() + _sample(parameter))
    return found.hexdigest()


def is_small(parameter: Tensor) -> bool:
    """Whether a parameter holds codes of 8 or 4 bits, which have no meaning apart from their scales."""
    return not parameter.is_floating_point()


def dequantized(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain linear layer that computes what a quantised one does, for merging adapters and for export.

    Merging into the quantised weights instead would round the adapters away.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    source: Any = layer
    weight = dequantize_bnb_weight(source.weight, state=getattr(source, "state", None)).to(dtype)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=source.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if source.bias is not None:
        made.bias = nn.Parameter(source.bias.detach().to(dtype), requires_grad=False)
    return made
