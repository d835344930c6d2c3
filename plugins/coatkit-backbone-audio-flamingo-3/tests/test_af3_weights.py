"""Folders of weights, the added rows, tied embeddings, and the real size without weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor, GenerationConfig

from coatkit import AssetError, AudioBatch, HFBackbone, Row, load_backbone
from coatkit.backbones.folder import add_thinking_tokens
from coatkit_backbone_audio_flamingo_3 import MANIFEST, WEIGHTS, coatkit_manifests
from coatkit_backbone_audio_flamingo_3.backbone import AudioFlamingo3
from coatkit_backbone_audio_flamingo_3.options import Options
from coatkit_backbone_audio_flamingo_3.sizes import plan_config
from coatkit_backbone_audio_flamingo_3.tiny import SPECIAL, tiny_parts

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TOKENS = len(SPECIAL) + 256


def of(folder: Path | str, **options: Any) -> Any:
    return load_backbone("audio-flamingo-3", weights=str(folder), device="cpu", **options)


def cost(backbone: Any, rows: list[Row], audio: AudioBatch) -> torch.Tensor:
    with torch.no_grad():
        loss: torch.Tensor = backbone.forward(backbone.preparer.prepare(rows, audio, train=True)).ce_sum
    return loss


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may break."""
    return Path(shutil.copytree(folder, tmp_path / "mine"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# The entry module and the options


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("coatkit_backbone_audio_flamingo_3", ["torch", "transformers", "pydantic", "numpy"]),
        ("coatkit_backbone_audio_flamingo_3.options", ["torch", "transformers"]),
    ],
)
def test_import_is_light(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_manifest() -> None:
    assert coatkit_manifests() == [MANIFEST]
    assert (MANIFEST.kind, MANIFEST.name, MANIFEST.dim) == ("backbone", "audio-flamingo-3", 3584)
    assert MANIFEST.assets == (WEIGHTS,)
    assert "Noncommercial" in MANIFEST.weights_licence


def test_options_and_their_assets() -> None:
    assert Options.model_validate({}).assets() == ("weights",)
    assert Options.model_validate({"weights": "random"}).assets() == ()
    assert Options.model_validate({"weights": "some/folder"}).assets() == ()
    assert Options.model_validate({}).train.projector == "none"
    with pytest.raises(ValidationError, match="weigths"):
        Options.model_validate({"weigths": "random"})


def test_default_weights_that_were_not_fetched_name_the_command() -> None:
    with pytest.raises(AssetError, match="coatkit fetch audio-flamingo-3"):
        load_backbone("audio-flamingo-3", device="cpu")


# A folder


def test_a_folder_serves_as_weights(folder: Path, stock: Any, rows: list[Row], audio: AudioBatch) -> None:
    backbone = of(folder)
    assert isinstance(backbone, HFBackbone)
    names = {n.replace(".base_layer", ""): p for n, p in backbone.stock.named_parameters() if "lora_" not in n}
    expected = dict(stock.named_parameters())
    assert set(names) == {*expected, "thinking_rows.rows"}
    assert all(torch.equal(names[name], expected[name]) for name in expected)
    other = of("random")
    assert cost(backbone, rows, audio) != cost(other, rows, audio)


def test_the_folder_a_processor_saves_is_read(folder: Path, mine: Path, rows: list[Row], audio: AudioBatch) -> None:
    """The published layout: the extractor inside processor_config.json, and one chat template for both."""
    preparer = of(folder).preparer
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (mine / name).unlink(missing_ok=True)
    _, tokenizer, extractor = tiny_parts()
    template = tokenizer.chat_template.replace("message['content']", "(message['content'] | string)")
    AudioFlamingo3Processor(extractor, tokenizer, chat_template=template).save_pretrained(mine)
    assert "feature_extractor" in json.loads((mine / "processor_config.json").read_text())
    assert not (mine / "preprocessor_config.json").exists()
    backbone = of(mine)
    assert backbone.preparer.tokenizer.chat_template == template
    assert backbone.preparer.tokenizer.get_vocab() == preparer.tokenizer.get_vocab()
    assert torch.equal(cost(backbone, rows, audio), cost(of(folder), rows, audio))


def test_weights_are_saved_under_the_published_names(folder: Path) -> None:
    """transformers gives the class's modules other names than its files; a change of either must not go unseen."""
    names = set(load_file(folder / "model.safetensors"))
    assert {re.match(r"\w+(\.model|\.lm_head)?", name)[0] for name in names} == {  # type: ignore[index]
        "audio_tower",
        "multi_modal_projector",
        "language_model.model",
        "language_model.lm_head",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("multi_modal_projector.linear_2.bias"), r"missing keys: .*linear_2\.bias"),
        (lambda w: w.update(surplus=torch.zeros(1)), "unexpected keys: surplus"),
        (lambda w: w.update({"multi_modal_projector.linear_2.bias": torch.zeros(3)}), r"mismatched keys: .*linear_2"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(mine: Path, change: Any, message: str) -> None:
    weights = load_file(mine / "model.safetensors")
    change(weights)
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=message):
        of(mine)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_files_are_clear_errors(mine: Path, name: str, damage: str) -> None:
    path = mine / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(AssetError, match=str(mine)):
        of(mine)


def test_a_placeholder_of_another_id_is_refused(mine: Path) -> None:
    edit(mine / "config.json", audio_token_id=7)
    with pytest.raises(AssetError, match=r"<sound> is token 3 .* audio_token_id 7 in its config\.json"):
        of(mine)


def test_a_tokenizer_without_the_placeholder_is_refused(mine: Path) -> None:
    path = mine / "tokenizer.json"
    path.write_text(path.read_text().replace("<sound>", "<noise>"))
    with pytest.raises(AssetError, match="its tokenizer has no <sound>"):
        of(mine)


def test_a_folder_without_a_chat_template_is_refused(mine: Path) -> None:
    (mine / "chat_template.jinja").unlink()
    with pytest.raises(AssetError, match="no chat template"):
        of(mine)


def test_an_answer_ends_with_its_turn_whatever_the_tokenizer_says(mine: Path) -> None:
    edit(mine / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token=None)
    backbone = of(mine)
    assert backbone.preparer.tokenizer.eos_token == "<|im_end|>"
    assert backbone.preparer.tokenizer.pad_token == "<|endoftext|>"
    assert backbone.stock.generation_config.eos_token_id == [2, 0]


def test_a_folders_sampling_does_not_reach_greedy_answers(
    folder: Path, mine: Path, rows: list[Row], audio: AudioBatch
) -> None:
    """A repetition penalty acts without sampling too; earlier conversions of the model carry one."""
    settings = {"do_sample": True, "repetition_penalty": 1.9, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    GenerationConfig(**settings, max_new_tokens=2048).save_pretrained(mine)
    answers = []
    for path in (folder, mine):
        backbone = of(path)
        backbone.model.eval()
        inputs = backbone.preparer.prepare(rows, audio, train=False)
        answers.append(backbone.generate(inputs, max_new_tokens=24))
        backbone.stock.generation_config.repetition_penalty = 1.9
        answers.append(backbone.generate(inputs, max_new_tokens=24))
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]  # a penalty that arrives changes them


# Rows for three tokens where there is none to spare


@pytest.mark.parametrize("tied", [False, True])
def test_three_rows_are_added_and_the_others_keep_every_bit(folder: Path, mine: Path, tied: bool) -> None:
    config = json.loads((mine / "config.json").read_text())
    edit(mine / "config.json", text_config={**config["text_config"], "tie_word_embeddings": tied})
    weights = load_file(folder / "model.safetensors")
    assert weights[EMBEDDING].shape[0] == TOKENS  # none to spare
    backbone = of(mine)
    model = backbone.stock
    assert backbone.preparer.tokens.ids == (TOKENS, TOKENS + 1, TOKENS + 2)
    for name, rows in ((EMBEDDING, model.get_input_embeddings().weight), (HEAD, model.get_output_embeddings().weight)):
        assert rows.shape == (TOKENS + 3, 64)
        assert torch.equal(rows[:TOKENS], weights[name])
        torch.testing.assert_close(rows[TOKENS:], weights[name].mean(0).expand(3, -1), rtol=0, atol=1e-6)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == TOKENS + 3


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_folder_is_read_again(tmp_path: Path, tied: bool, rows: list[Row], audio: AudioBatch) -> None:
    """Saved with its three tokens, as an export is, a model loads and gives the same; nothing is resized twice."""
    model, tokenizer, extractor = tiny_parts(tie_word_embeddings=tied)
    for part in (model, tokenizer, extractor):
        part.save_pretrained(tmp_path / "before")
    add_thinking_tokens(tokenizer, model)
    for part in (model, tokenizer, extractor):
        part.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after/config.json").read_text())["text_config"]["vocab_size"] == TOKENS + 3
    before, after = of(tmp_path / "before"), of(tmp_path / "after")
    assert after.stock.lm_head.weight.shape[0] == TOKENS + 3
    assert torch.equal(cost(before, rows, audio), cost(after, rows, audio))


# Tied embeddings


def test_the_class_never_ties_and_a_tied_folder_is_refused(tmp_path: Path) -> None:
    """`tie_word_embeddings` does nothing in this class: input and output rows are two tensors, and both are needed."""
    model, tokenizer, extractor = tiny_parts(tie_word_embeddings=True)
    assert model.config.text_config.tie_word_embeddings
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    for part in (model, tokenizer, extractor):
        part.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(weights[EMBEDDING], weights[HEAD])
    del weights[HEAD]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"missing keys: lm_head\.weight"):
        of(tmp_path)


