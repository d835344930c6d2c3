"""Tiny folders: what they hold, and that loading one is strict and stays offline."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coatkit import AssetError
from coatkit_backbone_mini.loading import load_model, load_processor
from coatkit_backbone_mini.tiny import tiny_folder
from coatkit_backbone_mini.tokens import ADDED, SOUND, THINK, THINK_END, THINK_START


def change_weights(folder: Path, remove: str = "", put: dict[str, torch.Tensor] | None = None) -> None:
    state = load_file(folder / "model.safetensors")
    if remove:
        del state[remove]
    save_file(state | (put or {}), folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_runs_on_audio(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer, extractor = load_processor(tiny)
    model = load_model(tiny, torch.float32)
    assert not model.training
    mel = extractor(
        torch.sin(torch.arange(16_000) / 20).numpy(),
        sampling_rate=16_000,
        return_tensors="pt",
        return_attention_mask=True,
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": SOUND * 25 + "What is heard?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        out = model(
            **ids, input_features=mel["input_features"], input_features_mask=mel["attention_mask"], use_cache=False
        )
    assert out.logits.shape == (1, ids["input_ids"].shape[1], len(tokenizer))
    assert out.logits.isfinite().all()


def test_tokenizer(tiny: Path) -> None:
    tokenizer, extractor = load_processor(tiny)
    config = load_model(tiny, torch.float32).config
    start, think, end = (tokenizer.convert_tokens_to_ids(token) for token in (THINK_START, THINK, THINK_END))
    assert (think, end) == (start + 1, start + 2)
    assert config.audio_token_id == tokenizer.convert_tokens_to_ids(SOUND)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert config.text_config.vocab_size == len(tokenizer) == 256 + 3 + len(ADDED)
    assert tokenizer.decode(tokenizer("Grüße, 12  34\n").input_ids) == "Grüße, 12  34\n"
    assert tokenizer(f"a{THINK_START}{THINK}").input_ids[1:] == [start, think]
    assert (extractor.feature_size, extractor.sampling_rate, extractor.nb_max_frames) == (80, 16_000, 3000)


def test_chat_template_takes_strings_and_parts(tiny: Path) -> None:
    tokenizer, _ = load_processor(tiny)
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\n<sound>Who?<|im_end|>\n"
    parts = [{"type": "audio"}, {"type": "text", "text": "Who?"}]
    for content in ("<sound>Who?", parts):
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == system + user
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<sound>Who?"}]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == "<|im_start|>system\nBe brief.<|im_end|>\n" + user + "<|im_start|>assistant\n"
    )


def test_tiny_weights_follow_the_seed_only(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, other = tiny_folder(tmp_path / "again"), tiny_folder(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    states = [load_file(folder / "model.safetensors") for folder in (tiny, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_added_rows_are_the_mean(tiny: Path) -> None:
    model = load_model(tiny, torch.float32)
    for rows in (model.get_input_embeddings().weight, model.lm_head.weight):
        expected = rows[:259].mean(0).expand(4, -1)
        torch.testing.assert_close(rows[259:], expected)


def test_folder_names_no_machine(tiny: Path) -> None:
    for path in tiny.glob("*.json"):
        assert str(tiny.parent) not in path.read_text()
        assert "name_or_path" not in path.read_text()


def test_dtype(tiny: Path) -> None:
    assert {value.dtype for value in load_model(tiny, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_missing_weight_is_named(tiny: Path) -> None:
    change_weights(tiny, remove="multi_modal_projector.linear_2.bias")
    with pytest.raises(AssetError, match=r"missing keys: model\.multi_modal_projector\.linear_2\.bias"):
        load_model(tiny, torch.float32)


def test_unexpected_weight_is_named(tiny: Path) -> None:
    change_weights(tiny, put={"surplus": torch.zeros(1)})
    with pytest.raises(AssetError, match="unexpected keys: surplus"):
        load_model(tiny, torch.float32)


def test_weight_of_other_shape_is_named(tiny: Path) -> None:
    change_weights(tiny, put={"multi_modal_projector.linear_2.bias": torch.zeros(3)})
    with pytest.raises(AssetError, match=r"multi_modal_projector\.linear_2\.bias"):
        load_model(tiny, torch.float32)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folder_is_a_clear_error(tiny: Path, name: str, damage: str) -> None:
    path = tiny / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(AssetError, match=str(tiny)):
        load_processor(tiny), load_model(tiny, torch.float32)


def test_tokenizer_without_our_tokens_is_refused(tiny: Path) -> None:
    path = tiny / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != THINK]
    path.write_text(json.dumps(content))
    with pytest.raises(AssetError, match=r"audio_think\|>"):
        load_processor(tiny)
