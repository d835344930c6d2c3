"""Folders with the whole model or its thinker, strictly read; options and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerConfig

from coatkit import AssetError, Inputs, load_backbone
from coatkit.backbones.folder import transformers_quiet
from coatkit.backbones.tiny import tiny_model
from coatkit.testing.backbone_bench import a_row
from coatkit.testing.sounds import tone
from coatkit_backbone_qwen2_5_omni import MANIFEST, WEIGHTS, coatkit_manifests
from coatkit_backbone_qwen2_5_omni.options import Options
from coatkit_backbone_qwen2_5_omni.tiny import CHAT_TEMPLATE, tiny_config, tiny_parts

Load = Callable[..., Any]
Prepared = Callable[..., Inputs]
Edit = Callable[[dict[str, Any]], object]
Loss = Callable[..., float]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The tiny folder, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put_weights(folder: Path, change: Edit) -> None:
    state: dict[str, Any] = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def tops(path: Path) -> set[str]:
    return {key.partition(".")[0] for key in load_file(path / "model.safetensors")}


@pytest.fixture(scope="session")
def loss(prepared: Prepared) -> Loss:
    def run(backbone: Any) -> float:
        inputs = prepared(backbone, [a_row("a", "<audio>What?", "A dog.")], [tone(0.5, 16_000)])
        with torch.no_grad():
            return float(backbone.forward(inputs).ce_sum)

    return run


def test_default_weights_that_were_not_fetched_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AssetError, match=r"coatkit fetch qwen2\.5-omni"):
        load_backbone("qwen2.5-omni", device="cpu")


# The whole model and the thinker


def test_the_thinker_is_read_from_the_whole_model(folder: Path, backbone: Any) -> None:
    """Every tensor of it, in the published keys; speech output stays in the file."""
    state = load_file(folder / "model.safetensors")
    assert {key.partition(".")[0] for key in state} == {"thinker", "talker", "token2wav"}
    assert {"thinker.model.layers.0.self_attn.q_proj.weight", "thinker.lm_head.weight"} <= set(state)
    ours = {
        name.replace(".base_layer", ""): p
        for name, p in backbone.model.named_parameters()
        if "lora_" not in name and "thinking_rows" not in name
    }
    found = 0
    for key, value in state.items():
        name = key.removeprefix("thinker.")
        name = name if name.startswith("lm_head") else f"model.{name}".replace("model.model.", "model.language_model.")
        if key.startswith("thinker.") and not key.startswith("thinker.visual."):
            assert torch.equal(ours[name], value), key
            found += 1
    assert found == len(ours)


def test_a_saved_thinker_loads_with_equal_outputs(loss: Loss, load: Load, tmp_path: Path) -> None:
    """What transformers saves of the thinker alone is a folder for `weights`, in keys without `thinker.`."""
    for part in tiny_parts(torch.float32):
        part.save_pretrained(tmp_path)
    assert tops(tmp_path) == {"audio_tower", "lm_head", "model", "visual"}
    assert loss(load(weights=str(tmp_path))) == loss(load(weights="random"))


def test_a_thinker_taken_from_the_whole_is_saved_under_its_prefix(
    loss: Loss, load: Load, backbone: Any, stock: Any, folder: Path, tmp_path: Path
) -> None:
    """transformers 5.23 writes the keys it read: what servers need of an export."""
    shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with transformers_quiet():
        stock.save_pretrained(tmp_path / "one")
    assert tops(tmp_path / "one") == {"thinker"}
    assert loss(load(weights=str(tmp_path / "one"))) == loss(backbone)


def test_the_class_own_key_layout_is_read_too(loss: Loss, load: Load, backbone: Any, stock: Any, copy: Path) -> None:
    state = {key: value.clone() for key, value in stock.state_dict().items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert loss(load(weights=str(copy))) == loss(backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("thinker.audio_tower.proj.bias"), r"missing keys: model\.audio_tower\.proj\.bias"),
        (lambda s: s.pop("thinker.visual.merger.ln_q.weight"), r"missing keys: model\.visual\.merger\.ln_q\.weight"),
        (lambda s: s.pop("thinker.lm_head.weight"), r"missing keys: lm_head\.weight"),
        (
            lambda s: s.update({"thinker.model.layers.9.mlp.up_proj.weight": torch.zeros(1)}),
            r"unexpected keys.*layers\.9",
        ),
        (lambda s: s.update({"thinker.surplus": torch.zeros(1)}), "unexpected keys: surplus"),
        (lambda s: s.update({"speaker.weight": torch.zeros(1)}), r"unexpected keys: speaker\.weight"),
        (lambda s: s.update({"thinker.audio_tower.proj.bias": torch.zeros(3)}), r"mismatched keys.*proj\.bias"),
    ],
)
def test_thinker_weights_that_do_not_fit_are_named(load: Load, copy: Path, change: Edit, message: str) -> None:
    put_weights(copy, change)
    with pytest.raises(AssetError, match=message):
        load(weights=str(copy))


def test_speech_output_is_not_looked_at(loss: Loss, load: Load, backbone: Any, copy: Path) -> None:
    """Too much of it, or none: it is never read."""

    def change(state: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith("talker.")]:
            del state[key]
        state["token2wav.surplus"] = torch.zeros(1)

    put_weights(copy, change)
    assert loss(load(weights=str(copy))) == loss(backbone)


def test_spare_rows_are_used(loss: Loss, load: Load, tmp_path: Path) -> None:
    """As in the real model, whose embedding has more rows than its tokenizer tokens: no row is added."""
    config = tiny_config()
    config.text_config.vocab_size += 50
    model, tokenizer, extractor = tiny_parts(torch.float32)
    for part in (tiny_model(type(model), config), tokenizer, extractor):
        part.save_pretrained(tmp_path)
    backbone = load(weights=str(tmp_path))
    assert backbone.preparer.tokens.start == 267
    assert backbone.stock.get_output_embeddings().weight.shape[0] == 267 + 50
    assert torch.isfinite(torch.tensor(loss(backbone)))


def test_tied_embeddings_in_a_folder_stay_tied(loss: Loss, load: Load, tmp_path: Path) -> None:
    config = tiny_config()
    config.tie_word_embeddings = True
    model, tokenizer, extractor = tiny_parts(torch.float32)
    for part in (tiny_model(type(model), config), tokenizer, extractor):
        part.save_pretrained(tmp_path)
    backbone = load(weights=str(tmp_path))
    assert backbone.stock.get_output_embeddings().weight is backbone.stock.get_input_embeddings().weight
    assert torch.isfinite(torch.tensor(loss(backbone)))


def test_bfloat16(loss: Loss, load: Load, backbone: Any) -> None:
    narrow = load(dtype="bfloat16")
    frozen = {p.dtype for p in narrow.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert loss(narrow) == pytest.approx(loss(backbone), rel=0.05)


# The other files


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folders_are_named(load: Load, copy: Path, name: str, damage: str) -> None:
    path = copy / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(AssetError, match=str(copy)):
        load(weights=str(copy))


def test_a_chat_template_in_the_processors_file_is_read(loss: Loss, load: Load, backbone: Any, copy: Path) -> None:
    """Older processors keep it in chat_template.json."""
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert loss(load(weights=str(copy))) == loss(backbone)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "there is no chat template"),
        (CHAT_TEMPLATE[:200], "chat template cannot be used"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "does not write a message"),
    ],
)
def test_chat_templates_that_do_not_fit_are_refused(load: Load, copy: Path, template: str | None, message: str) -> None:
    path = copy / "chat_template.jinja"
    path.unlink()
    if template is not None:
        path.write_text(template)
    with pytest.raises(AssetError, match=message):
        load(weights=str(copy))


def test_another_feature_extractor_is_refused(load: Load, copy: Path) -> None:
    edit(copy / "preprocessor_config.json", lambda c: c.update(feature_size=80))
    with pytest.raises(AssetError, match="gives 80 mel bins of 16000 Hz audio"):
        load(weights=str(copy))


def test_another_audio_token_is_refused(load: Load, copy: Path) -> None:
    edit(copy / "config.json", lambda c: c["thinker_config"].update(audio_token_index=7))
    with pytest.raises(AssetError, match=r"<\|AUDIO\|> is token 3 in its tokenizer and audio_token_index 7"):
        load(weights=str(copy))


def test_end_of_turn_ends_an_answer_whatever_the_folder_says(loss: Loss, backbone: Any, load: Load, copy: Path) -> None:
    edit(copy / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))
    found = load(weights=str(copy))
    assert found.preparer.tokenizer.eos_token == "<|im_end|>"
    assert found.stock.generation_config.eos_token_id == [2, 0]
    assert loss(found) == loss(backbone)


def test_a_folder_is_planned_as_it_is(load: Load, folder: Path) -> None:
    read = load().plan_config()
    assert isinstance(read, Qwen2_5OmniThinkerConfig)
    assert read.text_config.vocab_size == 270
    assert read.audio_config.to_dict() == tiny_config().audio_config.to_dict()


# Options and manifest


def test_manifest() -> None:
    assert coatkit_manifests() == [MANIFEST]
    assert (MANIFEST.name, MANIFEST.dim, MANIFEST.frame_rate) == ("qwen2.5-omni", 3584, 25.0)
    assert MANIFEST.assets == (WEIGHTS,)


def test_options() -> None:
    assert Options().assets() == ("qwen2.5-omni-7b",)
    assert Options(weights="random").assets() == Options(weights="some/folder").assets() == ()
