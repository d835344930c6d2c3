"""Classes that lmms-eval's tasks are made of: rows of coatkit, and upstream's tasks read and scored as coatkit does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
from lmms_eval import utils
from lmms_eval.api.task import ConfigurableTask
from loguru import logger
from pydantic import ValidationError

from coatkit import AUDIO_TAG, AudioRef, DataError, PluginError
from coatkit.data.audio import LONGEST_ASKED, read
from coatkit.evaluation.items import Item, tasks_of_suite
from coatkit.evaluation.metrics import Answer, cannot_score
from coatkit.evaluation.suite import SuiteSpec, TaskSpec
from coatkit_eval_lmms import readings
from coatkit_eval_lmms.asking import samples_of
from coatkit_eval_lmms.judging import DATA, data_folder
from coatkit_eval_lmms.scoring import metric_list, process

SKIP = "COATKIT_LMMS_SKIP_BAD"
_TASKS = Path(lmms_eval.__file__).parent / "tasks"
_SPLIT = "test"


def _refuse(task: str, reasons: list[str], of: int) -> None:
    """Refuse documents that no answer could be scored on, or say how many are left out.

    Raises:
        DataError: Unless the user has asked to leave them out, or when none would be left.
    """
    if not reasons:
        return
    found = f"{task}: {len(reasons)} of {of} documents are bad, first: {reasons[0]}"
    if len(reasons) == of or os.environ.get(SKIP, "") not in ("1", "true"):
        raise DataError(f"{found}\n  Repair or remove them, or leave them out with {SKIP}=1, which says how many.")
    logger.warning(f"{found}; they are left out")


class _Task(ConfigurableTask):  # type: ignore[misc]
    """A task whose answers are scored by a metric of coatkit."""

    dataset: Any
    dataset_no_image: Any

    def __init__(
        self, config: Mapping[str, Any], reading: Any, metric: str, language: str = "en", question: str = ""
    ) -> None:
        metrics = metric_list(metric, language, config["task"])
        known = {key: value for key, value in config.items() if key != "class"}
        scoring = {
            "metric_list": metrics,
            "process_results": partial(
                process, reading=reading, names=[one["metric"] for one in metrics], question=question
            ),
        }
        super().__init__(config={**known, **scoring}, model_name="coatkit")

    def _made_of(self, digest: str) -> None:
        """Note what the data is: lmms-eval's cache knows a task by its configuration, and results hold it."""
        self.config.metadata = {**(self.config.metadata or {}), "data": digest}


class Rows(_Task):
    """Rows in any format coatkit reads, asked and scored as `coatkit eval` does.

    In the task's YAML: `rows` (a path or a source, as in a suite; relative to COATKIT_LMMS_DATA), `metric`, and as in a
    suite `choices`, `reference` and `language`.

    Raises:
        PluginError: If these are wrong, or the file is missing.
        DataError: If rows are bad, or have several turns, which lmms-eval's simple interface cannot ask.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        given = dict(config)
        name = given["task"]
        generation = {"until": [], "do_sample": False, **(given.pop("generation_kwargs", None) or {})}
        generation.setdefault("max_new_tokens", 64)
        asked = {key: given.pop(key) for key in ("metric", "choices", "reference", "language") if key in given}
        source = given.pop("rows", None)
        try:
            self.spec = TaskSpec(name=name, data=source, max_new_tokens=generation["max_new_tokens"], **asked)
        except ValidationError as error:
            places = [".".join("rows" if part == "data" else str(part) for part in e["loc"]) for e in error.errors()]
            problems = [f"{place}: {e['msg']}" for place, e in zip(places, error.errors(), strict=True)]
            raise PluginError(f"{name}: {'; '.join(problems)}") from None
        place = data_folder() / Path(self.spec.data.path).expanduser()
        if not place.exists():
            raise PluginError(f"{name}: {place}: no such file; put it there, or name its folder in {DATA}")
        data = self.spec.data.model_copy(update={"path": str(place)})
        self.spec = self.spec.model_copy(update={"data": data})
        fixed = {
            "generation_kwargs": generation,
            "test_split": _SPLIT,
            "doc_to_text": "question",
            "doc_to_visual": _sounds,
            "doc_to_target": "target",
        }
        scoring = (self.spec.metric, self.spec.language, "question" if self.spec.metric == "judge" else "")
        super().__init__({**given, **fixed}, readings.written, *scoring)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Read the rows; nothing is fetched."""
        task = tasks_of_suite(SuiteSpec(tasks=[self.spec]))[0]
        docs, bad = [], [reason for _, _, reason in task.bad]
        for item in task.items:
            try:
                docs.append(_document(item))
            except DataError as error:
                bad.append(str(error))
        _refuse(self.spec.name, bad, len(docs) + len(bad))
        self._made_of(task.sha256)
        self.dataset = datasets.DatasetDict({_SPLIT: datasets.Dataset.from_list(docs)})
        self.dataset_no_image = self.dataset


