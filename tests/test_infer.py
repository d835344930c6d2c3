"""Using a run: the same answer however a sound is given, and errors that name what is wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from click.testing import CliRunner

import coatkit
from coatkit import AudioBatch, CoatkitError, DataError, load_backbone, load_expert
from coatkit.cli import cli
from coatkit.data.rows import AudioRef, Message, Row
from coatkit.errors import RunError, SpecError
from coatkit.infer import AudioThinker, asked

MakeSound = Callable[..., np.ndarray]
QUESTION = "What is heard?"


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Any:
    """A project and its run, trained hard enough on a few rows to answer them by heart."""
    project = new_project()
    project.rows = project.rows[:2] + project.rows[-1:]
    project.spec["stages"] = [
        {"name": "one", "steps": 60, "lr": 1e-2, "batch": {"rows": 3}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    return project


@pytest.fixture(scope="module")
def model(trained: Any) -> AudioThinker:
    return coatkit.load(trained.run.folder, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, sound: MakeSound) -> Path:
    """Three sounds: 16 kHz, 44.1 kHz and stereo."""
    folder = tmp_path_factory.mktemp("files")
    soundfile.write(folder / "a.wav", sound(0.5, 1), 16_000, subtype="FLOAT")
    soundfile.write(folder / "b.wav", sound(0.3, 2, 44_100), 44_100, subtype="FLOAT")
    stereo = np.stack([sound(0.4, 3), sound(0.4, 4)], 1)
    soundfile.write(folder / "c.wav", stereo, 16_000, subtype="FLOAT")
    return folder


# Answers


def test_a_trained_run_answers_what_it_learnt(trained: Any, model: AudioThinker) -> None:
    clips = trained.folder / "clips"
    assert model.ask(clips / "r00.wav", QUESTION) == "clip 0"
    assert model.ask(str(clips / "r01.flac"), "<audio>" + QUESTION) == "clip 1"
    assert model.ask(None, "What is 3 plus 1?") == "4"


def test_untrained_is_the_model_before_the_first_step(trained: Any, model: AudioThinker, files: Path) -> None:
    untrained = coatkit.load(trained.run.folder, trained=False, device="cpu")
    assert untrained.ask(files / "a.wav", QUESTION) != model.ask(files / "a.wav", QUESTION)
    assert "untrained" in untrained.name
    assert "untrained" not in model.name
    state = untrained.backbone.model.state_dict()
    assert all((value == 0).all() for name, value in state.items() if "lora_B" in name)
    learnt = trained.run.tensors()
    after = model.backbone.model.state_dict()
    assert all(torch.equal(after[n.removeprefix("net.")], v) for n, v in learnt.items() if n.startswith("net."))


def test_a_batch_is_answered_as_one_by_one(trained: Any, model: AudioThinker, files: Path) -> None:
    clips = trained.folder / "clips"
    questions = [
        (clips / "r01.flac", QUESTION),
        (None, "What is 3 plus 1?"),
        (files / "a.wav", "Why?"),
        (clips / "r00.wav", QUESTION),
        (files / "b.wav", QUESTION),
    ]
    together = model.ask_batch(questions, max_new_tokens=12)
    assert together == [model.ask(*question, max_new_tokens=12) for question in questions]
    assert together[0] != together[3]
    assert model.ask_batch([]) == []


def test_samples_are_answered_like_their_file(
    model: AudioThinker, files: Path, monkeypatch: pytest.MonkeyPatch, sound: MakeSound
) -> None:
    heard: list[np.ndarray] = []
    prepare = model.backbone.preparer.prepare

    def listen(rows: Any, audio: AudioBatch, *, train: bool) -> Any:
        heard.append(audio.samples[0, : int(audio.lengths[0])].numpy())
        return prepare(rows, audio, train=train)

    monkeypatch.setattr(model.backbone.preparer, "prepare", listen)
    pairs = [
        (files / "a.wav", (sound(0.5, 1), 16_000)),
        (files / "b.wav", (sound(0.3, 2, 44_100).astype(np.float64), 44_100)),
        (files / "c.wav", ((sound(0.4, 3) + sound(0.4, 4)) / 2, 16_000)),
        (AudioRef(files / "a.wav", 0.1, 0.35), (sound(0.5, 1)[1600:5600], 16_000)),
    ]
    for file, samples in pairs:
        assert model.ask(file, QUESTION) == model.ask(samples, QUESTION)
        assert len(heard[-1]) == len(heard[-2])
        np.testing.assert_allclose(heard[-2], heard[-1], atol=1e-6)
    np.testing.assert_allclose(heard[3], soxr.resample(sound(0.3, 2, 44_100), 44_100, 16_000), atol=1e-4)


def test_options_reach_generate(model: AudioThinker, files: Path) -> None:
    short = model.ask(files / "a.wav", QUESTION, max_new_tokens=2)
    assert len(short) <= 2
    assert model.ask(files / "a.wav", QUESTION, max_new_tokens=64, do_sample=True, temperature=1e-4) == model.ask(
        files / "a.wav", QUESTION
    )


def test_asking_leaves_the_model_in_evaluation_mode(model: AudioThinker) -> None:
    assert not any(module.training for module in model.backbone.model.modules())


def test_a_run_needs_its_data_no_more(trained: Any, tmp_path: Path, files: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(trained.run.folder, folder)
    (trained.folder / "train.jsonl").rename(trained.folder / "train.gone")
    try:
        model = coatkit.load(folder, device="cpu")
    finally:
        (trained.folder / "train.gone").rename(trained.folder / "train.jsonl")
    assert model.ask(trained.folder / "clips/r00.wav", QUESTION) == "clip 0"


def test_rows_of_several_turns_and_sounds_are_answered(trained: Any, model: AudioThinker) -> None:
    clips = [AudioRef(trained.folder / "clips" / name) for name in ("r00.wav", "r01.flac")]
    ask, said = Message("user", "<audio>" + QUESTION), Message("assistant", "clip 0")
    rows = [
        Row("one", (ask, said), (clips[0],)),  # the last answer is left out
        Row("two", (ask, said, ask), tuple(clips)),
        Row("both", (Message("user", "<audio><audio>Same?"),), tuple(clips)),
        Row("none", (Message("system", "Be brief."), Message("user", "What is 3 plus 1?"))),
    ]
    together = model.answer(rows, max_new_tokens=12)
    assert together == [model.answer([row], max_new_tokens=12)[0] for row in rows]
    assert together[0] == model.ask(clips[0], QUESTION, max_new_tokens=12) == "clip 0"
    lengths = [model.prepare([row]).think_lengths.tolist() for row in rows]
    assert [len(one) for one in lengths] == [1, 2, 2, 0]
    assert all(length > 0 for one in lengths for length in one)
    assert model.answer([]) == []


def test_a_row_that_cannot_be_answered_is_named(model: AudioThinker, tmp_path: Path) -> None:
    row = Row("r7", (Message("user", "<audio>Hm?"),), (AudioRef(tmp_path / "gone.wav"),), "data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7 \(row r7\): .*gone\.wav: .*no such file"):
        model.answer([row])


def test_the_command_looks_at_the_question_before_it_loads_the_model(
    trained: Any, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatkit.infer.load", lambda *a, **k: pytest.fail("the model was loaded"))
    arguments = ["ask", str(trained.run.folder)]
    for words, message in (
        ([str(tmp_path / "gone.wav"), "Hm?"], r"gone\.wav: cannot be opened as sound: there is no such file"),
        ([str(files / "a.wav"), " "], "the question is empty"),
    ):
        result = CliRunner().invoke(cli, [*arguments, *words])
        assert isinstance(result.exception, CoatkitError)
        assert re.search(message, str(result.exception))


# Sounds that cannot be asked about


SILENCE = np.zeros(16_000, np.float32)
BROKEN: dict[str, tuple[Any, str]] = {
    "missing file": ("gone.wav", r"gone\.wav: cannot be decoded: there is no such file"),
    "no sound file": ("no.wav", r"no\.wav: cannot be decoded"),
    "empty file": (Path("empty.wav"), r"empty\.wav: holds no sound"),
    "too short": (Path("short.wav"), r"short\.wav .*19 ms is too short to give one audio token"),
    "too long": ((np.zeros(151 * 16_000, np.float32), 16_000), r"question 1 .*151\.0 s is more than the 150 s"),
    "outside": (AudioRef(Path("short.wav"), 3.0, 4.0), r"short\.wav: 3 to 4 s lies outside"),
    "two channels": ((np.zeros((2, 800), np.float32), 16_000), r"got shape \(2, 800\)"),
    "no samples": ((SILENCE[:0], 16_000), r"got shape \(0,\)"),
    "NaN": ((SILENCE * np.nan, 16_000), "non-empty finite mono"),
    "16-bit integers": ((SILENCE.astype(np.int16), 16_000), "divide 16-bit integers by 32768"),
    "no sample rate": ((SILENCE, 0), "the sample rate must be in Hz, got 0"),
}


@pytest.mark.parametrize(("audio", "message"), BROKEN.values(), ids=BROKEN)
def test_a_sound_that_cannot_be_heard_is_named(
    model: AudioThinker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audio: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no.wav").write_bytes(b"no sound")
    soundfile.write("short.wav", np.zeros(300), 16_000)
    soundfile.write("empty.wav", np.zeros(0), 16_000)
    with pytest.raises(DataError, match=message):
        model.ask(audio, QUESTION)


@pytest.mark.parametrize("question", ["", "  \n", "<audio>"])
def test_an_empty_question_is_refused(model: AudioThinker, files: Path, question: str) -> None:
    with pytest.raises(DataError, match=r"a\.wav .*the question is empty"):
        model.ask(files / "a.wav", question)
    with pytest.raises(DataError, match=r"question 2.*the question is empty"):
        model.ask_batch([(None, "Hello?"), (None, question)])


@pytest.mark.parametrize(("tags", "audio"), [(2, True), (1, False)])
def test_tags_must_match_the_sound(model: AudioThinker, files: Path, tags: int, audio: bool) -> None:
    with pytest.raises(DataError, match=rf"has {tags} <audio> tags for {int(audio)} sound\(s\)"):
        model.ask(files / "a.wav" if audio else None, "<audio>" * tags + "Same?")


# Runs that cannot be loaded


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing: is not a run folder"):
        coatkit.load(tmp_path / "nothing")


@pytest.mark.parametrize("device", ["cuda:99", "tpux"])
def test_a_device_that_is_not_there(trained: Any, device: str) -> None:
    with pytest.raises(RunError, match=f"device '{device}': .*leave it out"):
        coatkit.load(trained.run.folder, device=device)


def test_no_checkpoint_yet(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "young"
    shutil.copytree(trained.run.folder, folder)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunError, match=r"young: has no checkpoint yet; train it with: coatkit train"):
        coatkit.load(folder, device="cpu")
    assert coatkit.load(folder, trained=False, device="cpu").ask(None, "Hi.", max_new_tokens=1) is not None


def test_a_checkpoint_of_another_model(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(trained.run.folder, folder)
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("rank: 4", "rank: 8"))
    with pytest.raises(RunError, match=r"does not fit this model: .*lora_A.* is \(4, 64\), the model's is \(8, 64\)"):
        coatkit.load(folder, device="cpu")


def test_a_run_whose_expert_is_gone_still_answers(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(trained.run.folder, folder)
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("level.py", "gone.py"))
    model, same = coatkit.load(folder, device="cpu"), coatkit.load(trained.run.folder, device="cpu")
    assert model.ask(None, "Hello?", max_new_tokens=4) == same.ask(None, "Hello?", max_new_tokens=4)


def test_a_run_whose_backbone_is_gone(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(trained.run.folder, folder)
    spec = folder / "spec.yaml"
    spec.write_text(spec.read_text().replace("use: mini", "use: minni"))
    with pytest.raises(SpecError, match="no backbone named 'minni' is installed"):
        coatkit.load(folder, device="cpu")


# Experts and backbones on their own

EXPERT = """
import torch
from coatkit import Expert, Features

