"""`coatkit latency`: what is counted and how it is put together. No figure here is a time that was taken."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from coatkit.analysis import latency, plots
from coatkit.analysis import latency_local as local
from coatkit.analysis.latency import Request, Span, aggregate, read_requests, read_spans, table
from coatkit.cli import cli
from coatkit.data import audio
from coatkit.data.rows import JsonlRows
from coatkit.errors import CoatkitError, DataError, PluginError, RunError, SpecError
from coatkit.infer import AudioThinker, asked

RANGES = "0-0.2,0.2-0.5,5-9"
SPANS = read_spans(RANGES)


@pytest.fixture(scope="module")
def trained(new_project: Callable[[], Any]) -> Any:
    """A run that answers two clips by heart, with its other clips held out."""
    project = new_project()
    every = project.rows
    (project.folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every))
    project.rows = every[:2]
    project.spec["data"]["heldout"] = "held.jsonl"
    project.spec["stages"] = [
        {"name": "one", "steps": 60, "lr": 1e-2, "batch": {"rows": 2}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    project.run = project.train()
    return project


@pytest.fixture(scope="module")
def models(trained: Any) -> dict[str, AudioThinker]:
    return local.load_arms(trained.run.folder, ["vanilla", "cot", "coat"], device="cpu")


@pytest.fixture
def rows(trained: Any) -> JsonlRows:
    return JsonlRows(trained.folder / "held.jsonl")


def invoke(*arguments: Any) -> Result:
    """What a command did; an error it foresaw is raised."""
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    if isinstance(result.exception, CoatkitError):
        raise result.exception
    return result


def request(arm: str = "coat", repeat: int = 0, ttft: float = 1.0, decode: float = 1.0, **more: Any) -> Request:
    given: dict[str, Any] = {"range": "0-5", "row": "a", "sound_s": 2.0, "prompt_tokens": 100}
    return Request(**{**given, "arm": arm, "repeat": repeat, "forced_prefix": 10, "decoded_tokens": 4,
                      "ttft_s": ttft, "decode_s": decode, **more})  # fmt: skip


# The command


@pytest.fixture(scope="module")
def measured(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("latency") / "out"
    return out, invoke("latency", trained.run.folder, "--ranges", RANGES, "--rows", 2, "--repeats", 2, "--out", out,
                       "--max-new-tokens", 12, "--max-thought-tokens", 7)  # fmt: skip


def test_every_arm_is_asked_about_the_same_rows_in_turn(measured: tuple[Path, Result]) -> None:
    requests = read_requests(measured[0] / "records.jsonl")
    assert Counter((r.arm, r.range, r.repeat) for r in requests) == {
        (arm, name, repeat): 2
        for arm in ("vanilla", "cot", "coat")
        for name in ("0-0.2", "0.2-0.5")
        for repeat in (0, 1)
    }
    turns = [requests[i : i + 3] for i in range(0, len(requests), 3)]
    assert all(len({(r.row, r.repeat, r.sound_s) for r in turn}) == 1 for turn in turns)
    assert all(len({r.arm for r in turn}) == 3 for turn in turns)
    assert {turn[0].arm for turn in turns} == {"vanilla", "cot", "coat"}  # none is always the first
    places = {span.name: span for span in SPANS}
    assert all(places[r.range].holds(r.sound_s) for r in requests)
    order = [[turn[0].row for turn in turns if turn[0].repeat == repeat] for repeat in (0, 1)]
    assert order[0] != order[1]


def test_times_of_a_request_add_up(measured: tuple[Path, Result]) -> None:
    lines = [json.loads(line) for line in (measured[0] / "records.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["total_s"] == line["ttft_s"] + line["decode_s"]
        assert 0 < line["prepare_s"] < line["ttft_s"]
        assert (line["decode_s"] > 0) == (line["decoded_tokens"] > 1)


def test_what_is_written(measured: tuple[Path, Result]) -> None:
    out, said = measured
    results = json.loads((out / "results.json").read_text())
    assert [(c["range"], c["arm"], c["requests"]) for c in results["cells"]] == [
        (name, arm, requests)
        for name, requests in (("0-0.2", 4), ("0.2-0.5", 4), ("all", 8))
        for arm in ("vanilla", "cot", "coat")
    ]
    assert results["cells"] == json.loads(json.dumps(aggregate(read_requests(out / "records.jsonl"))))
    assert (results["step"], results["max_thought_tokens"], results["adapters_merged"]) == (60, 7, True)
    assert results["notes"] == ["4 rows without sound were left out.", "5-9 s: there is no row of this length."]
    text = (out / "latency.md").read_text()
    assert text.splitlines()[:11] == said.stdout.splitlines()[:11] == table(results["cells"])
    assert "5-9 s: there is no row of this length." in text
    assert "virtual cores" in text
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_records_are_not_written_over(trained: Any, measured: tuple[Path, Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured[0], out)
    arguments = ["latency", trained.run.folder, "--ranges", "0-1", "--rows", 1, "--repeats", 1, "--max-new-tokens", 2,
                 "--arms", "coat,vanilla", "--out", out]  # fmt: skip
    with pytest.raises(RunError, match=r"holds records already; .*--out FOLDER, or .*--restart"):
        invoke(*arguments)
    assert (out / "records.jsonl").read_bytes() == (measured[0] / "records.jsonl").read_bytes()
    results = json.loads(invoke(*arguments, "--restart", "--json").stdout)
    assert [cell["arm"] for cell in results["cells"]] == ["coat", "vanilla"]  # as asked for
    assert {cell["range"] for cell in results["cells"]} == {"0-1"}
    assert results["max_thought_tokens"] is None
    assert len(read_requests(out / "records.jsonl")) == 2


def test_records_of_elsewhere_are_reported_on(trained: Any, measured: tuple[Path, Result], tmp_path: Path) -> None:
    served = [replace(r, prepare_s=None) for r in read_requests(measured[0] / "records.jsonl")]
    (tmp_path / "served.jsonl").write_text("".join(one.line() for one in served))
    invoke("latency", trained.run.folder, "--records", tmp_path / "served.jsonl", "--out", tmp_path / "out")
    cells = json.loads((tmp_path / "out/results.json").read_text())["cells"]
    here = json.loads((measured[0] / "results.json").read_text())["cells"]
    assert [cell.pop("prepare_s") for cell in cells] == [{"mean": None, "std": None}] * 9
    assert cells == [{key: value for key, value in cell.items() if key != "prepare_s"} for cell in here]
    assert not (tmp_path / "out/records.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--arms", "vanila"], SpecError, "--arms 'vanila': there is no such arm; did you mean 'vanilla'"),
        (["--arms", "coat,coat"], SpecError, "coat is named twice"),
        (["--ranges", "0-5;5-10"], SpecError, "'0-5;5-10': is no range of seconds"),
        (["--data", "gone.jsonl"], DataError, r"gone\.jsonl: cannot be read"),
        (["--records", "gone.jsonl"], RunError, r"gone\.jsonl: cannot be read"),
        (["--ranges", "20-30"], DataError, "no row has a sound of these ranges: .*16 rows are in no range"),
    ],
)
def test_what_cannot_be_measured_is_said(
    trained: Any, tmp_path: Path, words: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        invoke("latency", trained.run.folder, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_no_run_and_no_rows(tmp_path: Path, trained: Any) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        invoke("latency", tmp_path)
    run = tmp_path / "run"
    shutil.copytree(trained.run.folder, run)
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    del spec["data"]["heldout"]
    (run / "spec.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(RunError, match=r"names no data\.heldout; name rows with --data"):
        invoke("latency", run)


def test_a_run_without_a_block_has_no_coat(new_project: Callable[[], Any]) -> None:
    project = new_project()
    project.spec["thinking"] = "off"
    project.spec["stages"] = [{"name": "one", "steps": 1, "lr": 1e-3, "batch": {"rows": 2}, "weights": {}}]
    run = project.train().folder
    with pytest.raises(RunError, match=r"thinking: off.*--arms vanilla,cot"):
        local.load_arms(run, ["coat"])
    assert list(local.load_arms(run, ["vanilla"], device="cpu")) == ["vanilla"]


# One request


def decoded(model: AudioThinker, run: Callable[[], Request]) -> tuple[Request, int]:
    """A request, and how often the language model was called for it: once for the prompt and once for each token but
    the last."""
    calls = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1

    backbone: Any = model.backbone
    hook = backbone.language_model.register_forward_pre_hook(count, with_kwargs=True)
    made = run()
    hook.remove()
    return made, calls


def test_tokens_are_counted(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    one = local.Candidate(rows[0], 0.1)
    limits = local.Limits(12, 7)
    for arm, model in models.items():
        made, calls = decoded(model, lambda arm=arm, model=model: local.ask(model, arm, one, limits))
        assert made.decoded_tokens == calls <= limits.of(arm)
        assert (made.arm, made.row, made.sound_s) == (arm, "r00", 0.1)
    coat = local.ask(models["coat"], "coat", one, limits)
    answer = models["coat"].answer([rows[0]], max_new_tokens=12)[0]
    assert answer == "clip 0"
    tokenizer: Any = models["coat"].backbone.preparer
    assert coat.decoded_tokens == len(tokenizer.tokenizer(answer)["input_ids"]) + 1  # and the end


def test_as_many_tokens_as_asked_for(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    one, limits = local.Candidate(rows[0], 0.1), local.Limits(12, 7, exactly=True)
    counts = {arm: local.ask(model, arm, one, limits).decoded_tokens for arm, model in models.items()}
    assert counts == {"vanilla": 12, "cot": 19, "coat": 12}
    free = local.ask(models["coat"], "coat", one, local.Limits(12, 7))
    assert free.decoded_tokens < 12


def test_the_forced_prefix_is_the_block(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    one, limits = local.Candidate(rows[9], 0.3), local.Limits(2, 2)
    vanilla, cot, coat = (local.ask(models[arm], arm, one, limits) for arm in ("vanilla", "cot", "coat"))
    positions = int(models["coat"].prepare([rows[9]]).think_lengths.sum())
    assert positions > 1
    assert coat.forced_prefix == positions + 2
    assert coat.prompt_tokens == vanilla.prompt_tokens + positions + 2
    assert vanilla.forced_prefix == cot.forced_prefix == 0
    assert cot.prompt_tokens > vanilla.prompt_tokens  # the instruction


def test_every_block_has_its_start_and_end(models: dict[str, AudioThinker], trained: Any, row: Any) -> None:
    clips = [trained.folder / f"clips/r{i:02d}.{'flac' if i % 2 else 'wav'}" for i in range(2)]
    model = models["coat"]

    def prefix(made: Any) -> tuple[int, int]:
        refs = tuple(asked(clip, "x").audios[0] for clip in clips)
        inputs = model.prepare([replace(made, audios=refs)])
        ids = inputs.tokens["input_ids"][0].tolist()
        preparer: Any = model.backbone.preparer
        return local.forced_prefix(inputs), sum(ids.count(token) for token in preparer.tokens.ids)

    together = prefix(row("<audio><audio>Which?", sounds=2))
    apart = prefix(row("<audio>What?", "a", "<audio>And this?", sounds=2))
    assert together[0] == together[1]
    assert apart[0] == apart[1] == together[0] + 2
    assert local.forced_prefix(model.prepare([asked(None, "What is 1 plus 1?")])) == 0


def test_adapters_are_merged_unless_kept(trained: Any, models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    kept = local.load_arms(trained.run.folder, ["vanilla", "coat"], device="cpu", merged=False)
    has = {
        name: [any("lora_" in n for n, _ in model.backbone.model.named_parameters()) for model in group.values()]
        for name, group in (("kept", kept), ("merged", models))
    }
    assert has == {"kept": [True, True], "merged": [False] * 3}
    for arm in ("vanilla", "coat"):
        assert kept[arm].answer([rows[0]], max_new_tokens=8) == models[arm].answer([rows[0]], max_new_tokens=8)
    assert models["vanilla"] is models["cot"]


def test_a_backbone_that_streams_nothing_is_named(
    models: dict[str, AudioThinker], rows: JsonlRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["coat"]
    generate = model.backbone.generate
    monkeypatch.setattr(model.backbone, "generate", lambda inputs, streamer, **k: generate(inputs, **k))
    with pytest.raises(PluginError, match="does not hand tokens to `streamer`"):
        local.ask(model, "coat", local.Candidate(rows[0], 0.1), local.Limits(2))


# Rows


def gather(models: dict[str, AudioThinker], rows: Any, **options: Any) -> local.Pool:
    given = {"per": 2, "repeats": 1, **options}
    return local.gather(rows, options.pop("spans", SPANS), models["coat"].backbone.preparer,
                        **{k: v for k, v in given.items() if k != "spans"})  # fmt: skip


def test_rows_are_of_their_range(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    pool = gather(models, rows, per=99)
    assert {name: sorted(one.row.id for one in there) for name, there in pool.rows.items()} == {
        "0-0.2": [f"r{i:02d}" for i in range(5)],  # 0.2 s belongs to the shorter range
        "0.2-0.5": [f"r{i:02d}" for i in range(5, 16)],
        "5-9": [],
    }
    assert pool.notes == [
        "4 rows without sound were left out.",
        "0-0.2 s: there are 5 rows, not 99.",
        "0.2-0.5 s: there are 11 rows, not 99.",
        "5-9 s: there is no row of this length.",
    ]
    again = gather(models, rows, per=99)
    assert [one.row.id for one in again.rows["0.2-0.5"]] == [one.row.id for one in pool.rows["0.2-0.5"]]


def test_reading_stops_when_there_are_enough(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    pool = gather(models, rows, spans=SPANS[:2], per=2, repeats=1)
    found = {name: len(there) for name, there in pool.rows.items()}
    assert min(found.values()) == 2
    assert sum(found.values()) < 16


def test_bad_rows_are_counted_and_named(trained: Any, models: dict[str, AudioThinker], tmp_path: Path) -> None:
    lines = (trained.folder / "held.jsonl").read_text().splitlines()[:3]
    shutil.copytree(trained.folder / "clips", tmp_path / "clips")
    (tmp_path / "clips/r01.flac").write_bytes(b"no sound")
    (tmp_path / "held.jsonl").write_text("\n".join([*lines, "{no json"]) + "\n")
    pool = gather(models, JsonlRows(tmp_path / "held.jsonl"), spans=[Span(0, 1)])
    assert sorted(one.row.id for one in pool.rows["0-1"]) == ["r00", "r02"]
    assert pool.notes[0].startswith("2 rows could not be used, first: ")


def test_sounds_are_made_where_rows_are_missing(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    spans = [Span(0.2, 0.5), Span(1, 3), Span(700, 2000)]
    pool = gather(models, rows, spans=spans, per=4, fill=True)
    made = pool.rows["1-3"]
    assert [one.seconds for one in made] == [1.25, 1.75, 2.25, 2.75]
    assert all(one.made for one in made)
    assert not any(one.made for one in pool.rows["0.2-0.5"])
    preparer = models["coat"].backbone.preparer
    for one in made:
        samples, rate = audio.read(one.row.audios[0], 600)
        assert len(samples) / rate == audio.duration(one.row.audios[0]) == one.seconds
        assert rate == preparer.sample_rate
        assert np.abs(samples[-1000:]).max() > 0  # sound to its end
    assert len({one.row.id for one in made}) == 4
    asked_of = local.ask(models["coat"], "coat", made[0], local.Limits(2))
    assert asked_of.made
    assert asked_of.forced_prefix == preparer.audio_tokens(20_000) + 2
    assert "1-3 s: 4 sounds were made of shorter ones." in pool.notes
    assert pool.rows["700-2000"] == []  # longer than what is read
    assert "700-2000 s: there is no row of this length." in pool.notes


def test_repeats_draw_their_own_rows(models: dict[str, AudioThinker], rows: JsonlRows) -> None:
    pool = gather(models, rows, per=3, repeats=3)
    plans = [[one.row.id for _, one in local.plan_of(pool, 3, seed)] for seed in (0, 1, 0)]
    assert plans[0] == plans[2]
    assert set(plans[0]) != set(plans[1])
    assert len(plans[0]) == len(set(plans[0])) == 6
    every = [{one.row.id for _, one in local.plan_of(pool, 99, seed)} for seed in (0, 1)]
    assert every[0] == every[1]


# Putting together


def test_means_and_deviations_are_over_repeats() -> None:
    requests = [
        request(repeat=0, ttft=1.0, decode=2.0, decoded_tokens=4),
        request(repeat=0, ttft=3.0, decode=4.0, decoded_tokens=6, row="b"),
        request(repeat=1, ttft=4.0, decode=5.0, decoded_tokens=9),
    ]
    (cell,) = aggregate(requests)
    assert (cell["range"], cell["arm"], cell["requests"], cell["rows"], cell["repeats"]) == ("0-5", "coat", 3, 2, 2)
    assert cell["ttft_s"] == {"mean": 3.0, "std": pytest.approx(2**0.5)}  # of 2 and 4
    assert cell["decode_s"] == {"mean": 4.0, "std": pytest.approx(2**0.5)}  # of 3 and 5
    assert cell["total_s"] == {"mean": 7.0, "std": pytest.approx(8**0.5)}  # of 5 and 9
    assert cell["decoded_tokens"]["mean"] == 7.0  # of 5 and 9
    assert cell["forced_prefix"] == {"mean": 10.0, "std": 0.0}
    assert cell["prepare_s"] == {"mean": None, "std": None}
    assert cell["to_vanilla"] == {"ttft_s": None, "total_s": None}
    assert aggregate(requests[:2])[0]["ttft_s"] == {"mean": 2.0, "std": None}


def test_ratios_are_of_the_same_row_in_the_same_repeat() -> None:
    times = {("a", 0): (2.0, 6.0), ("b", 0): (1.0, 1.5), ("a", 1): (4.0, 4.0)}
    requests = [request("vanilla", repeat, ttft, 0.0, row=row) for (row, repeat), (ttft, _) in times.items()]
    requests += [request("coat", repeat, ttft, 0.0, row=row) for (row, repeat), (_, ttft) in times.items()]
    requests += [request("coat", 0, 100.0, row="alone")]
    stock, coat = aggregate(requests)
    assert stock["to_vanilla"] == {"ttft_s": 1.0, "total_s": 1.0}
    assert coat["to_vanilla"] == {"ttft_s": 1.5, "total_s": 1.5}  # the median of 3, 1.5 and 1


def test_ranges_stand_in_their_order_and_all_together_last() -> None:
    requests = [request(range=name, ttft=ttft) for name, ttft in (("10-30", 5.0), ("5-10", 2.0), ("0-5", 2.0))]
    cells = aggregate(requests)
    assert [cell["range"] for cell in cells] == ["0-5", "5-10", "10-30", "all"]
    assert cells[-1]["ttft_s"]["mean"] == 3.0
    lines = table(cells)
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1
    cells_of_last = [word.strip() for word in lines[-1].strip("|").split("|")]
    assert cells_of_last == ["all", "CoAT", "3", "100.0", "10.0", "4.0", "3.000", "1.000", "4.000", "-", "-"]
    two = table(aggregate([request(ttft=1.0), request(repeat=1, ttft=3.0)]))
    assert "2.000 ± 1.414" in two[-1]


def test_the_plot_shows_the_table() -> None:
    requests = [
        request(arm, range=name, repeat=repeat, ttft=number + repeat, decode=2.0 * number)
        for number, (arm, name) in enumerate([("vanilla", "0-5"), ("coat", "0-5"), ("vanilla", "5-10")], 1)
        for repeat in (0, 1)
    ]
    figure = latency.draw(aggregate(requests))
    bars = [(round(p.get_y(), 6), round(p.get_height(), 6)) for p in figure.axes[0].patches]
    assert bars == [(0, 1.5), (1.5, 2.0), (0, 2.5), (2.5, 4.0), (0, 3.5), (3.5, 6.0)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vanilla", "CoAT"]
    assert plots.png(figure) == plots.png(latency.draw(aggregate(requests)))


def test_matplotlib_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PluginError, match=r"this needs matplotlib .*pip install 'coatkit\[analysis\]'"):
        plots.figure()


def test_ranges_are_read() -> None:
    assert read_spans("5-10, 0-5,10-30.5") == [Span(0, 5), Span(5, 10), Span(10, 30.5)]
    assert [Span(5, 10).holds(seconds) for seconds in (5, 5.001, 10, 10.001)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no range"),
        ("5", "is no range"),
        ("a-b", "is no range"),
        ("5-5", "must grow"),
        ("10-5", "must grow"),
        ("0-inf", "must grow"),
        ("0-nan", "must grow"),
        ("0-6,5-10", "0-6 and 5-10 overlap"),
        ("0-5,0-5", "overlap"),
    ],
)
def test_what_is_no_range_is_told(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_spans(text)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    requests = [request(), request("vanilla", prepare_s=0.25, made=True, row="é\u2028")]
    assert latency.record(tmp_path / "a/records.jsonl", iter(requests)) == requests
    assert read_requests(tmp_path / "a/records.jsonl") == requests


def test_what_was_measured_before_a_stop_is_kept(tmp_path: Path) -> None:
    def stopped() -> Any:
        yield request()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latency.record(tmp_path / "records.jsonl", stopped())
    assert read_requests(tmp_path / "records.jsonl") == [request()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttft_s": None}, r"records\.jsonl:1: ttft_s is None"),
        ({"ttft_s": -1.0}, "ttft_s is -1"),
        ({"decode_s": float("nan")}, "decode_s is nan"),
        ({"decoded_tokens": 1.5}, r"decoded_tokens is 1\.5"),
        ({"repeat": True}, "repeat is True"),
        ({"arm": 3}, "arm is 3"),
        ({"prepare_s": "x"}, "prepare_s is 'x'"),
        ([], "is no record"),
        (None, "holds no record"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, change: Any, message: str) -> None:
    line = json.dumps({**json.loads(request().line()), **change}) if isinstance(change, dict) else json.dumps(change)
    (tmp_path / "records.jsonl").write_text("" if change is None else line + "\n")
    with pytest.raises(RunError, match=message):
        read_requests(tmp_path / "records.jsonl")
