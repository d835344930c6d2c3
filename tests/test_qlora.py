"""Language models held in 8 and 4 bits, with adapters over them; needs bitsandbytes (`make test-qlora`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coatkit import build, infer
from coatkit.backbones.quantize import dequantized
from coatkit.export.write import export
from coatkit.testing.backbone_bench import BackboneBench

pytest.importorskip("bitsandbytes", reason="make test-qlora runs these in an environment that has bitsandbytes")

BACKBONES = ("mini", "qwen2-audio", "qwen2.5-omni", "audio-flamingo-3")


def bench(name: str, folder: Path, **options: Any) -> BackboneBench:
    return BackboneBench(name, {"weights": "random", **options}, folder, (0.5, 0.7, 0.9), True)


def small(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.is_floating_point()}


def wake(backbone: Any) -> None:
    """Adapters start without effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=[(n, m) for n in BACKBONES for m in ("nf4", "int8")], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BackboneBench, Any]:
    name, mode = request.param
    made = bench(name, tmp_path_factory.mktemp("bench"), quantize=mode)
    return made, made.load()


def test_the_decoders_linear_layers_are_small_and_nothing_else(case: tuple[BackboneBench, Any]) -> None:
    _, backbone = case
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = len(backbone.language_model.layers)
    found = small(backbone.model)
    assert len(found) == layers * len(linear)
    assert all(name.startswith(f"{backbone.language_model_path}.layers.") for name in found)
    assert {name.split(".")[-3] for name in found} == set(linear)
    assert {p.dtype for part in backbone.parts().values() for p in part} == {torch.float32}


def test_it_computes_about_what_the_weights_do(case: tuple[BackboneBench, Any]) -> None:
    made, backbone = case
    inputs = made.prepare(backbone)
    plain = made.load(quantize="none")
    ours, theirs = made.forward(backbone, inputs), made.forward(plain, inputs)
    assert ours.thinking is not None
    assert theirs.thinking is not None
    gap = (ours.thinking - theirs.thinking).norm() / theirs.thinking.norm()
    assert 0 < gap < (0.2 if backbone.options.quantize == "nf4" else 0.02)


def test_steps_move_the_adapters_alone_and_merged_it_answers_the_same(case: tuple[BackboneBench, Any]) -> None:
    made, _ = case
    backbone: Any = made.load()
    wake(backbone)
    inputs, asked = made.prepare(backbone), made.prepare(backbone, train=False)
    identity = backbone.fingerprint()
    before, after = made.step(backbone, inputs, 3)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    plain, answers = made.forward(backbone, inputs), made.generate(backbone, asked, 12)
    assert backbone.fingerprint() == identity
    backbone.merge()
    assert not small(backbone.model)
    assert not any("lora_" in name for name, _ in backbone.model.named_parameters())
    merged = made.forward(backbone, inputs)
    # LLM.int8() rounds inputs too, so that plain weights come near it and no more.
    near = 1e-5 if backbone.options.quantize == "nf4" else 1e-3
    assert float(merged.ce_sum) == pytest.approx(float(plain.ce_sum), rel=near)
    assert made.generate(backbone, asked, 12) == answers


def test_the_fingerprint_is_that_of_the_weights_it_was_made_from(tmp_path: Path) -> None:
    made = bench("mini", tmp_path, quantize="nf4")
    one, other = made.load().fingerprint(), made.load().fingerprint()
    assert one == other

    class Doubled(made.component.load_class()):  # type: ignore[misc]
        """The same codes and other scales."""

        def build(self, dtype: torch.dtype) -> Any:
            stock, preparer = super().build(dtype)
            for layer in stock.model.language_model.layers.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.data.mul_(2)
            return stock, preparer

    doubled = Doubled(weights="random", quantize="nf4")
    with build.seeded(0, "backbone"):
        doubled.load(torch.device("cpu"))
    plain = made.load()
    assert all(
        torch.equal(a, b)
        for (name, a), (_, b) in zip(plain.model.named_parameters(), doubled.model.named_parameters(), strict=True)
        if name in small(plain.model)
    )
    found = {one, doubled.fingerprint(), made.load(quantize="int8").fingerprint()}
    assert len(found | {made.load(quantize="none").fingerprint()}) == 4


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True}, {"train": {"lm": "none"}}]
)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_other_options_go_with_it(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    made = bench("mini", tmp_path, quantize=mode, **options)
    backbone = made.load()
    wake(backbone)
    inputs = made.prepare(backbone)
    gradients = made.gradients(backbone, inputs)
    learn = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is not None} == learn
    assert all(bool(gradients[name].isfinite().all()) for name in learn)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def trained(request: pytest.FixtureRequest, new_project: Callable[[], Any]) -> Any:
    """A project with a quantised backbone, and its run."""
    project = new_project()
    project.spec["backbone"]["quantize"] = request.param
    project.spec["checkpoint"] = {"every": 2, "keep": 100}
    return project, project.train()


def test_a_run_learns_resumes_to_the_bit_and_answers(trained: Any) -> None:
    project, run = trained
    again = project.folder / "again"
    (again / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "spec.yaml", "metrics.jsonl"):
        (again / name).write_bytes((run.folder / name).read_bytes())
    os.symlink(run.folder / "checkpoints/step-00000002", again / "checkpoints/step-00000002")
    resumed = project.train("output=again", resume=True)
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = resumed.tensors(file=file), run.tensors(file=file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not [name for name in run.tensors() if "absmax" in name or name.endswith("SCB")]
    clip = project.folder / "clips/r03.flac"
    answer = infer.load(run.folder, device="cpu").ask(clip, "What is heard?", max_new_tokens=8)
    assert answer == infer.load(again, device="cpu").ask(clip, "What is heard?", max_new_tokens=8)


def test_an_export_has_plain_weights_that_the_stock_class_finds(trained: Any, tmp_path: Path) -> None:
    _, run = trained
    folder = export(run.folder, tmp_path / "whole", merge=True).folder
    backbone: Any = infer.load(run.folder, device="cpu").backbone
    stock, told = type(backbone.stock).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(told.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    layer = backbone.language_model.layers[0].self_attn.q_proj
    expected = dequantized(layer.get_base_layer(), torch.float32).weight + layer.get_delta_weight("default")
    path = f"{backbone.language_model_path}.layers.0.self_attn.q_proj.weight"
    assert torch.equal(stock.get_parameter(path), expected)
    adapter = load_file(export(run.folder, tmp_path / "adapter").folder / "adapter_model.safetensors")
    (name,) = [n for n in adapter if n.endswith("layers.0.self_attn.q_proj.lora_B.weight")]
    assert torch.equal(adapter[name], layer.lora_B["default"].weight)


@pytest.mark.parametrize("how", ["repeated", "sharded"])
def test_two_processes_give_one_processes_losses(trained: Any, how: str) -> None:
    project, run = trained
    code = "import torch; torch.set_num_threads(1); from coatkit.cli import main; main()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node=2"]
    command += [sys.executable, "-c", code, "train", str(project.folder / "spec.yaml"), "--set", f"output={how}"]
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": str(how == "sharded").lower()}
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = type(run)(project.folder / how, None).metrics
    assert len(metrics) == len(run.metrics)
    # Rows are padded to the longest of a process's share, and LLM.int8() rounds what it reads.
    near = 2e-4 if project.spec["backbone"]["quantize"] == "nf4" else 5e-3
    for ours, theirs in zip(metrics, run.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=near)
