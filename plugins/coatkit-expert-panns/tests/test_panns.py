"""The PANNs expert: against its definition, in time, in batches, and as a teacher."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from coatkit import AudioBatch, CoatkitError, Features
from coatkit_expert_panns import classes, coatkit_manifests, expert, front_end
from coatkit_expert_panns.convolution import Direct, First, Winograd
from coatkit_expert_panns.expert import Panns
from coatkit_expert_panns.network import Network
from coatkit_expert_panns.options import CHECKPOINT, Options

RATE = 32_000


def loaded(**options: object) -> Panns:
    made = Panns(**options)
    made.load(torch.device("cpu"), torch.float32)
    return made


def uneven(network: Network) -> None:
    """Norms that are not all ones and zeros, so that a wrong fold shows; for the tests only."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2, generator=generator))
            tensor.add_(torch.empty_like(tensor).uniform_(-0.1, 0.1, generator=generator))
    network.prepare()


@pytest.fixture(scope="module")
def teacher() -> Panns:
    made = loaded(weights="random")
    assert made.network is not None
    uneven(made.network)
    return made


def encode(teacher: Panns, *sounds: np.ndarray) -> Features:
    with torch.no_grad():
        return teacher.encode(AudioBatch.from_arrays(list(sounds), RATE))


def noise(samples: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    swell = np.repeat(random.random(samples // 1_600 + 1), 1_600)[:samples]
    return (0.2 * swell * random.standard_normal(samples)).astype(np.float32)


# --- against the definition


def by_definition(state: dict[str, Tensor], sound: np.ndarray) -> Tensor:
    """z [L, 2048] of the paper's network, step by step and in float64, from the tensors of a checkpoint."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.pad(torch.from_numpy(sound).double()[None, None], (512, 512), mode="reflect")
    parts = [F.conv1d(x, state[f"spectrogram_extractor.stft.conv_{p}.weight"], stride=320) for p in ("real", "imag")]
    power = parts[0].square() + parts[1].square()  # [1, 513, frames]
    x = 10 * torch.log10((power.transpose(1, 2) @ state["logmel_extractor.melW"]).clamp(min=1e-10))[:, None]
    x = norm(x.transpose(1, 3), "bn0").transpose(1, 3)
    for k in range(1, 7):
        for i in (1, 2):
            x = F.conv2d(x, state[f"conv_block{k}.conv{i}.weight"], padding=1)
            x = norm(x, f"conv_block{k}.bn{i}").relu()
        x = F.avg_pool2d(x, 2) if k < 6 else x
    x = x.mean(3)
    x = F.max_pool1d(x, 3, 1, padding=1) + F.avg_pool1d(x, 3, 1, padding=1)
    return F.linear(x.transpose(1, 2), state["fc1.weight"], state["fc1.bias"]).relu()[0]


@pytest.mark.parametrize("samples", [9_920, 30_719, 51_300])
def test_features_are_those_of_the_definition(teacher: Panns, samples: int) -> None:
    assert teacher.network is not None
    sound = noise(samples)
    ours = encode(teacher, sound).values[0].double()
    theirs = by_definition(teacher.network.state_dict(), sound)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()) < 2e-5


@pytest.mark.parametrize(("columns", "inputs", "outputs"), [(2, 8, 300), (4, 5, 7), (16, 8, 4)])
def test_both_kinds_of_convolution_agree(columns: int, inputs: int, outputs: int) -> None:
    # `Direct` is what runs on a GPU. 300 outputs of 8 inputs need no more than one piece, 12 rows make three tiles.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(14, columns, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    image = rows.double().permute(2, 0, 1)[None]
    exact = F.conv2d(image, weight.double(), bias.double(), padding=(0, 1)).relu()[0].permute(1, 2, 0)
    for layer in (Direct(weight, bias), Winograd(weight, bias, columns)):
        assert float((layer(rows) - exact).norm() / exact.norm()) < 1e-5
        assert not layer.state_dict()


def test_first_layer_is_a_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(9, 6, 1, generator=generator), torch.randn(5, 1, 3, 3, generator=generator)
    bias = torch.randn(5, generator=generator)
    torch.testing.assert_close(First(weight, bias)(rows), Direct(weight, bias)(rows))


def test_mel_bands_are_where_they_should_be() -> None:
    bank = front_end.mel_bank().double()
    hertz = torch.linspace(0, 16_000, 513, dtype=torch.float64)
    centres = (bank * hertz[:, None]).sum(0) / bank.sum(0)
    # Slaney's scale is linear to 1 kHz (65 bands' edges from 0.75 to 53.6 mels), logarithmic above.
    assert bank[hertz < 50].sum() == 0
    assert bank[hertz > 14_000].sum() == 0
    upper = centres[centres > 1_500].log().diff()
    torch.testing.assert_close(upper, upper.mean().expand_as(upper), rtol=0.05, atol=0)
    # Each band has unit area in Hz, as far as bins of 31 Hz resolve it.
    torch.testing.assert_close(bank[:, 30:].sum(0) * 31.25, torch.ones(34, dtype=torch.float64), rtol=0.05, atol=0)


# --- time


@pytest.mark.parametrize(
    ("samples", "segments"),
    [(1, 1), (3_200, 1), (9_919, 1), (9_920, 1), (20_159, 1), (20_160, 2), (32_000, 3), (320_000, 31)],
)
def test_lengths(teacher: Panns, samples: int, segments: int) -> None:
    features = encode(teacher, noise(samples))
    assert features.values.shape == (1, segments, 2_048)
    assert features.lengths.tolist() == [segments]
    assert features.values.isfinite().all()
    assert features.frame_rate == 3.125
    assert features.offset == -0.005


@pytest.mark.parametrize("segment", [12, 17])
def test_an_event_is_heard_when_it_happens(teacher: Panns, segment: int) -> None:
    quiet = 1e-3 * noise(30 * 10_240)
    loud = quiet.copy()
    centre = round((-0.005 + (segment + 0.5) / 3.125) * RATE)
    loud[centre - 1_600 : centre + 1_600] += noise(3_200, seed=1)
    change = (encode(teacher, loud).values - encode(teacher, quiet).values)[0].square().sum(1)
    # A segment sees 158 frames on either side of its own 32 and half a window: five segments at most.
    reached = change > 1e-8 * change.max()
    assert not reached[: segment - 5].any()
    assert not reached[segment + 6 :].any()
    middle = float((change * torch.arange(len(change))).sum() / change.sum())
    assert abs(middle - segment) < 0.25


def test_silence_is_finite(teacher: Panns) -> None:
    assert encode(teacher, np.zeros(RATE, np.float32)).values.isfinite().all()


def test_short_sound_is_followed_by_zeros(teacher: Panns) -> None:
    short = noise(500)
    whole = np.concatenate([short, np.zeros(9_420, np.float32)])
    assert torch.equal(encode(teacher, short).values, encode(teacher, whole).values)


# --- batches


@pytest.mark.parametrize("seconds_at_once", [90.0, 0.7])
def test_padded_batch_equals_single_sounds(
    teacher: Panns, seconds_at_once: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds = [noise(n, seed=n) for n in (52_345, 700, 20_159, 31_000, 9_921)]
    alone = [encode(teacher, sound).values[0] for sound in sounds]
    monkeypatch.setattr(expert, "_SECONDS_AT_ONCE", seconds_at_once)
    batch = AudioBatch.from_arrays(sounds, RATE)
    for i, sound in enumerate(sounds):
        batch.samples[i, len(sound) :] = 1e3
    kept = batch.samples.clone()
    with torch.no_grad():
        together = teacher.encode(batch)
    assert torch.equal(batch.samples, kept)
    for i, values in enumerate(alone):
        assert together.lengths[i] == len(values)
        rounding = 1e-5 * float(values.abs().max())
        torch.testing.assert_close(together.values[i, : len(values)], values, atol=rounding, rtol=1e-5)
        assert not together.values[i, len(values) :].any()


def test_groups_are_bounded_and_in_order() -> None:
    second = RATE
    lengths = [40 * second, 40 * second, 20 * second, 200 * second, second]
    assert expert._groups(lengths) == [[0, 1], [2], [3], [4]]


def test_long_sound_in_pieces_of_rows(teacher: Panns, monkeypatch: pytest.MonkeyPatch) -> None:
    from coatkit_expert_panns import network

    sound = noise(3 * RATE)
    whole = encode(teacher, sound).values
    monkeypatch.setattr(network, "_ROWS_AT_ONCE", 64)  # four rows at a time and more
    torch.testing.assert_close(encode(teacher, sound).values, whole, atol=1e-5, rtol=1e-5)


def test_refuses_another_rate(teacher: Panns) -> None:
    with pytest.raises(CoatkitError, match="16000 Hz, expected 32000 Hz"):
        teacher.encode(AudioBatch.from_arrays([noise(100)], 16_000))


# --- loss


@pytest.fixture
def pair(teacher: Panns) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and mask, [2, 6, 2048]; the second sound has 4 valid positions."""
    target = encode(teacher, noise(3 * RATE), noise(2 * RATE, seed=1)).values[:, :6].clone()
    predicted = target + 0.5 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    return predicted.requires_grad_(), target, torch.arange(6) < torch.tensor([[6], [4]])


def test_loss_is_the_definition(teacher: Panns, pair: tuple[Tensor, ...]) -> None:
    predicted, target, mask = pair
    assert teacher.network is not None
    weight, bias = (t.double().numpy() for t in (teacher.network.fc_audioset.weight, teacher.network.fc_audioset.bias))

    def probability(features: Tensor) -> np.ndarray:
        return 1 / (1 + np.exp(-(features[mask].detach().double().numpy() @ weight.T + bias)))

    p, t = probability(predicted), probability(target)
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    terms = teacher.loss(predicted, target, mask)
    assert terms.keys() == {"bce"}
    assert terms["bce"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["bce"] > teacher.loss(target, target, mask)["bce"]


def test_gradient_reaches_the_prediction_only(teacher: Panns, pair: tuple[Tensor, ...]) -> None:
    predicted, target, mask = pair
    (gradient,) = torch.autograd.grad(teacher.loss(predicted, target, mask)["bce"], predicted)
    assert gradient[mask].any()
    assert not gradient[~mask].any()
    assert teacher.network is not None
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not target.requires_grad


# --- classes


def test_class_list_is_audiosets(teacher: Panns) -> None:
    digest = hashlib.sha256(classes.CLASS_LIST.read_bytes()).hexdigest()
    assert digest == "cdd1049833c4b86127c2773ac0d14a2754b6a6d0d1798002ed5c66e699708429"
    assert len(teacher.labels) == len(set(teacher.labels)) == 527
    assert (teacher.labels[0], teacher.labels[1]) == ("Speech", "Male speech, man speaking")
    assert (teacher.labels[137], teacher.labels[526]) == ("Music", "Field recording")
    logits = teacher.event_logits(torch.zeros(2, 3, 2_048))
    assert logits.shape == (2, 3, 527)


# --- as a component


def test_use_before_load_is_refused() -> None:
    for use in (
        Panns().fingerprint,
        lambda: encode(Panns(), noise(100)),
        lambda: Panns().event_logits(torch.zeros(2_048)),
    ):
        with pytest.raises(CoatkitError, match=r"load\(\) must be called"):
            use()


@pytest.mark.parametrize("options", [{"weight": "random"}, {"weights": ""}, {"weights": 1}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Options(**options)


def test_only_the_default_needs_an_asset() -> None:
    assert Options().assets() == (CHECKPOINT,)
    assert Options(weights="random").assets() == ()
    assert Options(weights="elsewhere.pth").assets() == ()


def test_manifest_tells_the_truth() -> None:
    (manifest,) = coatkit_manifests()
    assert (manifest.sample_rate, manifest.frame_rate, manifest.dim) == (
        Panns.sample_rate,
        Panns.frame_rate,
        Panns.dim,
    )
    assert manifest.target == f"{Panns.__module__}:{Panns.__qualname__}"
    assert manifest.options == f"{Options.__module__}:{Options.__qualname__}"
    assert [asset.name for asset in manifest.assets] == [CHECKPOINT]
    assert classes.CLASS_LIST.with_name("NOTICE-audioset").stat().st_size > 500


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys, coatkit_expert_panns as plugin; plugin.coatkit_manifests()\n"
        "import coatkit_expert_panns.options, coatkit_expert_panns.classes\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_home_stays_empty_and_no_process_starts(tmp_path: Path) -> None:
    # Importing upstream's package runs wget and writes ~/panns_data; that is why it is no dependency.
    home, programs = tmp_path / "home", tmp_path / "programs"
    home.mkdir()
    programs.mkdir()
    code = """
import os, sys
refused = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
           "socket.getaddrinfo"}
def watch(event, arguments):
    if event in refused:
        print("refused:", event, arguments, flush=True)
        os._exit(3)
import torch, coatkit, coatkit.plugins
sys.addaudithook(watch)
assert "panns" in {found.manifest.name for found in coatkit.plugins.all_manifests()}
expert = coatkit.load_expert("panns", weights="random")
assert len(expert.labels) == 527
with torch.no_grad():
    features = expert.encode(coatkit.AudioBatch(torch.zeros(1, 500), torch.tensor([500]), 32_000))
assert features.values.shape == (1, 1, 2048)
assert "panns_inference" not in sys.modules
"""
    env = {**os.environ, "HOME": str(home), "PATH": str(programs)}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "COATKIT_CACHE"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(home.rglob("*")) == []


def test_a_readout_is_the_frame_wise_output(teacher: Panns) -> None:
    features = torch.randn(2, 3, 2_048).relu()
    read = teacher.readout(features, torch.ones(2, 3, dtype=torch.bool))
    assert read.values.shape == (2, 3, 527)
    torch.testing.assert_close(read.values, teacher.event_logits(features).sigmoid())
    assert read.labels[0] == "Speech"
    assert len(read.labels) == 527
    assert read.of(1, 2).values.shape == (2, 527)
