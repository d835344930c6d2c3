"""Task files, right answers of upstream's documents, scores, and rows of benchmarks that upstream lacks."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from coatkit import DataError, PluginError
from coatkit.evaluation.metrics import Answer, cannot_score
from coatkit.evaluation.suite import TaskSpec, read_suite
from coatkit_eval_lmms import TASKS, readings
from coatkit_eval_lmms.__main__ import main
from coatkit_eval_lmms.prepare import BENCHMARKS, prepare
from coatkit_eval_lmms.scoring import entry, metric_list, process

ROOT = Path(__file__).parents[3]
CLIPS = ROOT / "examples/quickstart/audio"
METRIC_NAMES = {"accuracy": "choice", "weighted F1": "f1", "WER": "wer", "exact match": "exact", "judge": "judge"}


class Loader(yaml.SafeLoader):
    """Leaves the names of functions as they are."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
CONFIGS: dict[str, dict[str, Any]] = {
    path.stem: yaml.load(path.read_text(encoding="utf-8"), Loader) for path in sorted(TASKS.glob("*.yaml"))
}
SINGLE = {name: config for name, config in CONFIGS.items() if isinstance(config["task"], str)}


@pytest.mark.parametrize("name", SINGLE)
def test_a_task_file_is_whole(name: str) -> None:
    config = SINGLE[name]
    assert config["task"] == f"coatkit_{name}"
    if config["class"].endswith(".Rows"):
        keys = {key: config[key] for key in ("metric", "choices", "language") if key in config}
        TaskSpec(name=name, data=config["rows"], max_new_tokens=config["generation_kwargs"]["max_new_tokens"], **keys)
        assert config["rows"] == f"{name}.jsonl"
    else:
        assert callable(getattr(readings, config["reading"].rpartition(".")[2]))
        kwargs = config["generation_kwargs"]
        assert (kwargs["do_sample"], kwargs["until"]) == (False, [])


def test_the_group_holds_every_task() -> None:
    assert sorted(CONFIGS["table_d"]["task"]) == sorted(config["task"] for config in SINGLE.values())


def test_the_documentation_lists_every_task_as_it_is() -> None:
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| [^|]+ \| `(coatkit_\w+)` \| ([^|]+) \| (\d+)[^|]* \| ([^|(]+?)(?: \([^|]*\))? \|", text, re.M
    )
    told = {task: (int(tokens), METRIC_NAMES[metric]) for task, _, tokens, metric in rows}
    assert len(told) == len(rows)
    assert told == {
        config["task"]: (config["generation_kwargs"]["max_new_tokens"], config["metric"]) for config in SINGLE.values()
    }


def test_the_folder_of_tasks_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert Path(capsys.readouterr().out.strip()) == TASKS


def test_looking_for_tasks_and_models_loads_neither_torch_nor_lmms_eval() -> None:
    code = "import sys, coatkit_eval_lmms.__main__ as m; m.main([]); print({'torch', 'lmms_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# Right answers of upstream's documents


@pytest.mark.parametrize(
    ("reading", "doc", "right", "options"),
    [
        ("mmau", {"choices": '["dog", "cat"]', "answer": "cat"}, "cat", ["dog", "cat"]),
        ("mmau", {"choices": '["(A) dog", "(B) cat"]', "answer": "(B) cat"}, "cat", ["dog", "cat"]),
        ("mmar", {"choices": ["A. dog", "B. cat", "C. C sharp"], "answer": "b"}, "cat", ["dog", "cat", "C sharp"]),
        ("mmsu", {**{f"choice_{x}": x * 2 for x in "abcd"}, "answer": "D"}, "dd", ["aa", "bb", "cc", "dd"]),
        (
            "air_bench",
            {"choice_a": "yes", "choice_b": "no", "choice_c": None, "answer_gt": "no"},
            "no",
            ["yes", "no"],
        ),
        ("muchomusic", {"choices": ["(A) fast", "(B) slow"], "answer": "(B) slow"}, "slow", ["fast", "slow"]),
        ("muchomusic", {"choices": "(A) a slow one\n(B) fast", "answer": "(B) fast"}, "fast", ["a slow one", "fast"]),
        ("vocalsound", {"answer": "Throat clearing"}, "Throat clearing", list(readings.VOCAL_SOUNDS)),
    ],
)
def test_options_and_right_answers(reading: str, doc: dict[str, Any], right: str, options: list[str]) -> None:
    references, choices = getattr(readings, reading)(doc)
    assert choices == options
    assert cannot_score("choice", Answer("", tuple(references), tuple(choices))) == ""
    names = [one["metric"] for one in metric_list("choice", "en")]
    found = process(doc, [f"The answer is {right}."], reading=getattr(readings, reading), names=names)
    assert [one["aggregation"]([found[one["metric"]]]) for one in metric_list("choice", "en")] == [100, 0]


