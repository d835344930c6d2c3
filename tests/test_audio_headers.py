"""Headers that a decoder lets pass and that are wrong all the same, ends that are missing, and formats not read."""

import os
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from coatkit.data.audio import MAX_CHANNELS, duration, read
from coatkit.data.rows import AudioRef
from coatkit.errors import DataError

RATE = 8000


def noise(seconds: float, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (round(seconds * RATE), channels))
    return samples.astype(np.float32)


def changed(path: Path, at: int, kind: str, value: int) -> AudioRef:
    """The file with one field of its header changed."""
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, at, value)
    path.write_bytes(content)
    return AudioRef(path)


def refused(ref: AudioRef) -> str:
    """What both ways of looking at a file say of it."""
    said = []
    for look in (duration, lambda ref: read(ref, 10)):
        with pytest.raises(DataError) as caught:
            look(ref)
        assert str(caught.value).startswith(f"{ref}: ")
        said.append(str(caught.value).removeprefix(f"{ref}: "))
    return said[0] if said[0] == said[1] else " / ".join(said)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", noise(1), RATE, subtype="PCM_16")
    return tmp_path / "a.wav"


@pytest.mark.parametrize(
    ("at", "kind", "value", "says"),
    [
        (22, "<H", 2, "2 channels of 16 bits at 8000 Hz in 2 bytes a frame and 16000 a second"),
        (24, "<I", 16_000, "1 channels of 16 bits at 16000 Hz in 2 bytes a frame and 16000 a second"),
        (28, "<I", 8000, "1 channels of 16 bits at 8000 Hz in 2 bytes a frame and 8000 a second"),
        (32, "<H", 4, "1 channels of 16 bits at 8000 Hz in 4 bytes a frame and 16000 a second"),
        (34, "<H", 17, "1 channels of 17 bits at 8000 Hz in 2 bytes a frame and 16000 a second"),
        (34, "<H", 8, "1 channels of 8 bits at 8000 Hz in 2 bytes a frame and 16000 a second"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(wav: Path, at: int, kind: str, value: int, says: str) -> None:
    assert refused(changed(wav, at, kind, value)) == f"its header contradicts itself: {says}"


def test_bits_that_fill_the_same_bytes_are_taken(wav: Path) -> None:
    before, _ = read(AudioRef(wav), 10)
    np.testing.assert_array_equal(read(changed(wav, 34, "<H", 15), 10)[0], before)


SUBTYPES = ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")
KINDS = [(f, s) for f in ("WAV", "WAVEX", "RF64", "W64") for s in SUBTYPES if soundfile.check_format(f, s)]


@pytest.mark.parametrize(("format", "subtype"), KINDS)
def test_headers_as_they_should_be_are_taken(tmp_path: Path, format: str, subtype: str) -> None:
    for channels in (1, 2, 5):
        if subtype == "IMA_ADPCM" and channels > 2:
            continue
        path = tmp_path / f"{channels}.wav"
        soundfile.write(path, noise(0.5, channels), RATE, format=format, subtype=subtype)
        assert duration(AudioRef(path)) == pytest.approx(0.5, abs=0.1)
        assert read(AudioRef(path), 10)[1] == RATE


def test_a_program_that_left_the_bytes_per_second_out_is_forgiven(wav: Path) -> None:
    assert duration(changed(wav, 28, "<I", 0)) == 1.0


@pytest.mark.parametrize("size", [0x7FFF_F000, 2**31, 2**32 - 1])
def test_a_size_that_a_pipe_left_open_is_forgiven(wav: Path, size: int) -> None:
    changed(wav, 4, "<I", size)
    assert read(changed(wav, 40, "<I", size), 10)[0].size == RATE


@pytest.mark.parametrize("rate", [1, 99, 768_001, 2**31 - 1])
def test_rates_no_sound_has_are_refused(wav: Path, rate: int) -> None:
    assert refused(changed(wav, 24, "<I", rate)) == f"its header says {rate} Hz; 100 to 768,000 Hz are taken"


def test_the_number_of_channels_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(0.1, MAX_CHANNELS), RATE)
    assert read(AudioRef(path), 10)[0].shape == (800,)
    soundfile.write(path, noise(0.1, MAX_CHANNELS + 1), RATE)
    assert refused(AudioRef(path)) == "its header says 65 channels; 64 at most are taken"


def test_a_long_sound_of_many_channels_is_read_in_blocks(tmp_path: Path) -> None:
    samples = noise(10, 32)  # 2.6 M samples, more than are decoded at once
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read(AudioRef(tmp_path / "a.wav"), 10)[0], samples.mean(1, dtype=np.float32))


def test_memory_follows_the_frames_not_the_channels(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(20, MAX_CHANNELS), RATE, subtype="PCM_U8")
    tracemalloc.start()
    try:
        samples, _ = read(AudioRef(tmp_path / "a.wav"), 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * samples.size + (16 << 20)  # all channels at once are 41 MB


def test_frames_that_a_header_invents_take_no_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", noise(1), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[22:26] = b"\xff\xff\xff\xff"  # 2**32 - 1 frames, 17 GB
    (tmp_path / "a.flac").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.flac: "):
            read(AudioRef(tmp_path / "a.flac"), 1e9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_a_length_that_no_header_states_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(1), RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert refused(AudioRef(path)).startswith("its header does not say how long it is; convert it again: ffmpeg ")


@pytest.mark.parametrize("kept", [44, 0.5, 0.95])
@pytest.mark.parametrize("format", ["WAV", "RF64", "AIFF", "AU", "W64"])
def test_plain_samples_cut_short_are_refused(tmp_path: Path, format: str, kept: float) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(1), RATE, format=format, subtype="PCM_16")
    content = path.read_bytes()
    head = len(content) - 2 * RATE
    path.write_bytes(content[: head + (kept if isinstance(kept, int) else round(kept * 2 * RATE))])
    assert refused(AudioRef(path)).startswith("truncated: ")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_without_its_last_page_is_refused(tmp_path: Path, subtype: str, inside: bool) -> None:
    path = tmp_path / "a.ogg"
    soundfile.write(path, noise(6), RATE, format="OGG", subtype=subtype)
    whole = path.read_bytes()

    def put(content: bytes) -> AudioRef:
        path.write_bytes(content)
        if not inside:
            return AudioRef(path)
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(path, "a.ogg")
        with tarfile.open(tmp_path / "a.tar") as tar:
            member = tar.getmember("a.ogg")
        return AudioRef(tmp_path / "a.tar", part=f"{member.offset_data}+{member.size}")

    assert read(put(whole), 10)[0].size == 6 * RATE
    last = whole.rfind(b"OggS")
    assert refused(put(whole[:last])) == "truncated: its last page is missing"
    for left in (7, 20, 27, 28, 60, len(whole) - last - 1):
        assert refused(put(whole[: last + left])) == "truncated: its last page is cut off"
    assert read(put(whole + b"an editor's note"), 10)[0].size == 6 * RATE


def test_samples_beyond_any_scale_are_refused(tmp_path: Path) -> None:
    samples = 2.0**31 * noise(1)  # whole numbers of 32 bits, kept as floats
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    assert read(AudioRef(tmp_path / "a.wav"), 10)[0].max() == samples.max()
    samples[5] = 1e30
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=r"a\.wav: holds samples up to 1e\+30, which no sound has; it is damaged"):
        read(AudioRef(tmp_path / "a.wav"), 10)


def test_channels_that_overflow_when_they_are_averaged_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full((100, 2), 3e38, np.float32), RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=r"a\.wav: holds NaN or infinite samples"):
        read(AudioRef(tmp_path / "a.wav"), 10)


