"""The same classes in a tiny size with random weights: for tests, and for the option `weights: random`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AudioFlamingo3Encoder,
    AudioFlamingo3EncoderConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from coatkit.backbones.tiny import TEXT, byte_tokenizer
from coatkit_backbone_mini.assembly import save_backbone
from coatkit_backbone_mini.parts import Parts
from coatkit_backbone_mini.tokens import PAD, TURN_END, TURN_START


def tiny_folder(path: Path, seed: int = 0) -> Path:
    """Write a complete backbone folder of under 2 MB with random weights. Needs no asset and no network.

    Args:
        path: Folder to write, made if missing.
        seed: Seed of the weights; torch's global generator is left as it was.

    Returns:
        `path`.
    """
    save_backbone(tiny_parts(seed), path)
    return path


def tiny_parts(seed: int = 0) -> Parts:
    """A two-layer Llama of width 64 (head width 32) and a one-layer Whisper encoder of width 32, at random."""
    tokenizer = byte_tokenizer([PAD, TURN_START, TURN_END], "", eos=TURN_END, pad=PAD)
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        head_dim=32,
        **TEXT,
    )
    audio_config = AudioFlamingo3EncoderConfig(
        num_mel_bins=80,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_source_positions=1500,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = LlamaForCausalLM(text_config)
        audio = AudioFlamingo3Encoder(audio_config)
    return Parts(
        tokenizer=tokenizer,
        text_config=text_config,
        text_state=text.model.state_dict(),
        output_rows=text.lm_head.weight.detach(),
        audio_config=audio_config,
        audio_state=audio.state_dict(),
    )