def test_an_answer_that_is_no_option_is_refused() -> None:
    references, choices = readings.mmar({"choices": ["A. dog", "B. cat"], "answer": "E"})
    assert "none of its choices" in cannot_score("choice", Answer("", tuple(references), tuple(choices)))


def test_what_is_no_letter_is_no_option_and_initials_are_names() -> None:
    assert readings.mmar({"choices": ["Cat", "Dog", "Owl", "Fox"], "answer": "Dog"})[0] == ["Dog"]
    composers = ["J. S. Bach", "L. van Beethoven", "F. Chopin"]
    assert readings.mmar({"choices": composers, "answer": "(b)"}) == (["L. van Beethoven"], composers)


def test_what_is_missing_is_not_the_text_none() -> None:
    assert readings.answer({"answer": None}) == ([None], [])
    assert readings.text({"text": None, "transcript": "hello"}) == (["hello"], [])
    options = {f"choice_{letter}": value for letter, value in zip("abcd", ("x", "y", None, None), strict=True)}
    assert readings.mmsu({**options, "answer": "A"})[1] == ["x", "y", None, None]


@pytest.mark.parametrize(
    ("reading", "doc", "said"),
    [
        ("gt", {"gt": "A"}, "A"),
        ("sentence", {"sentence": "A"}, "A"),
        ("text", {"transcript": "B", "text": "A"}, "A"),
        ("text", {"gt": "A"}, "A"),
        ("normalized_text", {"normalized_text": "A", "raw_text": "B"}, "A"),
        ("normalized_text", {"normalized_text": "", "raw_text": "B"}, "B"),
        ("answer", {"answer": "yes"}, "yes"),
    ],
)
def test_transcripts(reading: str, doc: dict[str, str], said: str) -> None:
    assert getattr(readings, reading)(doc) == ([said], [])


# Scores


def values(metric: str, *answers: tuple[str, str], choices: tuple[str, ...] = ()) -> dict[str, float]:
    entries = [entry(said, [right], choices) for said, right in answers]
    return {one["metric"]: one["aggregation"](entries) for one in metric_list(metric, "en")}


def test_what_cannot_be_read_is_wrong_and_counted() -> None:
    found = values("choice", ("B", "cat"), ("dog or cat", "cat"), ("bird", "dog"), choices=("dog", "cat"))
    assert found == pytest.approx({"choice": 100 / 3, "parse_failure_rate": 200 / 3})


def test_weighted_f1_comes_with_accuracy() -> None:
    answers = [("happy", "happy"), ("sad", "happy"), ("sad", "sad"), ("what", "sad")]
    found = values("f1", *answers, choices=("happy", "sad"))
    # happy: precision 1, recall 1/2; sad: precision 1/2, recall 1/2
    assert found == pytest.approx({"f1": 100 * (2 / 3 + 1 / 2) / 2, "accuracy": 50, "parse_failure_rate": 25})


def test_word_errors_are_of_all_documents_together() -> None:
    found = values("wer", ("dog cat", "DOG <COMMA> CAT <PERIOD>"), ("a horse", "a horse and cow"), ("noise", "<NOISE>"))
    assert found == pytest.approx({"wer": 100 * 2 / 6, "empty_references": 1})
    assert math.isnan(values("wer", ("noise", "<NOISE>"))["wer"])
    assert [one["higher_is_better"] for one in metric_list("wer", "en")] == [False, False]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(PluginError, match="'accuracy' is unknown; there are: exact, choice"):
        metric_list("accuracy", "en")


