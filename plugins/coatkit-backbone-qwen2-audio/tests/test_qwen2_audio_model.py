"""The adapter beside the stock model: the same numbers on a fraction of the frames, and no way into its old merge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration

from coatkit import DataError, Inputs
from coatkit.backbones import whisper
from coatkit.backbones.tiny import tiny_model
from coatkit.data.audio import Samples
from coatkit.testing.backbone_bench import a_row
from coatkit.testing.sounds import tone
from coatkit_backbone_qwen2_audio.backbone import Qwen2Audio
from coatkit_backbone_qwen2_audio.sizes import real_config
from coatkit_backbone_qwen2_audio.tiny import tiny_config

RATE = 16_000
Load = Callable[..., Any]
Prepared = Callable[..., Inputs]


def sound(seconds: float, seed: int = 0) -> Samples:
    return tone(seconds, 16_000, seed)


ROWS = [
    a_row("one", "<audio>Which animal is it?", "A dog."),
    a_row("text", "Capital of France?", "Paris."),
    a_row("two", "<audio>What?", "Rain.", "And <audio>?", "A bell."),
]
SOUNDS = [sound(0.4, 1), sound(3.337, 2), sound(0.07, 3)]


def full(tokens: dict[str, Any], processor: Any) -> dict[str, Any]:
    """The same inputs with the stock processor's log-mel of 3000 frames."""
    mel = processor(text=["<|AUDIO|>"] * 3, audio=SOUNDS, sampling_rate=RATE, return_tensors="pt", padding=True)
    return {**tokens, "input_features": mel["input_features"], "feature_attention_mask": mel["feature_attention_mask"]}


def test_loss_states_and_features_are_the_stock_models(
    prepared: Prepared, backbone: Any, stock: Any, processor: Any
) -> None:
    """The stock model runs on 3000 frames, without a hook; the block's rows start as what its own new rows are."""
    inputs = prepared(backbone, ROWS, SOUNDS)
    tower: list[Any] = []
    handle = stock.model.audio_tower.register_forward_hook(lambda module, args, out: tower.append(out[0]))
    with torch.no_grad():
        ours = backbone.forward(inputs)
        tokens = full(inputs.tokens, processor)
        theirs = stock(**tokens, labels=inputs.labels, output_hidden_states=True, use_cache=False)
    handle.remove()
    assert inputs.tokens["input_features"].shape[-1] == 336
    assert tokens["input_features"].shape[-1] == 3000
    torch.testing.assert_close(ours.ce_sum / ours.ce_count, theirs.loss, rtol=1e-5, atol=1e-5)
    states = theirs.hidden_states[-1][inputs.audio_row[:, None], inputs.think_index]
    torch.testing.assert_close(ours.thinking[inputs.think_mask], states[inputs.think_mask], rtol=0, atol=1e-5)
    frames = whisper.valid_frames(tower[0], tokens["feature_attention_mask"])
    inside = torch.arange(83) < ours.audio.lengths[:, None]
    assert ours.audio.lengths.tolist() == [10, 83, 2]
    torch.testing.assert_close(ours.audio.tower[inside], frames, rtol=0, atol=1e-5)
    consumed = stock.model.multi_modal_projector(frames)
    torch.testing.assert_close(ours.audio.consumed[inside], consumed, rtol=0, atol=1e-5)


def test_the_tower_is_whole_again_after_a_call(backbone: Any, stock: Any) -> None:
    tower, positions = backbone.tower, stock.model.audio_tower.embed_positions.weight
    for mel in (torch.zeros(1, 128, 100), torch.zeros(1, 128, 3000)):
        tower(mel)
        assert tower.config.max_source_positions == 1500
        assert torch.equal(tower.embed_positions.weight, positions)
    with pytest.raises(RuntimeError):
        tower(torch.zeros(1, 3, 100))
    # What the stock tower refuses beside short inputs is refused as before.
    for odd in (101, 3002):
        with pytest.raises(ValueError, match="expects the mel input features to be of length"):
            tower(torch.zeros(1, 128, odd))
    assert tower.config.max_source_positions == 1500
    assert torch.equal(tower.embed_positions.weight, positions)


def test_a_learning_tower_gets_the_stock_gradient(prepared: Prepared, load: Load, folder: Path, processor: Any) -> None:
    backbone = load(train={"tower": "full", "lm": "none", "tokens": "none"})
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = prepared(backbone, ROWS, SOUNDS)
    out = backbone.forward(inputs)
    (out.ce_sum / out.ce_count).backward()
    stock(**full(inputs.tokens, processor), labels=inputs.labels, use_cache=False).loss.backward()
    theirs = dict(stock.model.audio_tower.named_parameters())
    compared = 0
    for name, parameter in backbone.tower.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared == len(theirs) - 1  # all but the positions
    assert backbone.tower.embed_positions.weight.grad is None