def _document(item: Item) -> dict[str, Any]:
    """A row as a document: texts and numbers; where its sounds are, as JSON."""
    asked = [m for m in item.row.messages if m.role != "assistant"]
    if len(asked) != 1 or asked[0].role != "user" or len(item.row.messages) > 2:
        raise item.row.fail("has several turns, or a system's; lmms-eval asks one question: use `coatkit eval`")
    places = [[str(ref.path), ref.start, ref.end, ref.part] for ref in item.row.audios]
    tags = AUDIO_TAG * len(places)
    return {
        "index": item.index,
        "id": item.row.id,
        # Tags that lead are left to the model: other models of lmms-eval know none.
        "question": asked[0].content.removeprefix(tags),
        "target": item.references[0],
        "references": list(item.references),
        "choices": list(item.choices),
        "sounds": json.dumps(places),
    }


def _sounds(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's sounds as every model of lmms-eval takes them: `array` [N], float32, and `sampling_rate` in Hz."""
    found = []
    for path, start, end, part in json.loads(doc["sounds"]):
        samples, rate = read(AudioRef(Path(path), start, end, part), LONGEST_ASKED)
        found.append({"path": path, "array": samples, "sampling_rate": rate})
    return found


class Overlay(_Task):
    """A task of upstream with its data and prompt, but with coatkit's decoding of sounds, reading and scoring.

    In the task's YAML: `upstream` (its file below lmms-eval's `tasks`), `sound` (the column), `reading` (a function
    from a document to right answers and options), `metric`, `generation_kwargs`; for the metric `judge`, `question`
    (the column of what was asked).

    Data comes from COATKIT_LMMS_DATA when there is a file `NAME.parquet` or a folder `NAME` written by
    `datasets`' save_to_disk (NAME: the task's name without `coatkit_`), else from where upstream has it.

    Raises:
        DataError: If documents have no right answer among their options.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        given = dict(config)
        self.sound, self.reading = given.pop("sound"), given.pop("reading")
        self.metric, language, question = given.pop("metric"), given.pop("language", "en"), given.pop("question", "")
        upstream = utils.load_yaml_config(yaml_path=str(_TASKS / given.pop("upstream")), mode="full")
        for key in ("group", "tag", "doc_to_choice", "task_alias"):
            upstream.pop(key, None)
        self.name = given["task"]
        super().__init__({**upstream, **given, "doc_to_visual": None}, self.reading, self.metric, language, question)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Read the data, with its sounds undecoded: `datasets` needs torchcodec and FFmpeg to decode them."""
        split, local = self.config.test_split, data_folder() / self.name.removeprefix("coatkit_")
        if (table := local.with_name(f"{local.name}.parquet")).is_file():
            found = datasets.DatasetDict({split: datasets.Dataset.from_parquet(str(table))})
        elif local.is_dir():
            found = datasets.load_from_disk(str(local))
            found = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({split: found})
        else:
            super().download(dataset_kwargs)
            found = self.dataset
        if split not in found:
            raise PluginError(f"{self.name}: its data has no split {split!r}, only {', '.join(found)}")
        docs = found[split]
        if isinstance(docs.features.get(self.sound), datasets.Audio):
            docs = docs.cast_column(self.sound, datasets.Audio(decode=False))
        elif self.sound not in docs.features:
            raise PluginError(f"{self.name}: its data has no column {self.sound!r}, only {', '.join(docs.features)}")
        texts = docs.remove_columns([self.sound])
        digest = hashlib.sha256()
        reasons = {i: why for i, doc in enumerate(texts) if (why := self._why_not(i, doc, digest))}
        self._made_of(digest.hexdigest())
        _refuse(self.name, list(reasons.values()), len(docs))
        good = [i for i in range(len(docs)) if i not in reasons]
        self.dataset = datasets.DatasetDict({split: docs.select(good) if reasons else docs})
        self.dataset_no_image = datasets.DatasetDict({split: texts.select(good) if reasons else texts})

    def doc_to_visual(self, doc: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The sound of a document as every model of lmms-eval takes it: `array` [N] and `sampling_rate` in Hz."""
        samples, rate = samples_of(doc[self.sound], self.name)
        return [{"path": None, "array": samples, "sampling_rate": rate}]

    def _why_not(self, index: int, doc: Mapping[str, Any], digest: Any) -> str:
        """Why a document cannot be scored; empty when it can. What is right goes into the digest."""
        try:
            references, choices = self.reading(doc)
            if missing := [one for one in (*references, *choices) if not isinstance(one, str)]:
                return f"document {index}: its right answer or an option is {missing[0]!r}, not a text"
            digest.update(json.dumps([references, choices]).encode())
            reason = cannot_score(self.metric, Answer("", tuple(references), tuple(choices)))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            reason = f"cannot be read: {type(error).__name__}: {error}"
        return reason and f"document {index}: {reason}"
