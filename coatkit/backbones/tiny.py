"""Real transformers classes in tiny sizes: what `weights: random` gives, and what tests of backbones run on.

Nothing is read from disk or network: the tokenizer is made here, with one token for each byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}
"""A language model of two layers; heads are 32 wide, the narrowest that servers take."""
AUDIO = {"num_mel_bins": 128, "encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 32, "encoder_ffn_dim": 64}
"""An audio tower of one layer, for configurations that name their fields as Whisper does."""


def tiny_model(model_class: Any, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with random weights that are the same on every machine; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).to(dtype).eval()


def byte_tokenizer(
    special: Sequence[str],
    chat_template: str,
    *,
    eos: str,
    pad: str,
    context: int = 8192,
    named: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: the special tokens in order, then one token for each of the 256 bytes.

    Args:
        named: Special tokens by the names under which a processor asks for them, e.g. `image_token`.
    """
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context,
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
        **({"extra_special_tokens": dict(named)} if named else {}),
    )
