"""The examples in the tree: their specs pass, their data is what the documents say, and the custom expert trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import coatkit
from coatkit.cli import cli
from coatkit.data.rows import JsonlRows

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART = EXAMPLES / "quickstart"
SPECS = sorted(EXAMPLES.rglob("*.yaml"))
RECIPES = [*sorted((EXAMPLES / "paper").glob("*.yaml")), *sorted((EXAMPLES / "paper").glob("*/*.yaml"))]
RANDOM = [f"experts.{name}.weights=random" for name in ("spidr", "panns", "emotion2vec", "mert")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_spec_passes_check(spec: Path) -> None:
    result = CliRunner().invoke(cli, ["check", str(spec)])
    assert result.exit_code == 0, result.output


def rows(name: str) -> list[coatkit.data.rows.Row]:
    return list(JsonlRows(QUICKSTART / name))


def test_heldout_rows_share_no_clip_and_no_heldout_voice_with_training() -> None:
    train, heldout = rows("train.jsonl"), rows("heldout.jsonl")
    clips = [{row.audios[0].path.name for row in part} for part in (train, heldout)]
    assert clips[0]
    assert clips[1]
    assert not clips[0] & clips[1]
    # esp_en-us_f4_neutral_28.flac -> the voice is all but style and number
    voices = [{n.rsplit("_", 2)[0] for n in part if n.startswith(("esp_", "flite_"))} for part in clips]
    assert voices[1]
    assert not voices[0] & voices[1]


def test_every_file_is_used_licensed_without_gpl_and_attributed() -> None:
    attribution = (QUICKSTART / "ATTRIBUTION.md").read_text()
    used = set()
    for row in [*rows("train.jsonl"), *rows("heldout.jsonl")]:
        assert row.labels["license"]
        assert "GPL" not in row.labels["license"]
        assert f"`{row.labels['source']}`" in attribution
        used.add(row.audios[0].path.name)
    files = {file.name: file.stat().st_size for file in (QUICKSTART / "audio").iterdir()}
    assert used == set(files)
    assert sum(files.values()) < 6e6


def test_custom_expert_trains_without_any_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    source = (EXAMPLES / "custom_expert" / "loudness.py").read_text()
    body = source[source.index("class Loudness") :]
    assert body.count("\n") <= 30
    changes = ["backbone.weights=random", "stages.0.steps=1", "stages.1.steps=3", f"output={tmp_path / 'run'}"]
    arguments = ["train", str(EXAMPLES / "custom_expert" / "spec.yaml"), *(f"--set={change}" for change in changes)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("loudness.mse" in line) for line in metrics] == [False, True, True, True]


def test_loudness_hears_loudness() -> None:
    expert = coatkit.load_expert(f"{EXAMPLES / 'custom_expert' / 'loudness.py'}:Loudness", device="cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16_000, generator=generator)
    both = expert.encode(coatkit.AudioBatch.from_arrays([(0.1 * noise).numpy(), (0.01 * noise[:4000]).numpy()], 16_000))
    assert both.lengths.tolist() == [50, 13]
    assert both.values[0, :, 0].mean() == pytest.approx(-20 / 80, abs=0.02)
    assert both.values[1, :12, 0].mean() == pytest.approx(-40 / 80, abs=0.02)


def trained(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[str, list[dict]]:
    """What `coatkit train` said, and its metrics; nothing is fetched."""
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    words = ["backbone.weights=random", f"output={tmp_path / 'run'}", "data.max_bad_rows=0", *overrides]
    result = CliRunner().invoke(cli, ["train", str(spec), *(w for o in words for w in ("--set", o))])
    assert result.exit_code == 0, result.output
    return result.output, [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def test_all_six_experts_train_together_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EXAMPLES / "paper-experts.yaml"
    short = ["stages.0.steps=1", "stages.1.steps=2", "stages.0.batch.rows=2", "stages.1.batch.rows=2"]
    said, metrics = trained(spec, tmp_path, monkeypatch, *RANDOM, *short)
    first = said.splitlines()[1]  # after "loading ..."
    assert first.startswith(
        "RANDOM WEIGHTS in backbone, experts.spidr, experts.panns, experts.emotion2vec, experts.mert:"
    )
    terms = {
        "audio.mse",
        "spidr.mse",
        "panns.bce",
        "emotion2vec.mse",
        "basic-pitch.mse",
        "basic-pitch.pitch",
        "mert.mse",
    }
    assert terms & set(metrics[0]) == {"audio.mse"}
    for line in metrics[1:]:
        assert terms <= set(line)
        assert all(math.isfinite(line[term]) for term in terms)


def test_without_weights_training_names_every_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    words = ["--set", "backbone.weights=random", "--set", f"output={tmp_path / 'run'}"]
    result = CliRunner().invoke(cli, ["train", str(EXAMPLES / "paper-experts.yaml"), *words])
    said = str(result.exception)
    for name in (
        "spidr: spidr_base.pt",
        "panns: Cnn14_Dec",
        "emotion2vec: emotion2vec_base.pt",
        "mert: pytorch_model.bin",
    ):
        assert name in said
    assert "coatkit fetch SPEC" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec", RECIPES, ids=lambda p: p.stem)
def test_the_papers_recipe_and_its_arms_train(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock class in a tiny size; of the experts those that need no download (all six: the test above)."""
    idle = (
        []
        if spec.stem in ("sft", "block-only")
        else [f"stages.1.weights={{audio: 1.0, basic-pitch: {PITCH.get(spec.stem, 1.0)}}}"]
    )
    short = ["stages.0.steps=2", "stages.1.steps=2", "stages.0.batch.rows=2", "stages.1.batch.rows=2", "data.workers=0"]
    short += ["stages.0.warmup_steps=0", "stages.1.warmup_steps=0"]
    _, metrics = trained(spec, tmp_path, monkeypatch, "backbone.dtype=float32", *short, *idle)
    assert len(metrics) == 4
    wanted = {"sft": set(), "block-only": set(), "representational": {"audio.mse"}}
    terms = wanted.get(spec.stem, {"audio.mse", "basic-pitch.mse", "basic-pitch.pitch"})
    assert {name for name in metrics[-1] if "." in name} == terms
    assert all(math.isfinite(line["loss"]) for line in metrics)


PITCH = {"representational": 0.0}
