"""Parity of coatkit-expert-emotion2vec with FunASR's Emotion2vec: random but equal weights on both sides.

FunASR is called as its documentation says, through `AutoModel.generate`, which takes sound by sound. Its model hub
folder, with config.yaml, is not in the package; CONFIG stands for that file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ["funasr", "torch", "numpy"]
RATE = 16_000
LIMITS = {"features": 1e-5, "plus-large": 1e-5}
NOTE = (
    "Random weights. Ours encodes all sounds in one batch, upstream each alone. plus-large is a network of that size "
    "(1024 values), its checkpoint laid out as emotion2vec+ has it, with prefix and classifier."
)

Encode = Callable[[list[np.ndarray]], list[dict[str, np.ndarray]]]
FILES = {"base": "weights.pt", "plus-large": "plus-large.pt"}
SIZES = {"base": (768, 12, 384), "plus-large": (1_024, 16, 768)}
"""Width, heads, width of the decoder."""


def _config(variant: str) -> dict[str, Any]:
    """`model_conf` of the hub's config.yaml, as far as the class reads it."""
    width, heads, decoder = SIZES[variant]
    drop_path = {"start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0}
    masking = {"mask_prob": 0.5, "mask_length": 5, "mask_noise_std": 0.01, "encoder_zero_mask": True}
    alibi = {"use_alibi_encoder": True, "alibi_scale": 1.0, "learned_alibi": False, "alibi_max_pos": None}
    alibi |= {"learned_alibi_scale": True, "learned_alibi_scale_per_head": True, "learned_alibi_scale_per_layer": False}
    audio = {
        "type": "AUDIO",
        "prenet_depth": 4,
        "prenet_layerdrop": 0.05,
        "prenet_dropout": 0.1,
        "num_extra_tokens": 10,
        "init_extra_token_zero": True,
        "local_grad_mult": 1.0,
        "ema_local_encoder": False,
        "num_alibi_heads": heads,
        "model_depth": 8,
        "extractor_mode": "layer_norm",
        "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "conv_pos_width": 95,
        "conv_pos_groups": 16,
        "conv_pos_depth": 5,
        "conv_pos_pre_ln": False,
        "decoder": {
            "decoder_dim": decoder,
            "decoder_groups": 16,
            "decoder_kernel": 7,
            "decoder_layers": 4,
            "input_dropout": 0.1,
            "add_positions_masked": False,
            "add_positions_all": False,
            "decoder_residual": True,
            "projection_layers": 1,
            "projection_ratio": 2.0,
        },
        **drop_path,
        **masking,
        **alibi,
    }
    return {
        "depth": 8,
        "num_heads": heads,
        "embed_dim": width,
        "mlp_ratio": 4.0,
        "norm_eps": 1e-5,
        "norm_affine": True,
        "layer_norm_first": False,
        "encoder_dropout": 0.1,
        "post_mlp_drop": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "dropout_input": 0.0,
        "layerdrop": 0.05,
        "end_of_block_targets": False,
        "average_top_k_layers": 8,
        "loss_beta": 0.0,
        "loss_scale": None,
        "clone_batch": 8,
        "normalize": True,
        "modalities": {"audio": audio},
        **drop_path,
    }


def _write(path: Path, variant: str) -> None:
    """A checkpoint as upstream's training writes it, with random tensors of which no two could be swapped unseen."""
    import torch
    from funasr.models.emotion2vec.model import Emotion2vec

    torch.manual_seed(0)
    model = Emotion2vec(model_conf=_config(variant), vocab_size=-1 if variant == "base" else 9).requires_grad_(False)
    for name, value in model.named_parameters():
        if "alibi_scale" in name:  # one of them below zero, which counts as zero
            value.copy_(torch.linspace(-0.1, 2.0, value.numel()).view_as(value))
        elif "extra_tokens" in name:
            value.normal_()
        elif value.ndim == 1:
            value += 0.2 * torch.randn_like(value)
        elif "qkv" in name:
            value[: 2 * value.shape[1]] *= 3
    tensors = dict(model.state_dict())
    if variant != "base":  # emotion2vec+ has lost its decoder, and has the model within another
        kept = {name: value for name, value in tensors.items() if ".decoder." not in name}
        tensors = {name if name.startswith("proj.") else f"d2v_model.{name}": value for name, value in kept.items()}
    torch.save({"args": None, "cfg": {"model": {"_name": "data2vec_multi"}}, "model": tensors, "extra_state": {}}, path)


def _upstream(path: Path, variant: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from funasr import AutoModel

    if not path.is_file():
        _write(path, variant)
    model = AutoModel(
        model="Emotion2vec",
        model_conf=_config(variant),
        init_param=str(path),
        scope_map=["d2v_model.", "none"],
        device="cpu",
        ncpu=torch.get_num_threads(),  # it would set four
        disable_update=True,
        disable_pbar=True,
        disable_log=True,
    )

    def encode(samples: np.ndarray) -> np.ndarray:
        (result,) = model.generate(samples, granularity="frame", extract_embedding=True)
        found: np.ndarray = result["feats"]
        return found

    return encode


def upstream(folder: Path, extras: bool = True) -> Encode:
    """`AutoModel.generate` for each sound; with extras, also a network of plus-large's size."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints what its loader misses, where `serve` answers
        models = {"features": _upstream(folder / FILES["base"], "base")}
        if extras:
            models["plus-large"] = _upstream(folder / FILES["plus-large"], "plus-large")

    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        with contextlib.redirect_stdout(sys.stderr):
            return [{key: model(samples) for key, model in models.items()} for samples in heard]

    return encode


def ours(folder: Path, extras: bool = True) -> Encode:
    """The expert, one batch of all sounds, for each of the two sizes."""
    import torch

    import coatkit

    variants = {"features": "base", "plus-large": "plus-large"}
    experts = {
        key: coatkit.load_expert("emotion2vec", variant=variant, weights=str(folder / FILES[variant]))
        for key, variant in variants.items()
        if extras or key == "features"
    }

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        audio = coatkit.AudioBatch.from_arrays(heard, RATE)
        found: list[dict[str, np.ndarray]] = [{} for _ in heard]
        for key, expert in experts.items():
            features = expert.encode(audio)
            for arrays, values, length in zip(found, features.values, features.lengths.tolist(), strict=True):
                arrays[key] = values[:length].numpy()
        return found

    return encode