# The real size


@pytest.fixture(scope="module")
def real() -> Any:
    with torch.device("meta"):
        return AudioFlamingo3ForConditionalGeneration(plan_config())


def test_the_real_model_has_the_sizes_of_the_readme(real: Any) -> None:
    parts = {
        "audio tower": real.model.audio_tower,
        "projector": real.model.multi_modal_projector,
        "language model": real.model.language_model,
        "output embedding": real.lm_head,
        "in all": real,
    }
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert found["in all"] == sum(n for name, n in found.items() if name != "in all") == 8_267_215_360
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = dict(re.findall(r"^\| ([\w ]+?)(?: \([^|]*\))? \| ([\d,]+) \|", readme, re.MULTILINE))
    assert {name: int(table[name].replace(",", "")) for name in found} == found
    assert {p.device.type for p in real.parameters()} == {"meta"}


def test_the_real_model_has_no_row_to_spare(real: Any) -> None:
    """`<sound>` is token 151,669 of 151,672 rows: even a tokenizer that ends there needs a resize for three more."""
    config = plan_config()
    assert real.get_input_embeddings().weight.shape == (151_672, 3584)
    assert config.audio_token_id + 1 + 3 > config.text_config.vocab_size


def test_the_plan_has_the_widths_of_the_manifest() -> None:
    backbone = AudioFlamingo3()
    sketch = backbone.sketch()
    assert backbone.hidden_size == MANIFEST.dim
    assert backbone.audio_dims == {"consumed": 3584, "tower": 1280}
    assert sketch.vocabulary == 151_672
    # LoRA of rank 16 on seven linear layers of each of 28 layers, and three rows.
    learns = {part: sum(p.numel() for p in found) for part, found in backbone.parts().items()}
    assert learns == {"lora": 40_370_176, "tokens": 3 * 3584}
    # A multiply-add is two: about 2 x 637 M x 1500 frames, and attention, for a full window.
    assert 1.9e12 < sketch.tower_flops(30.0) < 2.6e12
