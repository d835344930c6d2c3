"""A run taken out of coatkit: what plain peft and transformers make of it, in a process that has no coatkit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

import coatkit
from coatkit.backbones.chat import thinking_template
from coatkit.cli import cli
from coatkit.data.rows import AudioRef, Message, Row
from coatkit.data.steps import load_batch
from coatkit.errors import PluginError, RunError
from coatkit.export.write import export

DOCS = Path(__file__).parents[1] / "docs/serving.md"
BACKBONES = ["mini", "audio-flamingo-3", "qwen2-audio", "qwen2.5-omni"]
# The first part of tensor names in published folders; a stock class and vLLM read these.
LAYOUT = {
    "mini": {"audio_tower", "language_model.lm_head", "language_model.model", "multi_modal_projector"},
    "audio-flamingo-3": {"audio_tower", "language_model.lm_head", "language_model.model", "multi_modal_projector"},
    "qwen2-audio": {"audio_tower", "language_model.lm_head", "language_model.model", "multi_modal_projector"},
    "qwen2.5-omni": {"thinker.audio_tower", "thinker.lm_head", "thinker.model", "thinker.visual"},
}
QUESTION = "What is heard?"

# What a user without coatkit runs: the model card's own code, on each folder in turn.
BY_HAND = """
import json, sys
sys.modules["coatkit"] = None  # importing it fails
for folder, sound in json.load(sys.stdin):
    code = open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0]
    code = code.replace('folder, sound = ".", "sound.wav"', f"folder, sound = {folder!r}, {sound!r}")
    print("ANSWER", end=" ")
    exec(compile(code, folder, "exec"), {})
