"""From requests of lmms-eval to rows: lengths, ends, sounds in every form tasks give them, batches."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from coatkit import AUDIO_TAG, DataError, PluginError
from coatkit_eval_lmms.asking import How, batches, how, request, samples_of

RATE = 8_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def encoded(samples: np.ndarray, kind: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format=kind)
    return stream.getvalue()


# How long, and until where


def test_lengths_and_ends_are_the_tasks() -> None:
    assert how({"max_new_tokens": 8, "until": ["\n\n", ""]}, 64) == (How(8, ("\n\n",)), {})
    assert how({"until": "\n"}, 64) == (How(64, ("\n",)), {})
    assert how({"until": None, "do_sample": False, "temperature": 0.0, "top_p": 1.0, "num_beams": 1}, 5)[1] == {}


def test_what_greedy_decoding_has_no_use_for_is_named() -> None:
    given = {"temperature": 0.2, "top_p": 0.9, "do_sample": True, "num_beams": 4, "image_aspect_ratio": "original"}
    assert how({**given, "max_new_tokens": 3}, 64) == (How(3), given)


@pytest.mark.parametrize("kwargs", [{"max_new_tokens": 0}, {"max_new_tokens": "8"}, {"until": [1]}])
def test_wrong_lengths_and_ends_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=next(iter(kwargs))):
        how(kwargs, 64)


def test_an_answer_ends_before_the_first_of_its_ends() -> None:
    assert How(8, ("\n\n", "Q:")).cut("yes Q: why\n\nno") == "yes "
    assert How(8, ("\n\n",)).cut("yes\nno") == "yes\nno"
    assert How(8).cut("yes\n\nno") == "yes\n\nno"


# Sounds


def test_sounds_come_in_many_forms(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(TONE))
    # What torchcodec's AudioDecoder gives, by its documentation; it does not load beside a torch for CPUs.
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=TONE[None], sample_rate=RATE))
    stereo = np.stack([TONE, np.zeros_like(TONE)])
    forms: list[tuple[Any, float, float]] = [
        (path, 1.0, 1e-4),
        (str(path), 1.0, 1e-4),
        ({"path": str(path), "bytes": None}, 1.0, 1e-4),
        ({"path": "gone.flac", "bytes": encoded(TONE, "FLAC")}, 1.0, 1e-4),
        ({"path": None, "array": TONE.astype(np.float64), "sampling_rate": RATE}, 1.0, 0),
        ({"array": TONE.tolist(), "sampling_rate": RATE}, 1.0, 1e-7),
        ({"array": (TONE * 32767).astype(np.int16), "sampling_rate": RATE}, 1.0, 1e-4),
        ({"array": stereo, "sampling_rate": RATE}, 0.5, 1e-7),
        ({"array": stereo.T, "sampling_rate": RATE}, 0.5, 1e-7),
        ({"path": None, "bytes": encoded(stereo.T)}, 0.5, 1e-4),
        (decoder, 1.0, 0),
    ]
    for form, scale, tolerance in forms:
        samples, rate = samples_of(form, "task, document 3")
        assert (samples.dtype, samples.shape, rate) == (np.float32, (RATE,), RATE)
        assert np.abs(samples - scale * TONE).max() <= tolerance


@pytest.mark.parametrize(
    "sound",
    [
        {"path": None, "bytes": b"RIFF no sound at all"},
        {"array": [], "sampling_rate": RATE},
        {"array": [float("nan")], "sampling_rate": RATE},
        {"array": np.zeros((2, 2, 2)), "sampling_rate": RATE},
        {"path": None, "bytes": None},
        SimpleNamespace(size=(3, 3)),
    ],
)
def test_what_is_no_sound_is_refused_by_task_and_document(sound: Any) -> None:
    with pytest.raises(DataError, match="task, document 3"):
        samples_of(sound, "task, document 3")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"gone\.wav"):
        samples_of("gone.wav", "task, document 3")


# Rows


def tone(seconds: float) -> dict[str, Any]:
    return {"array": TONE[: round(seconds * RATE)], "sampling_rate": RATE}


def test_sounds_go_before_a_question_that_does_not_place_them() -> None:
    one, cut = request(7, "Which?", [tone(0.5), None, tone(0.25)], "t, document 0")
    assert (one.place, one.seconds, cut) == (7, 0.75, 0)
    assert [m.content for m in one.row.messages] == [f"{AUDIO_TAG}{AUDIO_TAG}Which?"]
    assert [ref.samples[0].size for ref in one.row.audios if ref.samples] == [RATE // 2, RATE // 4]
    placed = f"First {AUDIO_TAG}, then {AUDIO_TAG}: which?"
    assert request(0, placed, [tone(0.5), tone(0.5)], "t")[0].row.messages[0].content == placed


@pytest.mark.parametrize("visuals", [None, [], [None]])
def test_a_question_without_a_sound_is_text_alone(visuals: Any) -> None:
    one = request(0, "What is 1 plus 1?", visuals, "t")[0]
    assert (one.row.audios, one.row.messages[0].content, one.seconds) == ((), "What is 1 plus 1?", 0)


def test_long_sounds_are_cut_when_asked_and_counted() -> None:
    one, cut = request(0, "Which?", [tone(1.0), tone(0.25)], "t", crop=0.5)
    assert (cut, one.seconds) == (1, 0.75)
    assert one.row.audios[0].samples is not None
    assert one.row.audios[0].samples[0].tolist() == TONE[: RATE // 2].tolist()


def test_wrong_tags_and_empty_questions_are_refused() -> None:
    with pytest.raises(DataError, match=r"t, document 4.* 2 <audio> tags for 1 sound"):
        request(0, f"{AUDIO_TAG} and {AUDIO_TAG}?", [tone(0.5)], "t, document 4")
    with pytest.raises(DataError, match="t, document 4: the question is empty"):
        request(0, "  ", [tone(0.5)], "t, document 4")


def test_batches_hold_requests_of_like_length_and_every_one_once() -> None:
    made = [request(i, "Which?" + "?" * (i % 2), [tone(0.1 * (1 + i // 2))], "t")[0] for i in range(6)]
    assert [[one.place for one in part] for part in batches(made, 4)] == [[5, 4, 3, 2], [1, 0]]
