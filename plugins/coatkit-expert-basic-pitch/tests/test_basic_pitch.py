"""The basic-pitch expert: against stored upstream values, in time, and as a teacher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from coatkit import AssetError, AudioBatch, CoatkitError, Features
from coatkit_expert_basic_pitch import coatkit_manifests, loading, windowing
from coatkit_expert_basic_pitch.expert import BasicPitch
from coatkit_expert_basic_pitch.options import Options

RATE = 22_050
A4, A5 = 145, 181
"""Pitch bins of 440 and 880 Hz."""


def loaded(**options: object) -> BasicPitch:
    expert = BasicPitch(**options)
    expert.load(torch.device("cpu"), torch.float32)
    return expert


@pytest.fixture(scope="module")
def expert() -> BasicPitch:
    return loaded()


def encode(expert: BasicPitch, *sounds: np.ndarray) -> Features:
    with torch.no_grad():
        return expert.encode(AudioBatch.from_arrays(list(sounds), RATE))


def contour(expert: BasicPitch, features: Features) -> np.ndarray:
    """Pitch probabilities [L, 264] of the first sound."""
    mask = torch.ones(1, int(features.lengths[0]), dtype=torch.bool)
    return expert.pitch_logits(features.values[:1, : mask.shape[1]], mask).sigmoid()[0].numpy()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def switching_tone(seconds: float, switch: float) -> np.ndarray:
    """440 Hz, then 880 Hz from `switch` seconds on, without a jump in phase."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = np.where(t < switch, 440 * t, 440 * switch + 880 * (t - switch))
    return (0.3 * np.sin(2 * np.pi * phase)).astype(np.float32)


# --- against upstream


def test_features_and_contour_are_upstreams(expert: BasicPitch) -> None:
    upstream = np.load(Path(__file__).with_name("upstream.npz"))
    sound = noise(3 * RATE)
    np.testing.assert_array_equal(sound[:16], upstream["samples"], err_msg="numpy draws other noise than was stored")
    values = encode(expert, sound).values[0].unflatten(-1, (8, 264)).numpy()
    padded = np.concatenate([np.zeros(3_840, np.float32), sound, np.zeros(43_844, np.float32)])
    for i, (window, row) in enumerate(zip(upstream["windows"], upstream["rows"], strict=True)):
        frame = round((36_164 * window + 256 * (row - 15)) / 256)
        assert np.abs(values[frame] - upstream["z"][i]).max() < 1e-4
        _, logits = expert.network(torch.from_numpy(padded[None, window * 36_164 :][:, :43_844]))
        assert np.abs(logits[0, row].sigmoid().numpy() - upstream["contour"][i]).max() < 1e-5


# --- time


def test_frames_come_from_the_nearest_kept_frame() -> None:
    frames = torch.arange(20_000)
    window, row = windowing.locate(frames)
    assert row.min() == 15
    assert row.max() == 156
    error = 36_164 * window - 3_840 + 256 * row - 256 * frames
    assert error.abs().max() <= 128
    for n in range(0, 20_000, 7):
        kept = [36_164 * w + 256 * np.arange(142) for w in range(max(0, window[n] - 1), window[n] + 2)]
        assert abs(error[n]) == np.abs(np.concatenate(kept) - 256 * n).min()


@pytest.mark.parametrize("switch", [36_164 / RATE, 1.0, 17 * 36_164 / RATE, 25.0])
def test_pitch_change_is_on_time(expert: BasicPitch, switch: float) -> None:
    # Also late in a long sound: upstream's plain concatenation would be 12 frames late after 17 windows.
    features = encode(expert, switching_tone(switch + 2, switch))
    pitch = contour(expert, features)
    first = int((pitch[:, A5 - 1 : A5 + 2].max(1) > pitch[:, A4 - 1 : A4 + 2].max(1)).argmax())
    centre = features.offset + (first + 0.5) / features.frame_rate
    assert abs(centre - switch) < 2 / features.frame_rate
    assert pitch[first - 20].argmax() == A4
    assert pitch[first + 20].argmax() == A5


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (256, 1), (257, 2), (2_205, 9), (36_131, 142), (36_165, 142), (661_500, 2_584)]
)
def test_lengths(expert: BasicPitch, samples: int, frames: int) -> None:
    features = encode(expert, noise(samples))
    assert features.values.shape == (1, frames, 2_112)
    assert features.lengths.tolist() == [frames]
    assert features.values.isfinite().all()
    assert features.frame_rate == RATE / 256
    assert features.offset == -128 / RATE


