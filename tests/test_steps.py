"""From a manifest to prepared steps: the scan, bad rows, and workers that change nothing."""

import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from coatkit import assets
from coatkit.data import audio as reading
from coatkit.data import scan as scan_module
from coatkit.data.batches import BatchPlan
from coatkit.data.rows import AudioRef, JsonlRows, Row
from coatkit.data.scan import Scan, scan
from coatkit.data.steps import Step, StepDataset, load_batch
from coatkit.errors import DataError
from coatkit.protocols import AudioBatch, Inputs, Preparer
from coatkit.spec import BatchSpec
from coatkit.spec_data import DataSpec, FilterSpec

RATE = 8000


class FakePreparer(Preparer):
    """25 audio tokens a second; the row's words become its length."""

    sample_rate = RATE
    frame_rate = thinking_rate = 25.0
    max_seconds = 20.0

    def audio_tokens(self, samples: int) -> int:
        return samples * 25 // RATE

    def prepare(self, rows: Sequence[Row], audio: AudioBatch | None, *, train: bool) -> Inputs:
        for row in rows:
            if "unspeakable" in row.labels:
                raise row.fail("cannot be put into tokens")
        tokens = {"input_ids": torch.zeros(len(rows), 3, dtype=torch.long)}
        if audio is not None:
            tokens["sums"] = audio.samples.sum(1)
        none = torch.zeros(0, 0, dtype=torch.long)
        count = torch.zeros(0, dtype=torch.long)
        return Inputs(tokens, None, count, none, count, none, count, [row.id for row in rows])


def sound(path: Path, seconds: float, rate: int = RATE) -> None:
    samples = np.random.default_rng(int(seconds * 1000)).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(path, samples.astype(np.float32), rate)


def turns(answer: str = "A bell.") -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is heard?"}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight rows of growing length and two of text alone."""
    rows: list[dict[str, Any]] = []
    for i in range(8):
        sound(tmp_path / f"{i}.wav", 0.5 + 0.25 * i, RATE if i % 2 else 16_000)
        rows.append({"id": f"r{i}", "messages": turns(), "audio": f"{i}.wav"})
    rows += [{"id": f"text{i}", "messages": turns()} for i in range(2)]
    write(tmp_path, rows)
    return tmp_path


def write(folder: Path, rows: list[Any]) -> JsonlRows:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return JsonlRows(path)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def options(**changes: Any) -> DataSpec:
    return DataSpec(train="rows.jsonl", **changes)


def dataset(folder: Path, batch: BatchSpec, rank: int = 0, world: int = 1, **changes: Any) -> StepDataset:
    rows = JsonlRows(folder / "rows.jsonl")
    data = options(**changes)
    found = scan(rows, FakePreparer(), data, thinking=1.0)
    plan = BatchPlan(found.costs[found.good], batch, (7, 0))
    return StepDataset(rows, found.good, plan, FakePreparer(), {RATE, 16_000}, data, rank, world)


# The scan


def test_costs_follow_audio_thinking_and_text(folder: Path) -> None:
    rows = JsonlRows(folder / "rows.jsonl")
    with_block, without = (scan(rows, FakePreparer(), options(), thinking).costs for thinking in (1.0, 0.0))
    heard = np.array([int((0.5 + 0.25 * i) * 25) for i in range(8)] + [0, 0])
    np.testing.assert_array_equal(with_block - without, heard)
    assert (np.diff(with_block[:8]) > 0).all()
    longer = write(folder, [{"messages": turns("word " * 400)}, {"messages": turns()}])
    costs = scan(longer, FakePreparer(), options(), 1.0).costs
    assert costs[0] - costs[1] == pytest.approx(500, abs=10)  # about four bytes a token


def test_seconds_are_those_of_the_stretches(folder: Path) -> None:
    rows = write(
        folder,
        [
            {"messages": turns(), "audios": ["3.wav", {"path": "7.wav", "start": 1, "end": 1.5}]},
            {"messages": turns()},
        ],
    )
    found = scan(rows, FakePreparer(), options(), 1.0)
    np.testing.assert_allclose(found.seconds, [1.25 + 0.5, 0])
    assert found.bad == []
    assert found.good.tolist() == [0, 1]


