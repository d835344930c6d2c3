"""Letting the audio tower run on shorter log-mel than 30 s."""

from __future__ import annotations

from typing import Any

from torch import nn

from coatkit.backbones import whisper


def allow_short_mel(tower: nn.Module) -> None:
    """Let Qwen2-Audio's tower take log-mel of any even length up to its own, which it otherwise refuses.

    Frames of padding are masked in its attention, and neither convolution sees past two of them, so leaving them out
    changes nothing but the order of sums. The tower checks the length against its configuration: that is lent the
    shorter length for the call, and its positions are cut to it.
    """
    whisper.allow_short_windows(tower)
    config: Any = tower.config
    full: int = config.max_source_positions

    def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mel = kwargs["input_features"] if "input_features" in kwargs else args[0]
        config.max_source_positions = min(full, mel.shape[-1] // 2)

    def restore(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        config.max_source_positions = full

    tower.register_forward_pre_hook(shorten, with_kwargs=True)
    tower.register_forward_hook(restore, always_call=True)
