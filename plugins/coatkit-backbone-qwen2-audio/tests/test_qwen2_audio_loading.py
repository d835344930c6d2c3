"""Folders, strictly read; options and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

from coatkit import AssetError, Inputs, load_backbone
from coatkit.data.audio import Samples
from coatkit.testing.backbone_bench import a_row
from coatkit.testing.sounds import tone
from coatkit_backbone_qwen2_audio import MANIFEST, WEIGHTS, coatkit_manifests
from coatkit_backbone_qwen2_audio.options import Options
from coatkit_backbone_qwen2_audio.tiny import tiny, tiny_config, tiny_processor

Load = Callable[..., Any]
Prepared = Callable[..., Inputs]
Loss = Callable[..., float]


def sound(seconds: float, seed: int = 0) -> Samples:
    return tone(seconds, 16_000, seed)


Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The tiny folder, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(folder: Path, remove: str = "", put: dict[str, torch.Tensor] | None = None) -> None:
    state = load_file(folder / "model.safetensors")
    if remove:
        del state[remove]
    save_file(state | (put or {}), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def loss(prepared: Prepared) -> Callable[..., float]:
    def run(backbone: Any) -> float:
        inputs = prepared(backbone, [a_row("a", "<audio>What?", "A dog.")], [sound(0.5)])
        with torch.no_grad():
            return float(backbone.forward(inputs).ce_sum)

    return run


def test_default_weights_that_were_not_fetched_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AssetError, match="coatkit fetch qwen2-audio"):
        load_backbone("qwen2-audio", device="cpu")


def test_a_saved_model_loads_with_equal_outputs(loss: Loss, load: Load, tmp_path: Path) -> None:
    """What transformers saves of the stock classes is a folder for `weights`."""
    model, processor = tiny(torch.float32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert loss(load(weights=str(tmp_path))) == loss(load(weights="random"))


def test_folders_have_the_published_key_layout(folder: Path) -> None:
    """transformers 5.23 keeps the layout of the published weights when it saves, so that servers can read it."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tops = {".".join(key.split(".")[:2]) for key in file.keys()}  # noqa: SIM118
    assert {top.split(".")[0] for top in tops} == {"audio_tower", "language_model", "multi_modal_projector"}
    assert {"language_model.model", "language_model.lm_head"} <= tops


def test_the_class_own_key_layout_is_read_too(loss: Loss, backbone: Any, stock: Any, load: Load, copy: Path) -> None:
    save_file({k: v.clone() for k, v in stock.state_dict().items()}, copy / "model.safetensors", {"format": "pt"})
    assert loss(load(weights=str(copy))) == loss(backbone)


def test_spare_rows_are_used(loss: Loss, load: Load, tmp_path: Path) -> None:
    """As in the real model, whose embedding has more rows than its tokenizer tokens: no row is added."""
    config = tiny_config()
    config.text_config.vocab_size += 50
    Qwen2AudioForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    backbone = load(weights=str(tmp_path))
    assert backbone.preparer.tokens.start == 262
    assert backbone.stock.get_output_embeddings().weight.shape[0] == 262 + 50
    assert torch.isfinite(torch.tensor(loss(backbone)))


@pytest.mark.parametrize(
    ("remove", "put", "message"),
    [
        ("multi_modal_projector.linear.bias", {}, r"missing keys: model\.multi_modal_projector\.linear\.bias"),
        ("", {"surplus": torch.zeros(1)}, "unexpected keys: surplus"),
        ("", {"multi_modal_projector.linear.bias": torch.zeros(3)}, r"multi_modal_projector\.linear\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    load: Load, copy: Path, remove: str, put: dict[str, torch.Tensor], message: str
) -> None:
    change_weights(copy, remove, put)
    with pytest.raises(AssetError, match=message):
        load(weights=str(copy))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folders_are_named(load: Load, copy: Path, name: str, damage: str) -> None:
    path = copy / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(AssetError, match=str(copy)):
        load(weights=str(copy))


def test_a_cut_chat_template_is_refused(load: Load, copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text()[:200])
    with pytest.raises(AssetError, match="chat template cannot be used"):
        load(weights=str(copy))


def test_a_chat_template_for_plain_text_is_refused(load: Load, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    with pytest.raises(AssetError, match="does not write a sound as"):
        load(weights=str(copy))


def test_another_feature_extractor_is_refused(load: Load, copy: Path) -> None:
    edit(copy / "processor_config.json", lambda c: c["feature_extractor"].update(feature_size=80))
    with pytest.raises(AssetError, match="gives 80 mel bins of 16000 Hz audio"):
        load(weights=str(copy))


def test_another_audio_token_is_refused(load: Load, copy: Path) -> None:
    edit(copy / "config.json", lambda c: c.update(audio_token_index=7))
    with pytest.raises(AssetError, match=r"<\|AUDIO\|> at 3 where config.json says 7"):
        load(weights=str(copy))


def test_end_of_turn_ends_an_answer_whatever_the_folder_says(loss: Loss, backbone: Any, load: Load, copy: Path) -> None:
    edit(copy / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))
    found = load(weights=str(copy))
    assert found.preparer.tokenizer.eos_token == "<|im_end|>"
    assert loss(found) == loss(backbone)


def test_a_folders_generation_settings_are_left_out(prepared: Prepared, backbone: Any, load: Load, copy: Path) -> None:
    """Greedy decoding is greedy: a published repetition penalty would change it without a word."""
    edit(copy / "generation_config.json", lambda c: c.update(repetition_penalty=5.0, do_sample=True, top_k=20))
    inputs = prepared(backbone, [a_row("a", "<audio>What?")], [sound(0.5)], train=False)
    found = load(weights=str(copy))
    found.model.eval()
    assert found.generate(inputs, max_new_tokens=12) == backbone.generate(inputs, max_new_tokens=12)
    # The penalty would have shown.
    changed = backbone.generate(inputs, max_new_tokens=12, repetition_penalty=5.0)
    assert changed != backbone.generate(inputs, max_new_tokens=12)


# Options and manifest


def test_manifest() -> None:
    assert coatkit_manifests() == [MANIFEST]
    assert (MANIFEST.name, MANIFEST.dim, MANIFEST.frame_rate) == ("qwen2-audio", 4096, 25.0)
    assert MANIFEST.assets == (WEIGHTS,)


def test_options() -> None:
    assert Options().assets() == ("qwen2-audio-7b-instruct",)
    assert Options(weights="random").assets() == Options(weights="some/folder").assets() == ()
    assert Options().long_audio == "refuse"
    with pytest.raises(ValidationError, match="long_audio"):
        Options.model_validate({"long_audio": "cut"})
