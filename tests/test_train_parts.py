"""What `train`, `lora` and `quantize` make of each part of the four backbones, in their tiny sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coatkit.backbones import options, quantize
from coatkit.backbones.options import BackboneOptions
from coatkit.errors import PluginError, SpecError
from coatkit.testing.backbone_bench import BackboneBench, stir

BACKBONES = ("mini", "qwen2-audio", "qwen2.5-omni", "audio-flamingo-3")


def bench(name: str, folder: Path, **more: Any) -> BackboneBench:
    return BackboneBench(name, {"weights": "random", **more}, folder, (0.5, 0.7, 0.9), True)


def moved(made: BackboneBench, backbone: Any) -> set[str]:
    """Parameters that two steps over all that learns have changed, each by its first name."""
    made.step(backbone, made.prepare(backbone))  # adapters start at zero, which hides half of them
    before, after = made.step(backbone, made.prepare(backbone))
    firsts = {name for name, _ in backbone.model.named_parameters()}
    return {name for name in before if name in firsts and not torch.equal(before[name], after[name])}


def learners(backbone: Any) -> set[str]:
    return {name for name, p in backbone.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", ["new", "all"])
@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize("name", BACKBONES)
def test_all_of_the_language_model_learns(tmp_path: Path, name: str, embeddings: str, tokens: str, dtype: str) -> None:
    """The output matrix is part of it; where that is the input embedding itself, both learn as one."""
    made = bench(name, tmp_path, dtype=dtype, train={"lm": "full", "tokens": tokens, "projector": "none"})

    def change(stock: Any) -> None:
        rows = stock.get_input_embeddings().weight
        stock.get_output_embeddings().weight = rows if embeddings == "tied" else nn.Parameter(rows.detach().clone())

    backbone: Any = made.remade(change)
    where, output = backbone.language_model_path, "lm_head.weight"
    inside = {n for n, _ in backbone.model.named_parameters() if n.startswith((f"{where}.layers.", f"{where}.norm."))}
    rows = f"{where}.embed_tokens.weight"
    wanted = inside | {"thinking_rows.rows"} | ({rows} if embeddings == "tied" else {output})
    wanted |= {rows} if tokens == "all" else set()
    assert learners(backbone) == wanted
    assert moved(made, backbone) == wanted
    assert {p.dtype for part in backbone.parts().values() for p in part} == {torch.float32}
    of = {id(p): part for part, parameters in backbone.parts().items() for p in parameters}
    assert set(of.values()) == {"lm", "tokens"}
    assert of[id(backbone.stock.get_output_embeddings().weight)] == (
        "tokens" if embeddings == "tied" and tokens == "all" else "lm"
    )


@pytest.mark.parametrize("part", ["tower", "projector"])
@pytest.mark.parametrize("name", BACKBONES)
def test_adapters_on_the_hearing_parts(tmp_path: Path, name: str, part: str) -> None:
    """Every linear layer of the part gets one, with its own rate; merged they change nothing."""
    others = {"tower": "none", "projector": "none", "lm": "none", "tokens": "none"}
    made = bench(name, tmp_path, lora={"rank": 3, "alpha": 6}, train={**others, part: "lora"})
    plain, backbone = made.load(train={part: "none"}), made.load()
    paths = {"tower": plain.tower_path, "projector": plain.projector_path}  # type: ignore[attr-defined]
    linear = {n for n, m in plain.model.named_modules() if isinstance(m, nn.Linear) and f"{n}.".startswith(paths[part])}
    if part == "tower":
        linear = {n for n in linear if not f"{n}.".startswith(f"{paths['projector']}.")}
    assert learners(backbone) == {f"{n}.lora_{half}.default.weight" for n in linear for half in "AB"}
    assert linear
    assert set(backbone.parts()) == {part}
    assert {min(p.shape) for p in backbone.parts()[part]} == {3}
    assert moved(made, backbone) == learners(backbone)
    awake: Any = stir(made.load())
    inputs = made.prepare(awake)
    expected = made.forward(awake, inputs)
    awake.merge()
    assert not learners(awake)
    merged = made.forward(awake, inputs)
    assert merged.audio is not None
    assert expected.audio is not None
    torch.testing.assert_close(merged.audio.consumed, expected.audio.consumed, rtol=1e-4, atol=1e-5)


def test_a_tower_with_adapters_is_in_training_mode_and_its_cost_is_counted(tmp_path: Path) -> None:
    made = bench("mini", tmp_path, train={"tower": "lora", "projector": "none"})
    backbone: Any = made.load()
    backbone.model.train()
    assert backbone.tower.training
    frozen: Any = made.load(train={"tower": "none"})
    frozen.model.train()
    assert not frozen.tower.training
    assert frozen.tower_flops(3.0) < backbone.tower_flops(3.0) < 2 * frozen.tower_flops(3.0)
    assert frozen.tower_backward(3.0) == 0 < backbone.tower_backward(3.0)


def test_lora_options_reach_the_adapters(tmp_path: Path) -> None:
    made = bench("mini", tmp_path, lora={"rank": 5, "alpha": 20, "dropout": 0.25, "targets": ["v_proj", "up_proj"]})
    backbone: Any = made.load()
    adapted = {n: m for n, m in backbone.model.named_modules() if hasattr(m, "lora_A")}
    assert {n.rpartition(".")[2] for n in adapted} == {"v_proj", "up_proj"}
    assert all(n.startswith(f"{backbone.language_model_path}.layers.") for n in adapted)
    for layer in adapted.values():
        assert layer.r["default"] == 5
        assert layer.scaling["default"] == 4
        assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize(
    ("target", "said"), [("query", "fit no layer of the language model"), ("input_layernorm", "not supported")]
)
def test_targets_that_take_no_adapter_are_named(tmp_path: Path, target: str, said: str) -> None:
    with pytest.raises(PluginError, match=rf"lora.targets \['{target}'\].* {said}"):
        bench("mini", tmp_path, lora={"targets": [target]}).load()


# Quantising, where bitsandbytes is not installed; tests/test_qlora.py is for where it is


@pytest.fixture
def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.usefixtures("_without")
def test_checking_says_that_bitsandbytes_is_missing_and_how_to_get_it(project: Any) -> None:
    project.spec["backbone"]["quantize"] = "nf4"
    with pytest.raises(SpecError) as caught:
        project.load()
    assert "backbone.quantize" in str(caught.value)
    assert "pip install 'coatkit[qlora]'" in str(caught.value)
    assert "spec.yaml:" in str(caught.value)


@pytest.mark.usefixtures("_without")
def test_loading_says_it_too() -> None:
    with pytest.raises(PluginError, match=r"bitsandbytes is not installed; .*coatkit\[qlora\]"):
        quantize.quantize(nn.Module(), "nf4", torch.float32, torch.device("cpu"))


def test_what_is_quantised_cannot_learn(monkeypatch: pytest.MonkeyPatch, project: Any) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: object())
    project.spec["backbone"] |= {"quantize": "int8", "train": {"lm": "full"}}
    with pytest.raises(SpecError, match=r"backbone.quantize: .*train.lm must be lora or none"):
        project.load()
    with pytest.raises(ValueError, match="'none', 'int8' or 'nf4'"):
        BackboneOptions(quantize="int4")  # type: ignore[arg-type]
