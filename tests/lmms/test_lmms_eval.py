"""lmms-eval itself asks a run of coatkit, and its scores are those of `coatkit eval` (`make test-lmms`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
import yaml

pytest.importorskip("lmms_eval", reason="make test-lmms runs these in an environment that has lmms-eval")

import datasets
from coatkit_eval_lmms import TASKS
from coatkit_eval_lmms.model import Coatkit
from coatkit_eval_lmms.prepare import prepare
from lmms_eval import models
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger

import coatkit
from coatkit import AUDIO_TAG, CoatkitError, DataError, PluginError
from coatkit.evaluation.evaluate import evaluate
from coatkit.evaluation.items import tasks_of_suite
from coatkit.evaluation.suite import read_suite

CLIPS = Path(__file__).parents[2] / "examples/quickstart/audio"
# What the clips are: from the quickstart's rows and its ATTRIBUTION.md, transcripts from the names of the files.
KINDS = {
    "note_violin_E4_278": "music", "env_Fire_fire_fire_1": "noise", "ast_goodbye": "speech", "ast_digits_6": "speech",
}  # fmt: skip
SAID = {"ast_goodbye": "Goodbye.", "ast_digits_5": "five", "ast_digits_6": "six", "ast_digits_million": "million"}
MOODS = {
    "esp_en-us_neutral_1": "neu", "esp_en-us_sad_7": "sad", "esp_en-us_excited_4": "exc",
    "esp_en-gb_neutral_10": "neu", "esp_en-gb_sad_16": "sad", "esp_en-gb_excited_13": "exc",
}  # fmt: skip
OPTIONS = ("speech", "music", "noise")
QUESTION = "Is this speech, music or noise?"
LETTERED = (
    f"{QUESTION}\nA. speech\nB. music\nC. noise\nAnswer with the option's letter from the given choices directly."
)
"""A question of MMAU as lmms-eval 0.7.3 words it."""
DICTATE = "Please recognize the speech and only output the recognized content:"
BATCH = 4
ROWS = {"kinds": ("choice", 20), "switchboard": ("wer", 256), "iemocap_session_5": ("f1", 64)}
"""Tasks that have rows of coatkit, by the names of their files."""


def clip(name: str) -> Path:
    return CLIPS / f"{name}.flac"


def row(name: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<audio>{question}"}, {"role": "assistant", "content": answer}]
    return {"id": name, "audio": str(clip(name)), "messages": turns}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def table(path: Path, clips: list[str], sound: str = "audio", **columns: list[Any]) -> None:
    """A benchmark's table as the hub holds it: sounds as bytes in a column of its own kind."""
    cells = [{"bytes": clip(name).read_bytes(), "path": f"{name}.flac"} for name in clips]
    # Sounds are cast to their kind, for to encode them `datasets` needs torchcodec.
    made = datasets.Dataset.from_dict({**columns, sound: cells}).cast_column(sound, datasets.Audio())
    made.to_parquet(str(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What COATKIT_LMMS_DATA names: rows of coatkit, and tables laid out as upstream's benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "kinds.jsonl", [row(name, QUESTION, kind) for name, kind in KINDS.items()])
    write(folder / "switchboard.jsonl", [row(name, "Write down what is said.", said) for name, said in SAID.items()])
    labels = ""
    for i, (name, label) in enumerate(MOODS.items()):
        path = folder / f"Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01_F{i:03}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, *soundfile.read(clip(name), dtype="int16"))
        labels += f"[{i}.1 - {i}.9]\t{path.stem}\t{label}\t[2.5, 2.5, 2.5]\n"
    path = folder / "Session5/dialog/EmoEvaluation/Ses05F_impro01.txt"
    path.parent.mkdir(parents=True)
    path.write_text(labels)
    assert prepare("iemocap_session_5", folder, folder / "iemocap_session_5.jsonl") == (len(MOODS), [])
    names, count = list(KINDS), len(KINDS)
    table(
        folder / "mmau_test_mini.parquet", names, question=[QUESTION] * count, choices=[json.dumps(OPTIONS)] * count,
        answer=list(KINDS.values()), task=["sound"] * count,
    )  # fmt: skip
    transcripts = [f"{said.strip('.').upper()} <PERIOD>" for said in SAID.values()]
    table(folder / "gigaspeech_test.parquet", list(SAID), gt=transcripts)
    asked = {"instruction": ["What is heard?"] * 2, "answer": ["Someone says goodbye.", "A violin plays."]}
    table(folder / "wavcaps.parquet", ["ast_goodbye", "note_violin_E4_278"], "context", **asked)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, new_project: Callable[[], Any]) -> Path:
    """A small random model that has learnt some of the answers by heart, so that it is right now and then."""
    project = new_project()
    rows = [json.loads(line) for name in ROWS for line in (data / f"{name}.jsonl").read_text().splitlines()[:3]]
    lettered = [row(name, LETTERED, "ABC"[OPTIONS.index(kind)]) for name, kind in list(KINDS.items())[:2]]
    dictated = [row(name, DICTATE, said) for name, said in list(SAID.items())[:2]]
    project.rows = [{**one, "id": str(i)} for i, one in enumerate([*rows, *lettered, *dictated])]
    project.spec["stages"] = [
        {"name": "one", "steps": 100, "lr": 3e-3, "batch": {"rows": 13}, "weights": {"audio": 0.1, "level": 0.1}}
    ]
    del project.spec["backbone"]["lora"]  # it is too small to learn thirteen answers
    project.spec["backbone"]["train"] = {"lm": "full", "projector": "full", "tokens": "all"}
    return Path(project.train().folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's tasks, and one of the user's own beside them."""
    folder = tmp_path_factory.mktemp("tasks") / "tasks"
    shutil.copytree(TASKS, folder)
    (folder / "kinds.yaml").write_text(
        "task: coatkit_kinds\nclass: !function coatkit_eval_lmms.task.Rows\nrows: kinds.jsonl\nmetric: choice\n"
        "choices: [speech, music, noise]\ngeneration_kwargs: {max_new_tokens: 20}\n"
    )
    return folder


def lmms_eval(
    run: Path, data: Path, tasks: Path, names: str, out: Path, judge: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "coatkit", "--model_args", f"run={run},device=cpu"]
    command += ["--include_path", str(tasks), "--tasks", names, "--output_path", str(out), "--log_samples"]
    command += ["--batch_size", str(BATCH)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out.parent / "hf"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "COATKIT_LMMS_DATA": str(data), "COATKIT_LMMS_JUDGE": judge}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, timeout=600)


@pytest.fixture(scope="module")
def whole(run: Path, data: Path, tasks: Path, judge: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lmms-eval's own command makes of six tasks: its results and, by task, its samples."""
    judge.answer = lambda prompt: "Rating: 4" if "violin" in prompt else "I would say 3."
    out = tmp_path_factory.mktemp("whole") / "out"
    names = [*ROWS, "mmau_test_mini", "gigaspeech_test", "wavcaps"]
    done = lmms_eval(run, data, tasks, ",".join(f"coatkit_{name}" for name in names), out, judge.settings)
    found = list(out.rglob("*_results.json"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    samples = {
        name: [json.loads(line) for path in out.rglob(f"*_samples_coatkit_{name}.jsonl") for line in path.open()]
        for name in names
    }
    return {"results": json.loads(found[0].read_text())["results"], "samples": samples, "said": done.stdout}


@pytest.fixture(scope="module")
def ours(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `coatkit eval` makes of the same rows."""
    folder = tmp_path_factory.mktemp("ours")
    options = {"kinds": OPTIONS, "iemocap_session_5": ("angry", "happy", "neutral", "sad")}
    suite = [
        {"name": name, "data": str(data / f"{name}.jsonl"), "metric": metric, "max_new_tokens": tokens}
        | ({"choices": list(options[name])} if name in options else {})
        for name, (metric, tokens) in ROWS.items()
    ]
    (folder / "suite.yml").write_text(yaml.safe_dump({"tasks": suite}))
    made = tasks_of_suite(read_suite(folder / "suite.yml"))
    place, results = evaluate(run, "ours", made, out=folder / "eval", batch=BATCH, device="cpu")
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    return {"tasks": results["tasks"], "lines": lines}


# The same rows by both


@pytest.mark.parametrize("name", ROWS)
def test_scores_are_those_of_coatkit_eval(name: str, whole: dict[str, Any], ours: dict[str, Any]) -> None:
    theirs, mine = whole["results"][f"coatkit_{name}"], ours["tasks"][name]
    metric = ROWS[name][0]
    assert mine["rows"] == len(whole["samples"][name])
    assert theirs[f"{metric},none"] == pytest.approx(mine["score"], abs=1e-4)
    assert 0 < mine["score"] < (1000 if metric == "wer" else 100)
    if "parse_failure_rate" in mine:
        assert theirs["parse_failure_rate,none"] == pytest.approx(mine["parse_failure_rate"], abs=1e-4)
    if metric == "wer":
        assert theirs["empty_references,none"] == mine["empty_references"]


@pytest.mark.parametrize("name", ROWS)
def test_answers_are_those_of_coatkit_eval(name: str, whole: dict[str, Any], ours: dict[str, Any]) -> None:
    metric = ROWS[name][0]
    theirs = {one[metric]["id"]: one[metric]["said"] for one in whole["samples"][name]}
    mine = {line["id"]: line["answer"].strip() for line in ours["lines"] if line["task"] == name}
    assert theirs == mine
    assert len(set(mine.values())) > 1


# Upstream's benchmarks, laid out as upstream reads them


def test_upstreams_prompt_is_asked_and_the_answer_read(run: Path, whole: dict[str, Any]) -> None:
    model = coatkit.load(run, device="cpu")
    samples = whole["samples"]["mmau_test_mini"]
    assert [one["choice"]["references"] for one in samples] == [[kind] for kind in KINDS.values()]
    for one, name in zip(samples, KINDS, strict=True):
        assert one["input"] == LETTERED
        assert one["choice"]["said"] == model.ask(clip(name), LETTERED, max_new_tokens=128).strip()
    right = [one["choice"]["said"] == "ABC"[OPTIONS.index(k)] for one, k in zip(samples, KINDS.values(), strict=True)]
    assert right[:2] == [True, True]  # learnt by heart
    score = whole["results"]["coatkit_mmau_test_mini"]
    assert score["choice,none"] >= 100 * sum(right) / len(right)


def test_tags_of_transcripts_do_not_count(whole: dict[str, Any]) -> None:
    samples = {one["wer"]["references"][0]: one["wer"]["said"] for one in whole["samples"]["gigaspeech_test"]}
    assert samples["FIVE <PERIOD>"] == "five"  # learnt by heart
    assert "decoded greedily" not in whole["said"]  # the tasks ask for nothing else
    errors = whole["results"]["coatkit_gigaspeech_test"]["wer,none"]
    wrong = sum(said.strip(".").upper() != right.removesuffix(" <PERIOD>") for right, said in samples.items())
    assert (errors > 0) == (wrong > 0)
    assert errors < 100 or wrong == len(samples)


def test_answers_are_rated_and_failures_do_not_count(whole: dict[str, Any], data: Path, judge: Any) -> None:
    score = whole["results"]["coatkit_wavcaps"]
    assert (score["judge,none"], score["judge_failures,none"]) == (80, 1)
    assert len(judge.asked) == 2  # once each, although the task has two metrics
    said = [one["judge"]["said"] for one in whole["samples"]["wavcaps"]]
    assert all("What is heard?" in prompt and any(text in prompt for text in said) for prompt in judge.asked)
    assert len((data / "judge.jsonl").read_text().splitlines()) == 1


def test_every_task_of_the_package_is_known_to_lmms_eval(tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks))
    for path in TASKS.glob("*.yaml"):
        assert f"coatkit_{path.stem}" in manager.all_tasks


LETTERS = {"choice_a": "dog", "choice_b": "cat", "choice_c": "cow", "choice_d": "horse"}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "mmau_test_mini": {"question": "Which?", "choices": json.dumps(OPTIONS), "answer": "noise", "task": "sound"},
    "mmar": {"question": "Which?", "choices": ["A. dog", "B. cat"], "answer": "B"},
    "mmsu": {"question": "Which?", **LETTERS, "answer": "C"},
    "clotho_aqa_test": {"question": "Is it loud?", "answer": "yes"},
    "wavcaps": {"instruction": "What is heard?", "answer": "A dog."},
    "alpaca_audio": {"speech_instruction": "Name a dog.", "answer": "Rex"},
    "vocalsound_test": {"answer": "Cough"},
    "air_bench_foundation_speech": {"question": "Which?", **LETTERS, "answer_gt": "cow", "task_name": "t"},
    "air_bench_foundation_sound": {"question": "Which?", **LETTERS, "answer_gt": "cow", "task_name": "t"},
    "air_bench_foundation_music": {"question": "Which?", **LETTERS, "answer_gt": "cow", "task_name": "t"},
    "muchomusic": {"instruction": "Which?", "choices": ["(A) fast", "(B) slow"], "answer": "(B) slow"},
    "librispeech_test_clean": {"gt": "IT'S A COLOUR"},
    "librispeech_test_other": {"gt": "GOODBYE"},
    "common_voice_15_en": {"sentence": "Goodbye."},
    "gigaspeech_test": {"gt": "GOODBYE <PERIOD>"},
    "voxpopuli_en": {"normalized_text": "goodbye", "language": 0},
    "spgispeech": {"text": "Goodbye."},
}
"""A document of each benchmark, with the columns that lmms-eval 0.7.3's own code reads."""


def test_the_whole_group_loads_from_local_data(
    data: Path, tasks: Path, judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATKIT_LMMS_DATA", str(tmp_path))
    monkeypatch.setenv("COATKIT_LMMS_JUDGE", judge.settings)
    for name, document in DOCUMENTS.items():
        sound = "context" if name in ("wavcaps", "alpaca_audio", "muchomusic") else "audio"
        columns = {key: [value] for key, value in document.items()}
        table(tmp_path / f"{name}.parquet", ["ast_goodbye"], sound, **columns)
    for name, answer in {"gtzan": "jazz", "meld": "joy", "iemocap_session_5": "sad", "switchboard": "bye"}.items():
        write(tmp_path / f"{name}.jsonl", [row("ast_goodbye", QUESTION, answer)])
    (group,) = get_task_dict(["coatkit_table_d"], TaskManager(include_path=str(tasks), include_defaults=False)).values()
    assert len(group) == len(DOCUMENTS) + 4 == 21
    for name, task in group.items():
        (doc,) = task.test_docs()
        assert task.doc_to_text(doc).strip()
        assert task.doc_to_visual(doc)[0]["array"].size > 1000
        # The right answer is right: by every metric but a judge's.
        kept = {key: value for key, value in doc.items() if key not in ("audio", "context")}
        found = task.process_results(kept, [task.config.process_results.keywords["reading"](kept)[0][0]])
        for metric, aggregate in task.aggregation().items():
            best = 100 if metric in ("choice", "f1", "accuracy", "exact") else 0
            assert metric.startswith("judge") or aggregate([found[metric]]) == best, (name, metric)
    clean = group["coatkit_librispeech_test_clean"]  # English spellings count as the same
    assert clean.aggregation()["wer"]([clean.process_results({"gt": "IT'S A COLOUR"}, ["it is a color"])["wer"]]) == 0


# Other models of lmms-eval


def test_other_models_get_the_sound_as_samples(data: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATKIT_LMMS_DATA", str(data))
    names = ["coatkit_switchboard", "coatkit_mmau_test_mini"]
    for name, task in get_task_dict(names, TaskManager(include_path=str(tasks), include_defaults=False)).items():
        (sound,) = task.doc_to_visual(task.test_docs()[0])
        samples, rate = soundfile.read(clip(next(iter(SAID if "switch" in name else KINDS))), dtype="float32")
        assert sound["sampling_rate"] == rate == 16_000
        assert sound["array"].tolist() == samples.tolist()
        assert AUDIO_TAG not in task.doc_to_text(task.test_docs()[0])


# Data that is missing or bad


@pytest.fixture
def here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data that a test may change."""
    folder = tmp_path / "here"
    shutil.copytree(data, folder)
    monkeypatch.setenv("COATKIT_LMMS_DATA", str(folder))
    monkeypatch.delenv("COATKIT_LMMS_SKIP_BAD", raising=False)
    return folder


def load(name: str, tasks: Path) -> Any:
    return get_task_dict([name], TaskManager(include_path=str(tasks), include_defaults=False))[name]


def test_a_missing_file_is_named_with_the_remedy(here: Path, tasks: Path) -> None:
    with pytest.raises(PluginError, match=r"coatkit_meld: .*here/meld\.jsonl: no such file.*COATKIT_LMMS_DATA"):
        load("coatkit_meld", tasks)


def test_bad_rows_are_refused_or_left_out_and_counted(here: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(name, QUESTION, kind) for name, kind in KINDS.items()]
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    rows += [{**rows[0], "messages": [*turns, *rows[0]["messages"]]}, row("ast_goodbye", QUESTION, "a horse")]
    write(here / "kinds.jsonl", rows)
    with pytest.raises(DataError, match=r"coatkit_kinds: 2 of 6 documents are bad, first: .*a horse"):
        load("coatkit_kinds", tasks)
    monkeypatch.setenv("COATKIT_LMMS_SKIP_BAD", "1")
    assert len(load("coatkit_kinds", tasks).test_docs()) == 4


def test_bad_documents_of_upstream_are_refused_or_left_out(
    here: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"question": [QUESTION] * 2, "choices": [json.dumps(OPTIONS), '["a", "b"]'], "task": ["sound"] * 2}
    table(here / "mmau_test_mini.parquet", ["ast_goodbye"] * 2, answer=["speech", "c"], **given)
    with pytest.raises(DataError, match=r"coatkit_mmau_test_mini: 1 of 2 .* document 1: .*'c' is none of its choices"):
        load("coatkit_mmau_test_mini", tasks)
    monkeypatch.setenv("COATKIT_LMMS_SKIP_BAD", "1")
    task = load("coatkit_mmau_test_mini", tasks)
    assert len(task.test_docs()) == len(task.test_docs_no_media()) == 1
    table(here / "mmau_test_mini.parquet", ["ast_goodbye"], "sound", question=[QUESTION])
    with pytest.raises(PluginError, match="coatkit_mmau_test_mini: its data has no column 'audio', only"):
        load("coatkit_mmau_test_mini", tasks)


@pytest.mark.parametrize("name", ["kinds", "mmau_test_mini"])
def test_other_data_is_another_task_to_lmms_evals_cache(name: str, here: Path, tasks: Path) -> None:
    before = [load(f"coatkit_{name}", tasks).dump_config()["metadata"] for _ in range(2)]
    kinds = ["noise", *list(KINDS.values())[1:]]
    if name == "kinds":
        write(here / "kinds.jsonl", [row(clip, QUESTION, kind) for clip, kind in zip(KINDS, kinds, strict=True)])
    else:
        given = {"question": [QUESTION] * 4, "choices": [json.dumps(OPTIONS)] * 4, "task": ["sound"] * 4}
        table(here / "mmau_test_mini.parquet", list(KINDS), answer=kinds, **given)
    assert before[0] == before[1] != load(f"coatkit_{name}", tasks).dump_config()["metadata"]


def test_a_folder_saved_by_datasets_is_read_too(here: Path, tasks: Path) -> None:
    made = datasets.Dataset.from_parquet(str(here / "mmau_test_mini.parquet"))
    (here / "mmau_test_mini.parquet").unlink()
    datasets.DatasetDict({"test_mini": made}).save_to_disk(str(here / "mmau_test_mini"))
    assert len(load("coatkit_mmau_test_mini", tasks).test_docs()) == len(KINDS)


# The model


@pytest.fixture(scope="module")
def warnings_said() -> list[str]:
    """What lmms-eval's log is told."""
    said: list[str] = []
    logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    return said


@pytest.fixture(scope="module")
def model(run: Path) -> Coatkit:
    return Coatkit(run=str(run), device="cpu", batch_size="2")


def ask(model: Coatkit, *asked: tuple[str, Any], **kwargs: Any) -> list[str]:
    """Answers to (question, sounds) pairs, asked as lmms-eval asks."""
    model.task_dict["t"] = {"test": [SimpleNamespace(sounds=sounds) for _, sounds in asked]}
    meta = {"task": "t", "repeats": 1}
    requests = [
        Instance(
            "generate_until", (text, dict(kwargs), lambda doc: doc.sounds, i, "t", "test"), 0, {**meta, "doc_id": i}
        )
        for i, (text, _) in enumerate(asked)
    ]
    return model.generate_until(requests)


def test_the_model_is_registered_for_the_simple_interface_alone() -> None:
    assert models.get_model("coatkit") is Coatkit
    manifest = models.get_model_manifest("coatkit")
    assert (manifest.simple_class_path, manifest.chat_class_path) == ("coatkit_eval_lmms.model.Coatkit", None)


def test_answers_come_in_the_order_of_the_questions(model: Coatkit, data: Path) -> None:
    names = [*SAID, *KINDS]
    said = ask(model, *((DICTATE, [str(clip(name))]) for name in names), max_new_tokens=6)
    alone = [model.thinker.ask(clip(name), DICTATE, max_new_tokens=6) for name in names]
    assert said == alone
    assert len(set(said)) > 1


def test_several_sounds_and_none(model: Coatkit) -> None:
    two = [str(clip("ast_goodbye")), str(clip("ast_digits_5"))]
    said = ask(model, ("Are these the same?", two), ("What is 1 plus 1?", None), max_new_tokens=5)
    rows = [
        coatkit.Row("1", (coatkit.Message("user", "<audio><audio>Are these the same?"),),
                    tuple(coatkit.AudioRef(Path(path)) for path in two)),
        coatkit.Row("2", (coatkit.Message("user", "What is 1 plus 1?"),)),
    ]  # fmt: skip
    assert said == [model.thinker.answer([one], max_new_tokens=5)[0] for one in rows]


def test_an_answer_ends_where_the_task_says(model: Coatkit) -> None:
    sound = [str(clip("ast_goodbye"))]
    (long,) = ask(model, ("Write down what is said.", sound), max_new_tokens=8)
    assert long.startswith("Goodbye")
    assert ask(model, ("Write down what is said.", sound), max_new_tokens=8, until=["bye"]) == ["Good"]
    (short,) = ask(model, ("Write down what is said.", sound), max_new_tokens=1)
    assert 0 < len(short) < len(long)
    assert long.startswith(short)


def test_sampling_is_not_used_and_said_once(model: Coatkit, warnings_said: list[str]) -> None:
    sound = [str(clip("ast_goodbye"))]
    warnings_said.clear()
    greedy = ask(model, (DICTATE, sound), max_new_tokens=5, temperature=0, top_p=1.0, do_sample=False)
    assert warnings_said == []
    sampled = [ask(model, (DICTATE, sound), max_new_tokens=5, temperature=0.9, do_sample=True) for _ in range(2)]
    assert sampled == [greedy, greedy]
    (said,) = warnings_said
    assert "t: answers are decoded greedily; not used: temperature=0.9, do_sample=True" in said


def test_a_bad_sound_stops_by_name_or_gets_an_empty_answer(
    run: Path, model: Coatkit, tmp_path: Path, warnings_said: list[str]
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF no sound")
    short = {"array": [0.1] * 100, "sampling_rate": 16_000}  # too short to be heard
    good = (DICTATE, [str(clip("ast_goodbye"))])
    with pytest.raises(DataError, match=r"bad\.wav"):
        ask(model, good, (DICTATE, [str(tmp_path / "bad.wav")]))
    with pytest.raises(DataError, match="t, document 1"):
        ask(model, good, (DICTATE, [short]))
    warnings_said.clear()
    lenient = Coatkit(run=str(run), device="cpu", batch_size=4, bad="empty")
    said = ask(lenient, (DICTATE, [short]), good, (DICTATE, [str(tmp_path / "bad.wav")]), max_new_tokens=5)
    assert said == ["", *ask(model, good, max_new_tokens=5), ""]
    assert any("2 of 3 questions had a bad sound" in one for one in warnings_said)


def test_long_sounds_are_cut_when_asked(run: Path, model: Coatkit, warnings_said: list[str]) -> None:
    samples, rate = soundfile.read(clip("ast_goodbye"), dtype="float32")
    start = {"array": samples[: rate // 4], "sampling_rate": rate}
    whole = {"array": samples, "sampling_rate": rate}
    warnings_said.clear()
    cropped = Coatkit(run=str(run), device="cpu", crop=0.25)
    assert ask(cropped, (DICTATE, [whole]), max_new_tokens=5) == ask(model, (DICTATE, [start]), max_new_tokens=5)
    assert ["t: 1 sound(s) were cut to their first 0.25 s" in one for one in warnings_said] == [True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "run is missing"),
        ("run=x,pretrained=y", "unknown pretrained; there are: run, untrained"),
        ("run=x,bad=skip", "refuse or empty, got 'skip'"),
        ("run=x,untrained=maybe", "True or False, got 'maybe'"),
        ("run=x,crop=0", "seconds over 0"),
        ("run=x,step=last", "step must be a whole number over 0, got 'last'"),
        ("run=x,max_new_tokens=0", "max_new_tokens must be a whole number over 0, got 0"),
        ("run=2026", "2026: is not a run folder"),
        ("run=x,batch_size=auto", "got 'auto'"),
        ("run=no/such/folder", "no/such/folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments: str, said: str) -> None:
    with pytest.raises(CoatkitError, match=said):
        Coatkit.create_from_arg_string(arguments, {})


def test_the_untrained_model_can_be_asked(run: Path, model: Coatkit) -> None:
    untrained = Coatkit.create_from_arg_string(f"run={run},untrained=True,device=cpu", {"batch_size": 1})
    assert untrained.thinker.step == 0 < model.thinker.step
    question = ("Write down what is said.", [str(clip("ast_goodbye"))])
    assert ask(untrained, question, max_new_tokens=5) != ask(model, question, max_new_tokens=5)


def test_likelihoods_and_rounds_are_refused_with_a_reason(model: Coatkit) -> None:
    with pytest.raises(CoatkitError, match="output_type loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(CoatkitError, match="several rounds"):
        model.generate_until_multi_round([])