"""


@pytest.fixture(scope="module", params=BACKBONES)
def run(request: pytest.FixtureRequest, new_project: Callable[[], Any], sound: Callable[..., Any]) -> Any:
    """A run of every backbone, tiny, that has learnt to answer two sounds by heart; its `.use` names the backbone."""
    project = new_project()
    project.rows = []
    for number, seconds in enumerate((0.6, 1.3)):
        project.add_clip(f"long{number}", sound(seconds, number), answer=f"it is number {number}")
    project.spec["backbone"]["use"] = request.param
    project.spec["stages"] = [
        {"name": "one", "steps": 120, "lr": 1e-2, "batch": {"rows": 2}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    project.use = request.param
    return project


@pytest.fixture(scope="module")
def sounds(run: Any) -> list[Path]:
    return [run.folder / row["audio"] for row in run.rows]


@pytest.fixture(scope="module")
def answers(run: Any, sounds: list[Path]) -> list[str]:
    model = coatkit.load(run.run.folder, device="cpu")
    found = [model.ask(sound, QUESTION) for sound in sounds]
    assert len(set(found)) == 2, "what was learnt must differ, or nothing is compared"
    return found


@pytest.fixture(scope="module")
def merged(run: Any) -> Path:
    return export(run.run.folder, run.folder / "merged", merge=True).folder


def by_hand(folders: list[tuple[Path, Path]]) -> list[str]:
    work = json.dumps([[str(folder), str(sound)] for folder, sound in folders])
    done = subprocess.run([sys.executable, "-c", BY_HAND], input=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [part.strip() for part in done.stdout.split("ANSWER ")[1:]]


# The whole model


def test_plain_transformers_answers_as_we_do(merged: Path, sounds: list[Path], answers: list[str]) -> None:
    assert by_hand([(merged, sound) for sound in sounds]) == answers


def test_the_documentations_code_does_it(merged: Path, run: Any, sounds: list[Path], answers: list[str]) -> None:
    if run.use not in ("mini", "audio-flamingo-3"):
        pytest.skip("the documentation shows it for the class of these two; every card shows it for its own")
    blocks = DOCS.read_text().split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if 'folder, sound = "model"' in block]
    code = code.replace('folder, sound = "model", "sound.wav"', f"folder, sound = {str(merged)!r}, {str(sounds[1])!r}")
    code = 'import sys\nsys.modules["coatkit"] = None\n' + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == answers[1]


def test_the_documented_length_is_the_number_of_audio_tokens(run: Any) -> None:
    def window(samples: int) -> int:
        return ((-(-samples // 160) - 1) // 2 + 1) // 2

    def documented(samples: int) -> int:
        if run.use in ("mini", "audio-flamingo-3"):
            return sum(window(min(480_000, samples - at)) for at in range(0, samples, 480_000))
        return window(samples)

    assert "W(n) = ((ceil(n / 160) - 1) // 2 + 1) // 2" in DOCS.read_text()
    preparer: Any = coatkit.load(run.run.folder, trained=False, device="cpu").backbone.preparer
    longest = 480_000 if run.use == "qwen2-audio" else 2_000_000
    for samples in [*range(1_300, 40_000, 777), *range(470_000, longest, 33_333), longest]:
        assert documented(samples) == preparer.audio_tokens(samples)


def test_the_folder_is_laid_out_as_a_published_one(merged: Path, run: Any) -> None:
    tensors = load_file(merged / "model.safetensors")
    depth = 2 if run.use == "qwen2.5-omni" else 1
    found = {".".join(name.split(".")[:depth]) for name in tensors}
    found = {".".join(name.split(".")[:2]) if name.startswith("language_model") else name for name in found} | {
        ".".join(name.split(".")[:2]) for name in tensors if name.startswith("language_model")
    }
    assert found - {"language_model"} == LAYOUT[run.use]
    assert not any("lora" in name or "thinking_rows" in name or "heads" in name for name in tensors)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == [
        "Qwen2_5OmniForConditionalGeneration" if run.use == "qwen2.5-omni" else describe_class(run)
    ]
    assert ("thinker_config" in config) == (run.use == "qwen2.5-omni")


def describe_class(run: Any) -> str:
    backbone: Any = coatkit.load(run.run.folder, trained=False, device="cpu").backbone
    return type(backbone.stock).__name__


def test_a_server_that_runs_as_somebody_else_can_read_it(merged: Path) -> None:
    usual = (merged / "config.json").stat().st_mode
    assert {f.name for f in merged.rglob("*") if f.is_file() and f.stat().st_mode != usual} == set()


def test_a_stock_class_finds_every_tensor_and_no_other(merged: Path, run: Any) -> None:
    backbone: Any = coatkit.load(run.run.folder, device="cpu").backbone
    model, told = type(backbone.stock).from_pretrained(merged, output_loading_info=True, local_files_only=True)
    assert not any(told.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    start = backbone.preparer.tokens.start
    rows = model.get_input_embeddings().weight[start : start + 3]
    assert torch.equal(rows, backbone.thinking_rows.rows)
    assert model.generation_config.suppress_tokens == [start, start + 1, start + 2, backbone.preparer.audio_token]


def test_weights_are_cast_when_asked(run: Any, tmp_path: Path) -> None:
    export(run.run.folder, tmp_path / "half", merge=True, dtype="bfloat16")
    with safe_open(tmp_path / "half/model.safetensors", "pt") as tensors:
        types = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    assert types == {torch.bfloat16}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_wider_type_is_merged_into_without_rounding_first(project: Any, tmp_path: Path) -> None:
    project.spec["backbone"]["dtype"] = "bfloat16"
    run = project.train()
    export(run.folder, tmp_path / "wide", merge=True, dtype="float32")
    wide = load_file(tmp_path / "wide/model.safetensors")
    backbone: Any = coatkit.load(run.folder, device="cpu").backbone
    layer = backbone.language_model.layers[0].self_attn.q_proj
    adapted = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
    assert torch.equal(wide["language_model.model.layers.0.self_attn.q_proj.weight"], adapted)
    start = backbone.preparer.tokens.start
    rows = wide["language_model.model.embed_tokens.weight"][start : start + 3]
    assert torch.equal(rows, backbone.thinking_rows.rows)


def test_nothing_of_this_machine_is_in_it(merged: Path, run: Any) -> None:
    for file in merged.rglob("*"):
        if file.suffix in {".json", ".md", ".jinja"}:
            assert str(run.folder) not in file.read_text(), file.name
            assert os.environ["COATKIT_CACHE"] not in file.read_text(), file.name
    card = (merged / "README.md").read_text()
    assert "**Random weights in backbone" in card
    assert "train.jsonl" in card


def test_heads_and_experts_lie_beside(merged: Path, run: Any) -> None:
    facts = json.loads((merged / "coatkit.json").read_text())
    assert facts["thinking"] == {
        "start": "<|audio_think_start|>",
        "think": "<|audio_think|>",
        "end": "<|audio_think_end|>",
        "placement": "response_prefix",
        "tokens_per_audio_token": 1.0,
    }
    assert set(facts["heads"]) == {"audio", "level"}
    assert facts["heads"]["level"]["dim"] == 2
    saved = load_file(merged / "coatkit/heads.safetensors")
    trained = {k: v for k, v in run.run.tensors().items() if k.startswith("heads.")}
    assert trained
    assert set(saved) == set(trained)
    assert all(torch.equal(saved[name], trained[name]) for name in trained)


# The adapter


@pytest.fixture(scope="module")
def base(run: Any) -> Path:
    """The stock model that the run started from, in a folder, as a user has it; with its own rows and tokens."""
    folder: Path = run.folder / "base"
    backbone: Any = coatkit.load(run.run.folder, trained=False, device="cpu").backbone
    backbone.save_merged(folder_of(folder))
    return folder


def folder_of(path: Path) -> Path:
    path.mkdir()
    return path


def test_plain_peft_answers_as_we_do(run: Any, base: Path, sounds: list[Path], answers: list[str]) -> None:
    done = export(run.run.folder, run.folder / "adapter")
    assert "model.safetensors" not in dict(done.files)
    config = json.loads((done.folder / "adapter_config.json").read_text())
    named = config["base_model_name_or_path"]
    assert named == "random" or (run.use == "mini" and (Path(named) / "config.json").is_file())
    # Made from random weights, it names no base that could be found: the user's own folder takes its place.
    card = done.folder / "README.md"
    card.write_text(card.read_text().replace(f".from_pretrained({named!r})", f".from_pretrained({str(base)!r})"))
    assert str(base) in card.read_text()
    assert by_hand([(done.folder, sound) for sound in sounds]) == answers
    (indices,) = config["trainable_token_indices"].values()
    assert len(indices) == 3


def test_what_an_adapter_cannot_hold_is_refused(project: Any) -> None:
    project.spec["backbone"]["train"] = {"lm": "full"}
    run = project.train()
    with pytest.raises(PluginError, match=r"train\.lm: full: an adapter cannot hold it; .* --merge"):
        export(run.folder, project.folder / "adapter")
    assert not (project.folder / "adapter").exists()
    assert export(run.folder, project.folder / "whole", merge=True).folder.is_dir()


def test_a_learnt_projector_comes_along(project: Any, tmp_path: Path) -> None:
    project.spec["backbone"]["train"] = {"projector": "full"}
    run = project.train()
    done = export(run.folder, tmp_path / "adapter")
    saved = load_file(done.folder / "adapter_model.safetensors")
    names = [name for name in saved if "multi_modal_projector" in name]
    trained = run.tensors()
    assert len(names) == 4
    for name in names:
        ours = next(k for k in trained if k.endswith(name.removeprefix("base_model.model.")))
        assert torch.equal(saved[name], trained[ours])


# The chat template


@pytest.mark.parametrize("placement", ["response_prefix", "before_header"])
@pytest.mark.parametrize("use", BACKBONES)
def test_the_template_writes_what_the_preparer_lays_out(project: Any, use: str, placement: str, sound: Any) -> None:
    backbone: Any = coatkit.load_backbone(
        use, weights="random", thinking={"placement": placement, "tokens_per_audio_token": 0.5}, device="cpu"
    )
    preparer = backbone.preparer
    clips = [AudioRef(Path(f"clip{i}"), samples=(sound(0.5 + 0.4 * i, i), 16_000)) for i in range(3)]
    talks = [
        (["<audio>What is heard?"], 1),
        (["What is 3 plus 1?"], 0),
        (["<audio>One.<audio>Two?"], 2),
        (["<audio>What is heard?", "a dog", "<audio>And now?"], 2),
        (["Hello", "hi", "<audio>What is heard?", "a dog", "Sure?", "yes", "<audio>And now?"], 2),
    ]
    template = thinking_template(preparer)
    for turns, sounds in talks:
        messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)]
        rows = [Row("row", tuple(messages), tuple(clips[:sounds]))]
        inputs = load_batch(rows, preparer, (), 120.0, train=False).inputs
        ids = inputs.tokens["input_ids"][0].tolist()
        lengths, run = [], 0
        for token in ids:
            run = run + 1 if token == preparer.tokens.think else 0
            if run == 1:
                lengths.append(0)
            if run:
                lengths[-1] += 1
        talk = [{"role": m.role, "content": in_parts(m.content)} for m in messages]
        options: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        if lengths:
            options["audio_think_len"] = lengths if len(lengths) > 1 else lengths[0]
        text = preparer.tokenizer.apply_chat_template(talk, **options)
        # Placeholders are the processor's to expand: here each is one, and there as many as the sound has tokens.
        ours = preparer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert once(ours, preparer.audio_token) == once(ids, preparer.audio_token)
        options.pop("audio_think_len", None)
        bare = preparer.tokenizer.apply_chat_template(talk, **options)
        assert bare.count("<|audio_think|>") == bare.count("<|audio_think_start|>") == len(lengths)


def in_parts(text: str) -> list[dict[str, str]]:
    first, *rest = text.split("<audio>")
    parts = [{"type": "text", "text": first}] if first else []
    for after in rest:
        parts += [{"type": "audio"}, {"type": "text", "text": after}]
    return [part for part in parts if part.get("text") != ""]


def once(ids: list[int], token: int) -> list[int]:
    """With a run of `token` as one."""
    return [one for i, one in enumerate(ids) if one != token or i == 0 or ids[i - 1] != token]


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ([3, 4], "audio_think_len has 2 numbers for 1 blocks"),
        (0, "audio_think_len must be 1 or more"),
        ("12", "audio_think_len must be a whole number"),
        (["12"], "audio_think_len must be a whole number"),
        (2.5, "audio_think_len must be a whole number"),
        (torch.tensor(3), "audio_think_len must be a whole number"),
    ],
)
def test_a_wrong_length_is_told(length: Any, said: str) -> None:
    preparer: Any = coatkit.load_backbone("mini", weights="random", device="cpu").preparer
    talk = [{"role": "user", "content": "<sound>What?"}]
    with pytest.raises(Exception, match=said):
        preparer.tokenizer.apply_chat_template(
            talk, chat_template=thinking_template(preparer), add_generation_prompt=True, audio_think_len=length
        )


# The command


def test_the_command_writes_and_says_what(project: Any, tmp_path: Path) -> None:
    run = project.train()
    arguments = ["export", str(run.folder), "--to", str(tmp_path / "out"), "--push", "me/model", "--dry-run"]
    arguments += ["--base-model", "you/stock"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "you/stock"
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: you/stock" in card
    assert "from_pretrained('you/stock')" in card
    assert "adapter_model.safetensors" in done.output
    assert "would be uploaded to me/model:" in done.output
    again = CliRunner().invoke(cli, arguments)
    assert isinstance(again.exception, RunError)
    assert "is there already" in str(again.exception)


def test_an_adapter_of_a_folder_that_others_lack_is_not_uploaded(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project.train()
    base = tmp_path / "stock"
    base.mkdir()
    monkeypatch.setattr("coatkit.backbones.hf.HFBackbone.base_model", lambda self: (str(base), None))
    done = CliRunner().invoke(cli, ["export", str(run.folder), "--to", str(tmp_path / "out")], catch_exceptions=False)
    assert f"note: the adapter names {base} as its base" in done.output
    arguments = ["export", str(run.folder), "--to", str(tmp_path / "two"), "--push", "me/model"]
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, RunError)
    assert "not uploaded: the adapter names" in str(done.exception)
    assert "--base-model OWNER/NAME, or --merge" in str(done.exception)
    assert "base_model:" not in (tmp_path / "two/README.md").read_text().split("---")[1]


def test_a_wrong_name_is_told_before_anything_is_written(project: Any, tmp_path: Path) -> None:
    run = project.train()
    for name in ("a/b/c", "model"):
        done = CliRunner().invoke(cli, ["export", str(run.folder), "--to", str(tmp_path / "out"), "--push", name])
        assert isinstance(done.exception, RunError)
        assert f"--push {name}:" in str(done.exception)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "bfloat16"], "--dtype: an adapter keeps its type"),
        (["--dry-run"], "--dry-run: goes with --push"),
        (["--private"], "--private: goes with --push"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["export", str(tmp_path), "--to", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_a_run_without_the_block_says_so(project: Any) -> None:
    project.spec["thinking"] = "off"
    run = project.train()
    done = export(run.folder, project.folder / "out", merge=True)
    card = (done.folder / "README.md").read_text()
    assert "It was trained without a thinking block." in card
    assert "audio_think_len" not in card
    assert "``" not in card.replace("```", "")
    (answer,) = by_hand([(done.folder, project.folder / "clips/r10.wav")])
    assert answer == coatkit.load(run.folder, device="cpu").ask(project.folder / "clips/r10.wav", QUESTION)


def test_a_failed_write_leaves_nothing(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project.train()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coatkit.export.write.save_file", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device"):
        export(run.folder, project.folder / "out")
    assert not [path for path in project.folder.iterdir() if "out" in path.name]
