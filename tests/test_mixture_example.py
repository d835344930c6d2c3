"""examples/mixture: its rows may be given away, it draws seven categories from them, and it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from coatkit.cli import cli
from coatkit.data.audio import duration
from coatkit.data.mixture import MixtureRows
from coatkit.data.rows import JsonlRows

EXAMPLE = Path(__file__).parents[1] / "examples/mixture"
SPEC = str(EXAMPLE / "spec.yaml")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COATKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_file_is_used_licensed_without_gpl_and_attributed() -> None:
    attribution = (EXAMPLE / "ATTRIBUTION.md").read_text()
    used = set()
    for row in JsonlRows(EXAMPLE / "data/manifest.jsonl"):
        assert "GPL" not in row.labels["license"]
        (stated,) = (line for line in attribution.splitlines() if line.startswith(f"| `{row.labels['source']}` |"))
        licence = {"synth/no-claim": "none claimed", "CMU-permissive": "CMU's permissive licence"}
        assert f"| {licence.get(row.labels['license'], row.labels['license'])} |" in stated
        used |= {ref.path.name for ref in row.audios}
        for ref in row.audios:
            assert f"`{ref.path.name.partition('_')[0]}_*`" in stated
            assert duration(ref) > 0.1
    files = {file.name: file.stat().st_size for file in (EXAMPLE / "data/audio").iterdir()}
    assert used == set(files)
    assert sum(files.values()) < 1.5e6


def test_it_draws_seven_categories(own_cache: Path) -> None:
    result = CliRunner().invoke(cli, ["mix", SPEC])
    assert result.exit_code == 0, result.output
    (path,) = (own_cache / "mixtures").glob("*.parquet")
    data = json.loads(path.with_suffix(".json").read_text())
    tasks: dict[str, set[str]] = {}
    for row in MixtureRows(path):
        tasks.setdefault(row.labels["category"], set()).add(row.labels["task"])
    assert tasks == {
        "transcripts": {"asr"},
        "voices": {"speech_emotion_mc"},
        "notes": {"music_pitch"},
        "chords": {"music_mc"},
        "instruments": {"music_mc"},
        "sounds": {"sound_event_mc"},
        "text": {"text_sft"},
    }
    assert sum(category["actual"] for category in data["categories"]) == 400
    assert {c["category"]: c["repeats"][1] for c in data["categories"] if c["category"] == "text"} == {"text": 3}
    # Chords and instruments are parts of one task, told apart by what their rows lack.
    chords = {row.id for row in MixtureRows(path) if row.labels["category"] == "chords"}
    instruments = {row.id for row in MixtureRows(path) if row.labels["category"] == "instruments"}
    assert (len(chords), len(instruments), len(chords & instruments)) == (6, 10, 0)


def test_it_trains(tmp_path: Path) -> None:
    changes = ["backbone.weights=random", "stages.0.steps=2", "stages.0.warmup_steps=0", f"output={tmp_path / 'run'}"]
    result = CliRunner().invoke(cli, ["train", SPEC, *(f"--set={change}" for change in changes)])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
