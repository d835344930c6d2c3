"""The real weights: SmolLM2 still answers, and the encoder is Whisper's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AudioFlamingo3ForConditionalGeneration, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from coatkit_backbone_mini.loading import load_model, load_processor
from coatkit_backbone_mini.sizes import real_config
from coatkit_backbone_mini.tokens import THINK, THINK_END, THINK_START

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def model(real_folder: Path) -> AudioFlamingo3ForConditionalGeneration:
    return load_model(real_folder, torch.float32)


@pytest.fixture(scope="module")
def mel(real_folder: Path) -> torch.Tensor:
    """Features of 6 s of sweeps and noise bursts, [1, 80, 3000]."""
    _, extractor = load_processor(real_folder)
    time = np.arange(6 * 16_000) / 16_000
    sweep = np.sin(2 * np.pi * (200 + 300 * time) * time) * (np.sin(2 * np.pi * 1.5 * time) > 0)
    noise = np.random.default_rng(0).normal(size=time.size) * (np.sin(2 * np.pi * 0.7 * time) > 0.5)
    audio = (0.3 * sweep + 0.1 * noise).astype(np.float32)
    features = extractor(audio, sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert isinstance(features, torch.Tensor)
    return features


def test_a_question_in_text_is_answered(real_folder: Path, model: AudioFlamingo3ForConditionalGeneration) -> None:
    tokenizer, _ = load_processor(real_folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id


def test_tokenizer(real_folder: Path) -> None:
    tokenizer, _ = load_processor(real_folder)
    assert len(tokenizer) == 49_156
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (THINK_START, THINK, THINK_END)]
    assert ids == [49_153, 49_154, 49_155]
    # Digits are split off first, so the two spaces before a number are one token, as in SmolLM2's own tokenizer.
    assert tokenizer.tokenize("in  12 days") == ["in", "ĠĠ", "1", "2", "Ġdays"]


def test_sizes(model: AudioFlamingo3ForConditionalGeneration) -> None:
    def count(module: nn.Module) -> int:
        return sum(value.numel() for value in module.parameters())

    assert count(model.model.audio_tower) == 8_208_384
    assert count(model.model.multi_modal_projector) == 554_112
    assert count(model) == 171_593_664


def test_the_plan_has_the_sizes_of_the_weights(model: AudioFlamingo3ForConditionalGeneration) -> None:
    with torch.device("meta"):
        planned = AudioFlamingo3ForConditionalGeneration(real_config())
    shapes = {name: p.shape for name, p in planned.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}


def test_positions_are_whispers_sinusoids(model: AudioFlamingo3ForConditionalGeneration) -> None:
    rates = torch.exp(-math.log(10_000) / 191 * torch.arange(192))
    angles = torch.arange(1500)[:, None] * rates
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(model.model.audio_tower.embed_positions.weight, expected, rtol=0, atol=1e-3)


def test_tower_is_the_whisper_encoder_pooled(model: AudioFlamingo3ForConditionalGeneration, mel: torch.Tensor) -> None:
    tower = model.model.audio_tower
    whisper = WhisperEncoder(
        WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80)
    ).eval()
    whisper.load_state_dict(tower.state_dict(), strict=True)
    whisper.layer_norm = nn.Identity()
    with torch.no_grad():
        pooled = nn.functional.avg_pool1d(whisper(mel).last_hidden_state.transpose(1, 2), 2).transpose(1, 2)
        mask = torch.ones(1, 3000, dtype=torch.long)
        got = tower(mel, input_features_mask=mask).last_hidden_state
        torch.testing.assert_close(got, tower.layer_norm(pooled), rtol=1e-4, atol=1e-4)


def test_projector_speaks_in_the_range_of_text(
    model: AudioFlamingo3ForConditionalGeneration, mel: torch.Tensor
) -> None:
    mask = torch.zeros(1, 3000, dtype=torch.long)
    mask[:, :600] = 1
    with torch.no_grad():
        audio = model.get_audio_features(mel, mask).pooler_output
    text = model.get_input_embeddings().weight
    assert audio.shape == (150, 576)
    assert 0.7 < audio.std(0).mean() / text.std(0).mean() < 1.4
