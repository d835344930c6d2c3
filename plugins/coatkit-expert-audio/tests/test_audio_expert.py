"""The reconstruction expert on the tiny mini backbone: its features are what the backbone heard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coatkit_expert_audio import coatkit_manifests
from coatkit_expert_audio.expert import AudioFeatures
from coatkit_expert_audio.options import Options
from pydantic import ValidationError
from torch import Tensor

from coatkit import AudioBatch, CoatkitError, Inputs, load_backbone, load_expert
from coatkit.align import align
from coatkit.data.rows import AudioRef, Message, Row

RATE = 16_000


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path))
    return load_backbone("mini", weights="random", device="cpu")


@pytest.fixture
def audio() -> AudioBatch:
    random = np.random.default_rng(0)
    return AudioBatch.from_arrays([0.1 * random.normal(size=n).astype(np.float32) for n in (8_000, 3_000)], RATE)


@pytest.fixture
def inputs(backbone: Any, audio: AudioBatch) -> Inputs:
    messages = (Message("user", "<audio>What?"), Message("assistant", "Rain."))
    rows = [Row(str(i), messages, (AudioRef(Path(f"{i}.wav")),)) for i in range(2)]
    prepared: Inputs = backbone.preparer.prepare(rows, audio, train=True)
    return prepared


def encode(backbone: Any, audio: AudioBatch, inputs: Inputs, target: str) -> Any:
    expert = load_expert("audio", backbone=backbone, target=target)
    audio.backbone = backbone.forward(inputs).audio
    with torch.no_grad():
        return expert.encode(audio)


def test_consumed_is_what_reaches_the_language_model(backbone: Any, audio: AudioBatch, inputs: Inputs) -> None:
    seen: list[Tensor] = []
    backbone.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    features = encode(backbone, audio, inputs, "consumed")
    assert features.lengths.tolist() == [12, 5]
    assert (features.frame_rate, features.offset) == (25.0, 0.0)
    placeholders = inputs.tokens["input_ids"] == backbone.preparer.audio_token
    for i, length in enumerate((12, 5)):
        assert torch.equal(features.values[i, :length], seen[0][i][placeholders[i]])
        assert (features.values[i, length:] == 0).all()


def test_tower_is_the_towers_own_output(backbone: Any, audio: AudioBatch, inputs: Inputs) -> None:
    features = encode(backbone, audio, inputs, "tower")
    with torch.no_grad():
        mel, mask = inputs.tokens["input_features"], inputs.tokens["input_features_mask"]
        expected = backbone.tower(mel, input_features_mask=mask).last_hidden_state
    assert features.values.shape == (2, 12, 32)
    for i, length in enumerate((12, 5)):
        assert torch.equal(features.values[i, :length], expected[i, :length])


def test_no_second_pass_through_the_tower_is_made(backbone: Any, audio: AudioBatch, inputs: Inputs) -> None:
    calls: list[str] = []
    backbone.tower.register_forward_hook(lambda *_: calls.append("tower"))
    encode(backbone, audio, inputs, "tower")
    assert calls == ["tower"]


def test_at_the_backbones_own_rate_nothing_is_resampled(backbone: Any, audio: AudioBatch, inputs: Inputs) -> None:
    features = encode(backbone, audio, inputs, "consumed")
    assert torch.equal(align(features, inputs.think_lengths, backbone.preparer.thinking_rate), features.values)


def test_the_projector_moves_consumed_and_not_tower(backbone: Any, audio: AudioBatch, inputs: Inputs) -> None:
    before = {target: encode(backbone, audio, inputs, target).values for target in ("consumed", "tower")}
    with torch.no_grad():
        backbone.projector.linear_2.bias += 1.0
    after = {target: encode(backbone, audio, inputs, target).values for target in ("consumed", "tower")}
    assert not torch.equal(before["consumed"], after["consumed"])
    assert torch.equal(before["tower"], after["tower"])


@pytest.mark.parametrize(("target", "dim"), [("consumed", 64), ("tower", 32)])
def test_it_learns_its_width_from_the_backbone(backbone: Any, target: str, dim: int) -> None:
    expert = load_expert("audio", backbone=backbone, target=target)
    assert (expert.dim, expert.frame_rate, expert.sample_rate) == (dim, 25.0, RATE)


def test_targets_have_fingerprints_of_their_own(backbone: Any) -> None:
    found = [load_expert("audio", backbone=backbone, target=t).fingerprint() for t in ("consumed", "tower", "tower")]
    assert found[0] != found[1] == found[2]


def test_a_backbone_without_the_target_is_refused(backbone: Any) -> None:
    backbone.audio_dims = {"consumed": 64}
    with pytest.raises(CoatkitError, match=r"target 'tower' is not offered by this backbone, only \['consumed'\]"):
        load_expert("audio", backbone=backbone, target="tower")


def test_without_a_backbone_it_says_so(audio: AudioBatch) -> None:
    with pytest.raises(CoatkitError, match="reads the backbone's features"):
        load_expert("audio")
    with pytest.raises(ValueError, match=r"needs AudioBatch\.backbone"):
        AudioFeatures().encode(audio)


def test_a_tower_that_was_not_captured_is_refused(backbone: Any, audio: AudioBatch, inputs: Inputs) -> None:
    heard = backbone.forward(inputs).audio
    heard.tower = None
    audio.backbone = heard
    with pytest.raises(ValueError, match="did not capture its audio tower's output"):
        AudioFeatures("tower").encode(audio)


def test_options() -> None:
    assert Options().target == "consumed"
    for wrong in ({"target": "both"}, {"targets": "tower"}):
        with pytest.raises(ValidationError):
            Options.model_validate(wrong)


def test_listing_it_loads_no_torch() -> None:
    code = "import sys, coatkit_expert_audio, coatkit_expert_audio.options; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    (manifest,) = coatkit_manifests()
    assert (manifest.kind, manifest.name) == ("expert", "audio")
