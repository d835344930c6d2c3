"""Reading sound files: what is decoded, and what is refused by name."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from coatkit.data.audio import duration, read, resample
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError

RATE = 8000


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.9, 0.9, int(seconds * rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> AudioRef:
    soundfile.write(path, samples, rate, subtype=subtype)
    return AudioRef(path)


def test_mono_is_read_as_it_is(tmp_path: Path) -> None:
    samples = noise(1)
    ref = write(tmp_path / "a.wav", samples)
    found, rate = read(ref, 10)
    assert (rate, found.dtype, duration(ref)) == (RATE, np.float32, 1.0)
    np.testing.assert_array_equal(found, samples)  # nothing normalised, nothing dithered


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = noise(1), tone(440, 1)
    found, _ = read(write(tmp_path / "a.wav", np.stack([left, right], 1)), 10)
    np.testing.assert_allclose(found, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("start", "end"), [(None, None), (0.25, None), (None, 0.5), (0.3, 0.7), (0.1234, 0.5678)])
def test_a_stretch_is_what_slicing_gives(tmp_path: Path, suffix: str, start: float | None, end: float | None) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(300, 1), RATE)
    whole, _ = read(AudioRef(path), 10)
    ref = AudioRef(path, start, end)
    found, _ = read(ref, 10)
    expected = whole[round((start or 0) * RATE) : round((1.0 if end is None else end) * RATE)]
    # Lossy codecs may start a stretch from another state of the decoder.
    np.testing.assert_allclose(found, expected, atol=0.03 if suffix in ("mp3", "ogg") else 0)
    assert duration(ref) == found.size / RATE


@pytest.mark.parametrize(
    ("subtype", "rate", "tolerance"),
    [("PCM_U8", RATE, 1 / 128), ("PCM_16", 96_000, 1 / 32_768), ("PCM_24", 44_100, 2**-23), ("ULAW", RATE, 0.03)],
)
def test_other_sample_formats_and_rates(tmp_path: Path, subtype: str, rate: int, tolerance: float) -> None:
    samples = tone(440, 0.5, rate)
    found, found_rate = read(write(tmp_path / "a.wav", samples, rate, subtype), 10)
    assert found_rate == rate
    np.testing.assert_allclose(found, samples, atol=tolerance)


def test_a_tenth_of_a_second_past_the_end_is_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(1)).path
    assert duration(AudioRef(path, 0.5, 1.08)) == 0.5
    assert read(AudioRef(path, 0.5, 1.08), 10)[0].size == RATE // 2
    for ref in (AudioRef(path, 0.5, 1.2), AudioRef(path, 1.0), AudioRef(path, 3, 4)):
        for reader in (duration, lambda r: read(r, 10)):
            with pytest.raises(DataError, match=r"a\.wav: .* lies outside its 1\.00 s"):
                reader(ref)


def not_sound(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no sound, and what is said of each."""
    made = {
        "missing": (tmp_path / "gone.wav", "there is no such file"),
        "folder": (tmp_path, "it is a folder"),
        "empty": (tmp_path / "empty.wav", "the file is empty"),
        "text": (tmp_path / "text.wav", "Format not recognised"),
        "headerless": (tmp_path / "a.raw", "its format has no header; convert it to WAV or FLAC"),
        "half a header": (tmp_path / "half.wav", "cannot be "),
        "no frames": (tmp_path / "silent.wav", "holds no sound"),
        "rate of zero": (tmp_path / "zero.wav", "cannot be "),
        "impossible name": (tmp_path / ("x" * 5000), "there is no such file"),
    }
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not sound " * 100)
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    write(tmp_path / "whole.wav", noise(1), subtype="PCM_16")
    content = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "half.wav").write_bytes(content[:20])
    (tmp_path / "zero.wav").write_bytes(content[:24] + bytes(4) + content[28:])
    write(tmp_path / "silent.wav", np.zeros(0, np.float32))
    return made


CASES = "missing, folder, empty, text, headerless, half a header, no frames, rate of zero, impossible name"


@pytest.mark.parametrize("case", CASES.split(", "))
def test_what_is_no_sound_is_named(tmp_path: Path, case: str) -> None:
    path, said = not_sound(tmp_path)[case]
    for reader in (duration, lambda ref: read(ref, 10)):
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            reader(AudioRef(path))
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("suffix", "said"), [("mp3", r"truncated: \d+ of 32000 frames could be decoded"), ("flac", "cannot be decoded: ")]
)
def test_a_file_cut_short_of_what_its_header_says_is_refused(tmp_path: Path, suffix: str, said: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(4), RATE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: {said}"):
        read(AudioRef(path), 10)


def test_a_damaged_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(4), RATE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.flac: "):
        read(AudioRef(path), 10)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    samples = noise(1)
    samples[123] = value
    with pytest.raises(DataError, match=r"a\.wav: holds NaN or infinite samples"):
        read(write(tmp_path / "a.wav", samples), 10)


def test_the_limit_is_on_the_stretch_not_on_the_file(tmp_path: Path) -> None:
    ref = write(tmp_path / "a.wav", noise(3))
    with pytest.raises(DataError, match=r"a\.wav: 3\.0 s is over the limit of 2 s"):
        read(ref, 2)
    assert read(AudioRef(ref.path, 0.5, 2.5), 2)[0].size == 2 * RATE
    assert read(ref, 3)[0].size == 3 * RATE


# Resampling


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (44_100, 16_000), (96_000, 22_050), (16_000, 16_000)])
def test_a_tone_keeps_its_pitch_level_and_length(rate: int, to: int) -> None:
    found = resample(tone(1000, 1, rate), rate, to)
    assert found.dtype == np.float32
    assert abs(found.size - to) <= 1
    middle = found[to // 4 : to // 4 + to // 2]  # a whole number of periods, away from the edges
    spectrum = np.abs(np.fft.rfft(middle)) / middle.size * 2
    assert np.argmax(spectrum) * to / middle.size == 1000
    assert spectrum.max() == pytest.approx(0.5, rel=0.01)


def test_what_lies_above_half_the_new_rate_is_removed() -> None:
    assert np.abs(resample(tone(12_000, 1, 48_000), 48_000, 16_000)[1000:-1000]).max() < 1e-3


def test_resampling_never_gives_nothing() -> None:
    assert resample(np.ones(1, np.float32), 48_000, 8000).size == 1