BAD = {
    "missing file": ({"messages": turns(), "audio": "gone.wav"}, "gone.wav: cannot be opened as sound: there is no"),
    "over the limit": ({"messages": turns(), "audio": "long.wav"}, "long.wav: 6.0 s is over data.max_seconds (5 s)"),
    "stretch outside": ({"messages": turns(), "audio": "0.wav", "start": 9, "end": 10}, "9 to 10 s lies outside"),
    "too short": ({"messages": turns(), "audio": "short.wav"}, "short.wav: 20 ms is too short to give one audio token"),
    "no answer": ({"messages": turns()[:1]}, "the last message must be the assistant's answer"),
    "no messages": ({"audio": "0.wav"}, "'messages' must be a non-empty list"),
    "no JSON": ("{", "not valid JSON"),
}


@pytest.fixture
def mixed(folder: Path) -> JsonlRows:
    """Two good rows, then one of each kind of bad row."""
    sound(folder / "long.wav", 6)
    sound(folder / "short.wav", 0.02)
    return write(folder, [*rows_of(folder)[:2], *(row for row, _ in BAD.values())])


def test_refusing_names_every_bad_row_and_the_way_out(mixed: JsonlRows) -> None:
    with pytest.raises(DataError) as caught:
        scan(mixed, FakePreparer(), options(max_seconds=5), 1.0)
    text = str(caught.value)
    assert f"{len(BAD)} bad row(s)" in text
    assert "data.on_bad_row: quarantine" in text
    for i, (_, said) in enumerate(BAD.values()):
        [line] = [line for line in text.splitlines() if f"rows.jsonl:{i + 3}" in line]
        assert said in line


def test_quarantine_keeps_the_good_rows(mixed: JsonlRows) -> None:
    found = scan(mixed, FakePreparer(), options(max_seconds=5, on_bad_row="quarantine"), 1.0)
    assert found.good.tolist() == [0, 1]
    assert [i for i, _ in found.bad] == list(range(2, 2 + len(BAD)))
    for (_, reason), (_, said) in zip(found.bad, BAD.values(), strict=True):
        assert said in reason


def test_what_the_backbone_cannot_hear_is_told_apart_from_the_specs_limit(folder: Path) -> None:
    sound(folder / "long.wav", 21)
    rows = write(folder, [{"id": "x", "messages": turns(), "audio": "long.wav"}])
    with pytest.raises(DataError, match=r"row x\): .*long\.wav: 21\.0 s is more than the 20 s this backbone hears"):
        scan(rows, FakePreparer(), options(), 1.0)


def test_quarantine_has_a_limit(mixed: JsonlRows) -> None:
    data = options(max_seconds=5, on_bad_row="quarantine", max_bad_rows=len(BAD) - 1)
    with pytest.raises(DataError, match=f"{len(BAD)} bad rows are more than data.max_bad_rows: {len(BAD) - 1}"):
        scan(mixed, FakePreparer(), data, 1.0)


def test_nothing_but_bad_rows_is_refused_even_with_quarantine(folder: Path) -> None:
    with pytest.raises(DataError, match=r"every row is bad, first: .*gone\.wav"):
        scan(write(folder, [BAD["missing file"][0]]), FakePreparer(), options(on_bad_row="quarantine"), 1.0)


def test_a_long_list_of_bad_rows_is_cut(folder: Path) -> None:
    rows = write(folder, [BAD["missing file"][0]] * 25)
    with pytest.raises(DataError) as caught:
        scan(rows, FakePreparer(), options(), 1.0)
    assert "25 bad row(s)" in str(caught.value)
    assert "... and 15 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 15


def test_a_filter_leaves_rows_out_and_they_are_not_bad(folder: Path) -> None:
    rows = write(folder, [{**row, "kind": "bell" if i % 2 else "horn"} for i, row in enumerate(rows_of(folder))])
    keep = FilterSpec(min_seconds=0.8, where={"kind": "bell"})
    found = scan(rows, FakePreparer(), options(), 1.0, keep=keep)
    assert found.good.tolist() == [3, 5, 7]
    assert found.bad == []
    with pytest.raises(DataError, match="the filter takes no row"):
        scan(rows, FakePreparer(), options(), 1.0, keep=FilterSpec(min_seconds=99))