class Ramp(Expert):
    frame_rate, dim = 25.0, 2

    def __init__(self, slope: float = 1.0):
        self.weight = torch.tensor([slope])
        self.norm = torch.nn.BatchNorm1d(2)

    def load(self, device, dtype):
        torch.nn.init.normal_(self.norm.weight)

    def encode(self, audio):
        frames = audio.lengths // 640
        ramp = self.weight * torch.arange(float(frames.max()))[None, :, None]
        return Features(ramp.expand(len(audio), -1, 2), frames, self.frame_rate)

class Shapeless(Expert):
    def encode(self, audio): ...

class Fussy(Ramp):
    def load(self, device, dtype):
        raise KeyError("no weights")

class Stray:
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of experts in it."""
    (tmp_path / "mine.py").write_text(EXPERT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_expert_by_file(here: Path, sound: MakeSound) -> None:
    expert = load_expert("./mine.py:Ramp", slope=2.0)
    features = expert.encode(AudioBatch.from_arrays([sound(0.2), sound(0.12)], expert.sample_rate))
    assert features.lengths.tolist() == [5, 3]
    assert features.values[1, :, 0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_an_expert_is_known_by_its_class_settings_and_weights(here: Path) -> None:
    prints = [load_expert("./mine.py:Ramp", slope=slope).fingerprint() for slope in (1.0, 1.0, 2.0)]
    assert prints[0] == prints[1] != prints[2]
    other: Any = load_expert("./mine.py:Ramp")
    assert other.fingerprint() == prints[0]
    with torch.no_grad():
        other.norm.num_batches_tracked += 1
    assert other.fingerprint() != prints[0]


def test_an_expert_and_a_backbone_by_name(sound: MakeSound) -> None:
    backbone = load_backbone("mini", weights="random", device="cpu")
    expert = load_expert("audio", backbone=backbone, target="tower")
    assert (expert.dim, expert.frame_rate, expert.sample_rate) == (32, 25.0, 16_000)
    assert load_backbone("mini", weights="random", thinking="off", device="cpu").parts().keys() == {"lora", "projector"}


def test_a_backbone_by_module() -> None:
    backbone = load_backbone("coatkit_backbone_mini.backbone:MiniBackbone", weights="random", device="cpu")
    assert backbone.hidden_size == 64


def test_a_backbones_start_follows_the_seed() -> None:
    def adapters(seed: int) -> torch.Tensor:
        backbone = load_backbone("mini", weights="random", seed=seed, device="cpu")
        return torch.cat([p.flatten() for n, p in backbone.model.named_parameters() if "lora_A" in n])

    before = torch.get_rng_state()
    assert torch.equal(adapters(1), adapters(1))
    assert not torch.equal(adapters(1), adapters(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("load", "use", "options", "message"),
    [
        (load_expert, "audo", {}, "no expert named 'audo' is installed\n.*did you mean 'audio'"),
        (load_backbone, "mini", {"dtyp": "float32"}, "mini: dtyp: .*; options: .*dtype"),
        (load_backbone, "mini", {"thinking": "on"}, "thinking: .*; give 'off' or a ThinkingSpec"),
        (load_backbone, "mini", {"thinking": {"placement": "last"}}, "thinking: placement: .*response_prefix"),
        (
            load_backbone,
            "mini",
            {"weights": "random", "lora": {"rank": 0}},
            r"lora\.rank: .*greater than or equal to 1",
        ),
        (load_expert, "audio", {"target": "consumed"}, "reads the backbone's features; pass one to load_expert"),
        (load_expert, "audio", {"targets": "tower"}, "audio: targets: .*; options: target"),
        (load_expert, "./mine.py:Ramp", {"slop": 1.0}, "mine.py:Ramp: .*slop"),
        (load_expert, "./mine.py:Rump", {}, "defines no class 'Rump'; did you mean 'Ramp'"),
        (load_expert, "./yours.py:Ramp", {}, "there is no file"),
        (load_expert, "./mine.py:Shapeless", {}, r"the expert's frame_rate is None; set it to a positive number"),
        (load_expert, "./mine.py:Fussy", {}, "cannot be loaded: KeyError: 'no weights'"),
        (load_expert, "./mine.py:Stray", {}, r"is not a subclass of coatkit\.Expert"),
        (load_backbone, "./mine.py:Ramp", {}, r"is not a subclass of coatkit\.Backbone"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    here: Path, load: Callable[..., Any], use: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CoatkitError, match=f"(?s){message}"):
        load(use, **options)


# In pieces, and with the thinking


def test_pieces_are_the_answer(model: AudioThinker, files: Path) -> None:
    whole = model.ask(files / "a.wav", QUESTION)
    found = list(model.stream(files / "a.wav", QUESTION))
    assert "".join(found) == whole
    assert len(found) > 1


def test_decoding_ends_when_nobody_listens(model: AudioThinker, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    forward = model.backbone.language_model.forward  # type: ignore[attr-defined]

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.backbone.language_model, "forward", counted)  # type: ignore[attr-defined]
    stream = model.stream(files / "a.wav", QUESTION, max_new_tokens=400, eos_token_id=-1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert 0 < len(steps) < 400


def test_what_fails_while_decoding_is_raised(model: AudioThinker, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(model.backbone.language_model, "forward", broken)  # type: ignore[attr-defined]
    with pytest.raises(MemoryError, match="no more"):
        list(model.stream(files / "a.wav", QUESTION))


def test_the_thinking_comes_along(model: AudioThinker, files: Path) -> None:
    answer, thought = model.ask(files / "a.wav", QUESTION, return_thinking=True)
    assert answer == model.ask(files / "a.wav", QUESTION)
    (sound,) = thought.sounds
    assert sound.states.shape == (int(model.prepare([asked(files / "a.wav", QUESTION)]).think_lengths[0]), 64)
    assert set(sound.predicted) == {"audio", "level"}