# Benchmarks that upstream lacks, as they are handed out


def clip(to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(CLIPS / "ast_goodbye.flac", to)


def tree(name: str, folder: Path) -> dict[str, str]:
    """Lay a benchmark out; what is right for each of its rows."""
    if name == "gtzan":
        for place in ("genres/blues/blues.00000", "genres/hiphop/hiphop.00001", "other/speech/x"):
            clip(folder / f"{place}.flac")
        (folder / "genres/jazz").mkdir()
        (folder / "genres/jazz/jazz.00054.wav").write_bytes(b"damaged, as this one is in the original")
        return {"blues.00000": "blues", "hiphop.00001": "hip-hop"}
    if name == "meld":
        header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID"
        lines = ['1,"Oh, no",Ross,surprise,negative,0,0', "2,Bye,Joey,Joy,positive,10,3"]
        folder.mkdir(parents=True)
        (folder / "test_sent_emo.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
        clip(folder / "output/dia0_utt0.flac")
        clip(folder / "output/dia10_utt3.flac")
        return {"dia0_utt0": "surprise", "dia10_utt3": "joy"}
    labels = {"F000": "neu", "F001": "exc", "M002": "xxx", "M003": "hap", "M004": "fru", "M005": "ang", "M006": "sad"}
    lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    for i, (turn, label) in enumerate(labels.items()):
        lines += [f"[{i}.1000 - {i}.9000]\tSes05F_impro01_{turn}\t{label}\t[2.5, 2.5, 2.5]", f"C-E1:\t{label};\t()", ""]
        clip(folder / f"Session5/sentences/wav/Ses05F_impro01/Ses05F_impro01_{turn}.wav")
    path = folder / "Session5/dialog/EmoEvaluation/Ses05F_impro01.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    said = {"F000": "neutral", "F001": "happy", "M003": "happy", "M005": "angry", "M006": "sad"}
    return {f"Ses05F_impro01_{turn}": emotion for turn, emotion in said.items()}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_a_benchmark(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = tree(name, tmp_path / "given")
    out = tmp_path / f"{name}.jsonl"
    assert main(["prepare", name, str(tmp_path / "given"), str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{len(right)} rows" in told
    assert ("1 left out" in told) == (name == "gtzan")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"]: row["messages"][1]["content"] for row in rows} == right
    # `coatkit eval` reads the same rows, with the task's own options
    suite = {"tasks": [{"name": name, "data": out.name, "metric": SINGLE[name]["metric"]}]}
    suite["tasks"][0]["choices"] = SINGLE[name]["choices"]
    (tmp_path / "suite.yml").write_text(json.dumps(suite))
    from coatkit.evaluation.items import tasks_of_suite

    (task,) = tasks_of_suite(read_suite(tmp_path / "suite.yml"))
    assert (len(task.items), task.bad) == (len(right), [])
    for choice in SINGLE[name]["choices"]:
        assert choice in rows[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("name", "gone", "said"),
    [
        ("gtzan", "genres", "no sound of gtzan"),
        ("meld", "test_sent_emo.csv", "no test_sent_emo.csv"),
        ("meld", "output/dia10_utt3.flac", "no sound dia10_utt3.*ffmpeg"),
        ("iemocap_session_5", "Session5/dialog", "no dialog/EmoEvaluation"),
        ("iemocap_session_5", "Session5/sentences", "no sound of iemocap_session_5 in it, first: "),
    ],
)
def test_a_folder_that_is_not_laid_out_so_is_refused(name: str, gone: str, said: str, tmp_path: Path) -> None:
    tree(name, tmp_path / "given")
    path = tmp_path / "given" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=said):
        prepare(name, tmp_path / "given", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree("meld", tmp_path / "given")
    assert main(["prepare", "meld", str(tmp_path / "given"), str(tmp_path / "no/such/out.jsonl")]) == 3
    assert "cannot be written" in capsys.readouterr().err