def test_shares_of_several_processes_make_the_same_whole(mixed: JsonlRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_CHUNK", 2)
    data = options(max_seconds=5, on_bad_row="quarantine")
    whole = scan(mixed, FakePreparer(), data, 1.0)
    meeting, told = threading.Barrier(2), [None, None]

    def take_part(rank: int) -> Scan:
        def gather(mine: Any) -> list[Any]:
            told[rank] = mine
            meeting.wait(30)
            found = list(told)
            meeting.wait(30)
            return found

        return scan(mixed, FakePreparer(), data, 1.0, share=(rank, 2), gather=gather)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(take_part, (0, 1)):
            np.testing.assert_array_equal(found.costs, whole.costs)
            np.testing.assert_array_equal(found.seconds, whole.seconds)
            assert found.bad == whole.bad


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_find_the_same(mixed: JsonlRows, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    data = options(max_seconds=5, on_bad_row="quarantine", workers=workers)
    whole = scan(mixed, FakePreparer(), data, 1.0)
    monkeypatch.setattr(scan_module, "_CHUNK", 1)
    found = scan(mixed, FakePreparer(), data, 1.0)
    np.testing.assert_array_equal(found.costs, whole.costs)
    assert found.bad == whole.bad


def test_a_large_manifest_is_looked_at_once(mixed: JsonlRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_KEPT_FROM", 1)
    opened: list[Path] = []

    def duration(ref: AudioRef) -> float:
        opened.append(ref.path)
        return reading.duration(ref)

    monkeypatch.setattr(scan_module, "sound", SimpleNamespace(duration=duration))
    data = options(max_seconds=5, on_bad_row="quarantine")
    first = scan(mixed, FakePreparer(), data, 1.0)
    assert len(opened) == 6
    opened.clear()
    sound(mixed.path.parent / "gone.wav", 2)  # a bad row's sound turns up
    again = scan(mixed, FakePreparer(), data, 1.0)
    assert {path.name for path in opened} == {"gone.wav", "long.wav", "0.wav", "short.wav"}  # the bad rows' alone
    assert again.good.tolist() == [0, 1, 2]
    assert [i for i, _ in again.bad] == list(range(3, 2 + len(BAD)))
    assert again.seconds[2] == 2.0
    np.testing.assert_array_equal(again.costs[:2], first.costs[:2])
    opened.clear()
    scan(mixed, FakePreparer(), data, 0.5)  # a shorter block costs less
    assert len(opened) == 6


def test_what_was_kept_and_is_damaged_is_made_again(mixed: JsonlRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_KEPT_FROM", 1)
    data = options(max_seconds=5, on_bad_row="quarantine")
    shutil.rmtree(assets.cache_dir() / "scans", ignore_errors=True)
    first = scan(mixed, FakePreparer(), data, 1.0)
    [kept] = (assets.cache_dir() / "scans").iterdir()
    for content in (b"", b"PK\x03\x04 no archive", kept.read_bytes()[:100]):
        kept.write_bytes(content)
        again = scan(mixed, FakePreparer(), data, 1.0)
        np.testing.assert_array_equal(again.costs, first.costs)
        assert again.bad == first.bad


# Steps


def test_a_batch_holds_each_sound_at_every_rate(folder: Path) -> None:
    rows = JsonlRows(folder / "rows.jsonl")
    batch = load_batch(rows[1:4], FakePreparer(), {22_050, RATE}, 120, train=True)
    assert set(batch.audio) == {RATE, 22_050}
    for rate, audio in batch.audio.items():
        np.testing.assert_allclose(audio.seconds, [0.75, 1.0, 1.25], atol=2 / rate)
    assert batch.inputs.row_ids == ["r1", "r2", "r3"]
    assert load_batch(rows[8:], FakePreparer(), {22_050}, 120, train=True).audio == {}


def test_a_failing_file_names_row_and_file(folder: Path) -> None:
    (folder / "2.wav").unlink()
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3 \(row r2\): .*2\.wav: cannot be decoded: there is no such file"
    ):
        load_batch(JsonlRows(folder / "rows.jsonl")[1:4], FakePreparer(), (), 120, train=True)


def test_steps_follow_the_plan_and_an_epoch_holds_every_row(folder: Path) -> None:
    steps = dataset(folder, BatchSpec(tokens=200))
    seen: list[str] = []
    step = 0
    while steps.plan.epoch_of(step) < 1:
        item = steps[step]
        assert item.row_ids == [steps.rows[int(i)].id for i in steps.plan.rows(step)]
        assert (item.error, item.bad) == ("", [])
        seen += item.row_ids
        step += 1
    assert sorted(seen) == sorted(row["id"] for row in rows_of(folder))


def test_rows_set_aside_by_the_scan_are_in_no_step(folder: Path) -> None:
    (folder / "0.wav").unlink()
    steps = dataset(folder, BatchSpec(rows=9), on_bad_row="quarantine")
    assert sorted(steps[0].row_ids) == sorted(row["id"] for row in rows_of(folder)[1:])
    assert steps[0].bad == []


def test_parts_and_ranks_hold_the_step_between_them(folder: Path) -> None:
    whole = dataset(folder, BatchSpec(rows=8))[0].row_ids
    shares = [dataset(folder, BatchSpec(rows=8, accumulate=2), rank, 2)[0] for rank in range(2)]
    assert [len(share.batches) for share in shares] == [2, 2]
    assert sorted(shares[0].row_ids + shares[1].row_ids) == sorted(whole)


def test_a_device_without_rows_has_no_batch(folder: Path) -> None:
    assert dataset(folder, BatchSpec(rows=1), rank=1, world=2)[0] == Step(batches=[None], epoch=0.1)


def test_workers_change_nothing(folder: Path) -> None:
    def run(workers: int) -> list[tuple[list[str], list[float]]]:
        loader = DataLoader(
            dataset(folder, BatchSpec(tokens=200)),
            batch_size=None,
            sampler=range(2, 9),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        return [
            (step.row_ids, [s for b in step.batches if b for s in b.inputs.tokens.get("sums", torch.zeros(0)).tolist()])
            for step in loader
        ]

    alone = run(0)
    assert len(alone) == 7
    assert run(2) == alone


@pytest.fixture
def spoiled(folder: Path) -> Path:
    """A file whose header is right and whose sound is not, as a scan cannot see."""
    path = folder / "3.wav"
    samples, rate = soundfile.read(path, dtype="float32")
    samples[10] = np.nan
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return folder


def test_a_file_that_spoils_later_is_an_error_of_its_step(spoiled: Path) -> None:
    step = dataset(spoiled, BatchSpec(rows=10))[0]
    assert "rows.jsonl:4 (row r3): " in step.error
    assert "3.wav: holds NaN or infinite samples" in step.error


def test_a_file_that_spoils_later_is_quarantined_alone(spoiled: Path) -> None:
    step = dataset(spoiled, BatchSpec(rows=10), on_bad_row="quarantine")[0]
    assert step.error == ""
    [reason] = step.bad
    assert "row r3" in reason
    assert "3.wav" in reason
    assert sorted(step.row_ids) == sorted(r["id"] for r in rows_of(spoiled) if r["id"] != "r3")


def test_a_row_the_backbone_cannot_prepare_is_quarantined_too(folder: Path) -> None:
    write(folder, [{**row, **({"unspeakable": 1} if row["id"] == "text0" else {})} for row in rows_of(folder)])
    step = dataset(folder, BatchSpec(rows=10), on_bad_row="quarantine")[0]
    assert len(step.row_ids) == 9
    assert "cannot be put into tokens" in step.bad[0]
    assert "cannot be put into tokens" in dataset(folder, BatchSpec(rows=10))[0].error


def test_a_step_whose_rows_are_all_bad_is_empty_but_no_error(folder: Path) -> None:
    steps = dataset(folder, BatchSpec(rows=2), on_bad_row="quarantine")
    for i in range(8):
        (folder / f"{i}.wav").write_bytes(b"")
    items = [steps[i] for i in range(5)]
    assert [len(item.row_ids) + len(item.bad) for item in items] == [2] * 5
    assert any(item.batches == [None] and len(item.bad) == 2 and not item.error for item in items)
    assert sum(len(item.bad) for item in items) == 8