# The merge of the model's first version


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    merge = model.model._merge_input_ids_with_audio_features

    def watch(*args: Any) -> Any:
        calls.append(args)
        return merge(*args)

    monkeypatch.setattr(model.model, "_merge_input_ids_with_audio_features", watch)
    return calls


def test_the_trap_is_there(stock: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model takes a sound of one token, as its processor expands it, for one that is not expanded."""
    calls = watched(stock, monkeypatch)
    tokens = processor(text=["<|AUDIO|>?"], audio=[sound(0.05)], sampling_rate=RATE, return_tensors="pt")
    assert int((tokens["input_ids"] == processor.audio_token_id).sum()) == 1
    with torch.no_grad():
        stock(**tokens)
    assert len(calls) == 1


def test_the_old_merge_is_never_reached(prepared: Prepared, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(backbone.stock, monkeypatch)
    shortest = sound(961 / RATE)
    inputs = prepared(backbone, ROWS, [shortest] * 3)
    assert inputs.audio_lengths.tolist() == [2, 2, 2]
    with torch.no_grad():
        backbone.forward(inputs)
        backbone.generate(prepared(backbone, ROWS, [shortest] * 3, train=False), max_new_tokens=3)
        # Inputs that another preparer might give: the placeholders are as many, and none beside another.
        inputs = prepared(backbone, ROWS[:1], [shortest])
        ids = inputs.tokens["input_ids"]
        at = int(inputs.audio_index[0, 1])
        ids[0, at : at + 2] = ids[0, at : at + 2].flip(0)
        for run in (backbone.forward, backbone.generate):
            with pytest.raises(DataError, match="rows one: no two audio placeholders are neighbours"):
                run(inputs)
    assert not calls


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_placeholders_are_counted_before_the_model_runs(prepared: Prepared, backbone: Any, run: str) -> None:
    """Too few, too many, and as many in all but in other rows than their sounds."""
    for change in ("few", "many", "moved", "no mel"):
        inputs = prepared(backbone, ROWS, SOUNDS)
        ids = inputs.tokens["input_ids"]
        if change == "no mel":
            del inputs.tokens["feature_attention_mask"]
        if change in ("few", "moved"):
            ids[0, inputs.audio_index[0, 0]] = ids[0, 0]
        if change in ("many", "moved"):
            ids[1, 3] = backbone.preparer.audio_token
        with pytest.raises(DataError, match=r"rows one, text, two: .*placeholders for sounds of \[10, 0, 85\]"):
            getattr(backbone, run)(inputs)


# The language model


def test_adapters_are_on_the_language_model_only(backbone: Any) -> None:
    adapted = [n.removesuffix(".lora_A") for n, _ in backbone.model.named_modules() if n.endswith(".lora_A")]
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sorted(adapted) == sorted(f"model.language_model.layers.{i}.{name}" for i in (0, 1) for name in layers)


def test_the_class_never_ties_its_embeddings() -> None:
    """It has no way to: the output matrix is its own even where a configuration asks for one."""
    for tie in (False, True):
        config = tiny_config()
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tie
        model = tiny_model(Qwen2AudioForConditionalGeneration, config)
        ends = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert ends[0].data_ptr() != ends[1].data_ptr()


# The real size


def test_the_real_size_is_the_readmes() -> None:
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(real_config())
    parts = {
        "audio tower": model.model.audio_tower,
        "projector": model.model.multi_modal_projector,
        "language model's layers and norm": [model.model.language_model.layers, model.model.language_model.norm],
        "input embeddings": model.get_input_embeddings(),
        "output matrix": model.lm_head,
        "all": model,
    }
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name, part in parts.items():
        modules = part if isinstance(part, list) else [part]
        count = sum(p.numel() for module in modules for p in module.parameters())
        assert re.search(rf"^\| {name} \|.*\b{count:,}\b", readme, re.MULTILINE), f"{name}: {count:,}"
    assert "8,397,094,912" in str(real_config.__doc__)


def test_it_can_be_planned() -> None:
    """On the meta device, in its real size: what a 10 s sound costs the tower, and what learns."""
    backbone = Qwen2Audio()
    sketch = backbone.sketch()
    assert all(p.is_meta for p in backbone.model.parameters())
    assert (backbone.hidden_size, backbone.audio_dims) == (4096, {"consumed": 4096, "tower": 1280})
    assert sketch.vocabulary == 156_032
    # 32 layers, rank 16: (4096 + 4096) for each of four, (4096 + 11008) for each of three.
    assert {k: sum(p.numel() for p in v) for k, v in backbone.parts().items()} == {
        "lora": 32 * 16 * (4 * 8192 + 3 * 15_104),
        "tokens": 3 * 4096,
    }
    assert 0.5e12 < sketch.tower_flops(10.0) < 1e12
