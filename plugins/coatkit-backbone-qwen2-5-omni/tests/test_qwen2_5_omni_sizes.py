"""The real size, on torch's meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from coatkit_backbone_qwen2_5_omni.backbone import Qwen25Omni
from coatkit_backbone_qwen2_5_omni.sizes import plan_config


@pytest.fixture(scope="module")
def real() -> Any:
    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(plan_config())


def test_the_real_size_is_the_published_one(real: Any) -> None:
    """Tensors by part and the bytes in bfloat16, as the index of a published thinker of this model gives them."""
    state = real.state_dict()
    counts = [sum(key.startswith(f"model.{p}.") for key in state) for p in ("visual", "audio_tower", "language_model")]
    assert counts == [518, 489, 338]
    assert len(state) == 1346
    assert 2 * sum(p.numel() for p in real.parameters()) == 17_863_627_776


def test_the_real_size_is_the_readmes(real: Any) -> None:
    language = real.model.language_model
    parts = {
        "audio tower": [real.model.audio_tower],
        "projector": [real.model.audio_tower.proj],
        "language model's layers and norm": [language.layers, language.norm],
        "input embeddings": [real.get_input_embeddings()],
        "output matrix": [real.lm_head],
        "image encoder": [real.model.visual],
    }
    sums = {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in parts.items()}
    sums["audio tower"] -= sums["projector"]
    everything = sum(p.numel() for p in real.parameters())
    assert sum(sums.values()) == everything
    sums["all that is loaded"] = everything - sums["image encoder"]
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name, count in sums.items():
        assert re.search(rf"^\| {name} \|.*\b{count:,}\b", readme, re.MULTILINE), f"{name}: {count:,}"
    for count in (everything, sums["all that is loaded"]):
        assert f"{count:,}" in str(plan_config.__doc__)


def test_it_can_be_planned() -> None:
    """What learns, and what a 10 s sound costs the tower."""
    backbone = Qwen25Omni()
    sketch = backbone.sketch()
    assert all(p.is_meta for p in backbone.model.parameters())
    assert not any("visual" in name for name, _ in backbone.model.named_parameters())
    assert (backbone.hidden_size, backbone.audio_dims) == (3584, {"consumed": 3584, "tower": 1280})
    assert sketch.vocabulary == 152_064
    # 28 layers, rank 16: q and o, k and v, then gate, up and down.
    widths = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944)
    assert {k: sum(p.numel() for p in v) for k, v in backbone.parts().items()} == {
        "lora": 28 * 16 * widths,
        "tokens": 3 * 3584,
    }
    # 0.63 B parameters at 50 frames of each of 10 s, two operations each, and little for attention in blocks of 2 s.
    assert 0.6e12 < sketch.tower_flops(10.0) < 0.75e12