OTHERS = {
    "MP4 or M4A is not read; convert it: ffmpeg -i IN -map a:0 OUT.flac": b"\0\0\0\x20ftypM4A \0\0\0\0",
    "WebM or Matroska is not read; convert it: ffmpeg": b"\x1a\x45\xdf\xa3",
    "WMA or ASF is not read; convert it: ffmpeg": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "AAC is not read; convert it: ffmpeg": b"\xff\xf1\x50\x80",
    "AMR is not read; convert it: ffmpeg": b"#!AMR\n",
    "it is a Git LFS pointer; run `git lfs pull`": b"version https://git-lfs.github.com/spec/v1\n",
    "it is a web page": b"\n<!DOCTYPE html>",
    "it is an archive; unpack it": b"PK\x03\x04",
}


@pytest.mark.parametrize("suffix", ["wav", "mp3", "bin"])
@pytest.mark.parametrize("says", OTHERS)
def test_what_it_is_instead_is_said(tmp_path: Path, says: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(OTHERS[says] + bytes(500))
    assert says in refused(AudioRef(path))


def test_mp3_without_a_frame_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(bytes(5000))
    assert "it holds no frame of MP3" in refused(AudioRef(tmp_path / "a.mp3"))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        assert "it is no file but a pipe, socket or device" in refused(AudioRef(tmp_path / f"{name}.wav"))
    assert "symbolic links" in refused(AudioRef(tmp_path / "loop.wav"))
    assert "there is no such file" in refused(AudioRef(tmp_path / "a\0.wav"))