def test_two_minutes(expert: BasicPitch) -> None:
    lengths = windowing.frame_count(torch.tensor([120 * RATE]))
    assert lengths.tolist() == [10_336]
    window, _ = windowing.locate(lengths - 1)
    assert window < np.ceil((120 * RATE + 3_840) / 36_164)


def test_silence_is_finite(expert: BasicPitch) -> None:
    features = encode(expert, np.zeros(2 * RATE, np.float32))
    assert features.values.isfinite().all()
    # Upstream's own values there reach 0.2; its notes begin at 0.3.
    assert contour(expert, features).max() < 0.25


# --- batches


def test_padded_batch_equals_single_sounds(expert: BasicPitch) -> None:
    sounds = [noise(n, seed=n) for n in (50_000, 100, 90_000, 36_164)]
    batch = AudioBatch.from_arrays(sounds, RATE)
    # What lies beyond a sound's end must not matter, whatever it is.
    for i, sound in enumerate(sounds):
        batch.samples[i, len(sound) :] = 1e3
    with torch.no_grad():
        together = expert.encode(batch)
    for i, sound in enumerate(sounds):
        alone = encode(expert, sound)
        frames = int(alone.lengths[0])
        assert together.lengths[i] == frames
        torch.testing.assert_close(together.values[i, :frames], alone.values[0], atol=1e-5, rtol=0)
        assert not together.values[i, frames:].any()


def test_refuses_another_rate(expert: BasicPitch) -> None:
    with pytest.raises(CoatkitError, match="16000 Hz, expected 22050 Hz"):
        expert.encode(AudioBatch.from_arrays([noise(100)], 16_000))


# --- loss


@pytest.fixture
def pair(expert: BasicPitch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction, target and mask, [2, 6, 2112]; the second sound has 4 valid positions."""
    target = encode(expert, noise(1_500), switching_tone(0.07, 0.03)).values[:, :6].clone()
    predicted = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    return predicted.requires_grad_(), target, mask


@pytest.mark.parametrize("alpha", [None, 0.8])
def test_loss_is_the_definition(expert: BasicPitch, pair: tuple[torch.Tensor, ...], alpha: float | None) -> None:
    predicted, target, mask = pair
    weights = {k: v.double().numpy() for k, v in load_file(loading.SHIPPED).items()}

    def logits(features: np.ndarray) -> np.ndarray:
        """h by its definition: a 5 x 5 correlation over time and pitch, zeros around."""
        frames = features.shape[0]
        padded = np.pad(features.reshape(frames, 8, 264), ((2, 2), (0, 0), (2, 2)))
        out = np.full((frames, 264), weights["contour2.bias"][0])
        for i in range(5):
            for j in range(5):
                kernel = weights["contour2.weight"][0, :, i, j]
                out += np.einsum("lcb,c->lb", padded[i : i + frames, :, j : j + 264], kernel)
        return out

    squared, focal = [], []
    for sound, valid in enumerate(mask.sum(1).tolist()):
        p = predicted[sound, :valid].detach().double().numpy()
        t = target[sound, :valid].double().numpy()
        squared.append(((p - t) ** 2).ravel())
        p, t = (1 / (1 + np.exp(-logits(x))) for x in (p, t))
        entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
        share = 1.0 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
        focal.append((share * np.abs(t - p) ** 1.5 * entropy).ravel())

    terms = loaded(aux_weight=0.3, focal_gamma=1.5, focal_alpha=alpha).loss(predicted, target, mask)
    assert terms.keys() == {"mse", "pitch"}
    assert terms["mse"].item() == pytest.approx(np.concatenate(squared).mean(), rel=1e-5)
    assert terms["pitch"].item() == pytest.approx(0.3 * np.concatenate(focal).mean(), rel=1e-4)


def test_gradient_reaches_the_prediction_only(expert: BasicPitch, pair: tuple[torch.Tensor, ...]) -> None:
    predicted, target, mask = pair
    terms = expert.loss(predicted, target, mask)
    (gradient,) = torch.autograd.grad(terms["pitch"], predicted)
    assert gradient[mask].any()
    assert not gradient[~mask].any()
    assert not any(p.requires_grad for p in expert.network.parameters())
    assert not target.requires_grad


def test_padding_has_no_part_in_the_loss(expert: BasicPitch, pair: tuple[torch.Tensor, ...]) -> None:
    predicted, target, mask = pair
    spoiled = [torch.where(mask[..., None], x.detach(), torch.tensor(1e4)) for x in (predicted, target)]
    for name, value in expert.loss(*spoiled, mask).items():
        torch.testing.assert_close(value, expert.loss(predicted, target, mask)[name])


def test_loss_without_the_pitch_term(pair: tuple[torch.Tensor, ...]) -> None:
    # Nothing is loaded here, so h cannot have been used.
    assert BasicPitch(aux_weight=0).loss(*pair).keys() == {"mse"}


# --- weights and options


def test_misfit_weights_are_refused(tmp_path: Path) -> None:
    tensors = load_file(loading.SHIPPED)
    tensors["extra"] = tensors.pop("contour1.bias")
    tensors["lowpass"] = tensors["lowpass"][..., :-1].contiguous()
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(AssetError) as caught:
        loaded(weights=str(tmp_path / "odd.safetensors"))
    for part in ("odd.safetensors", "missing contour1.bias", "unexpected extra", "lowpass has shape (1, 1, 255)"):
        assert part in str(caught.value)


def test_absent_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no weights file .*gone\.safetensors"):
        loaded(weights=str(tmp_path / "gone.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(AssetError, match=r"bad\.safetensors cannot be read as weights"):
        loaded(weights=str(tmp_path / "bad.safetensors"))


def test_random_weights_are_finite_and_repeatable() -> None:
    state = torch.get_rng_state()
    first, second = (encode(loaded(weights="random"), noise(5_000)).values for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 0
    assert torch.equal(state, torch.get_rng_state())


def test_fingerprint_follows_the_weights_only(expert: BasicPitch, tmp_path: Path) -> None:
    tensors = load_file(loading.SHIPPED)
    save_file(tensors, tmp_path / "same.safetensors")
    tensors["contour1.bias"] = tensors["contour1.bias"] + 1e-3
    save_file(tensors, tmp_path / "other.safetensors")
    same = loaded(weights=str(tmp_path / "same.safetensors"), aux_weight=1.0)
    prints = [loaded(weights=w).fingerprint() for w in (str(tmp_path / "other.safetensors"), "random")]
    assert same.fingerprint() == expert.fingerprint()
    assert len({expert.fingerprint(), *prints}) == 3


def test_use_before_load_is_refused() -> None:
    for use in (BasicPitch().fingerprint, lambda: encode(BasicPitch(), noise(100))):
        with pytest.raises(CoatkitError, match=r"load\(\) must be called"):
            use()


@pytest.mark.parametrize("options", [{"aux_weigth": 1}, {"aux_weight": -1}, {"focal_alpha": 2}, {"weights": ""}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Options(**options)


def test_manifest_tells_the_truth() -> None:
    (manifest,) = coatkit_manifests()
    assert (manifest.sample_rate, manifest.frame_rate, manifest.dim) == (
        BasicPitch.sample_rate,
        BasicPitch.frame_rate,
        BasicPitch.dim,
    )
    assert manifest.target == f"{BasicPitch.__module__}:{BasicPitch.__qualname__}"
    assert manifest.options == f"{Options.__module__}:{Options.__qualname__}"
    for name in ("LICENSE-basic-pitch", "NOTICE-basic-pitch"):
        assert loading.SHIPPED.with_name(name).stat().st_size > 1_000


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys, coatkit_expert_basic_pitch as plugin; plugin.coatkit_manifests()\n"
        "import coatkit_expert_basic_pitch.options\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
