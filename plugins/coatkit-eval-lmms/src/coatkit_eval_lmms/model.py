"""The model `coatkit` of lmms-eval: a run of coatkit, asked through its thinking block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

import coatkit
from coatkit import CoatkitError, DataError, PluginError
from coatkit_eval_lmms.asking import WINDOW, How, Request, batches, how, request

_OPTIONS = "run, untrained, step, device, max_new_tokens, crop, bad"


class Coatkit(lmms):  # type: ignore[misc]
    """A run's model behind lmms-eval's simple interface. Decoding is greedy, whatever a task asks for.

    Args:
        run: The run folder.
        untrained: Take the model as it was before the first step.
        step: Of the checkpoint to take; the newest when left out.
        device: Torch device; the best there is when left out, and one GPU for each process of several.
        batch_size: Requests answered together.
        max_new_tokens: Longest answer of a task that sets none.
        crop: Seconds of a sound that are heard; what comes after is cut off, and how many were cut is said. All when
            left out.
        bad: `refuse` stops at a sound that cannot be read or heard; `empty` gives it the answer "", which counts as
            wrong, and says how many there were.

    Raises:
        PluginError: If an argument is unknown or wrong.
        RunError: If the run cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        run: str = "",
        untrained: bool = False,
        step: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 256,
        crop: float | None = None,
        bad: str = "refuse",
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise PluginError(f"--model_args: unknown {', '.join(unknown)}; there are: {_OPTIONS}")
        for name, value in (("step", step), ("max_new_tokens", max_new_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PluginError(f"--model_args: {name} must be a whole number over 0, got {value!r}")
        if not run:
            raise PluginError("--model_args: run is missing; give run=FOLDER, a run's folder")
        if bad not in ("refuse", "empty"):
            raise PluginError(f"--model_args: bad must be refuse or empty, got {bad!r}")
        if untrained not in (True, False):
            raise PluginError(f"--model_args: untrained must be True or False, got {untrained!r}")
        if crop is not None and not (isinstance(crop, int | float) and crop > 0):
            raise PluginError(f"--model_args: crop must be seconds over 0, got {crop!r}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise PluginError(
                f"--batch_size: must be a whole number over 0, got {batch_size!r}; `auto` is not known here"
            )
        if device is None and torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        self.thinker = coatkit.load(Path(str(run)), trained=not untrained, step=step, device=device)
        self.batch_size, self.max_new_tokens, self.crop, self.bad = int(batch_size), max_new_tokens, crop, bad
        self._said: set[str] = set()
        logger.info(f"{self.thinker.name}, step {self.thinker.step}")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.thinker.backbone.model.parameters()).device
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the requests' order.

        Raises:
            DataError: If a sound cannot be read or heard, unless `bad=empty`; names task and document.
        """
        groups: dict[tuple[str, How], list[int]] = {}
        for place, one in enumerate(requests):
            _, kwargs, _, _, task, _ = one.args
            found, unused = how(kwargs, self.max_new_tokens)
            if unused:
                given = ", ".join(f"{key}={value}" for key, value in unused.items())
                self._say(f"{task}: answers are decoded greedily; not used: {given}")
            groups.setdefault((task, found), []).append(place)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="coatkit") as bar:
            for (task, found), places in groups.items():
                self._answer(task, found, places, requests, answers, bar)
        return answers

    def _answer(
        self, task: str, found: How, places: Sequence[int], requests: Sequence[Any], answers: list[str], bar: Any
    ) -> None:
        """Answer one task's requests into `answers`."""
        cut = bad = 0
        for at in range(0, len(places), WINDOW * self.batch_size):
            window = places[at : at + WINDOW * self.batch_size]
            ready: list[Request] = []
            for place in window:
                try:
                    one, shortened = self._read(place, requests[place])
                except DataError as error:
                    bad += self._refuse(error)
                    bar.update(1)
                else:
                    ready.append(one)
                    cut += shortened
            for part in batches(ready, self.batch_size):
                said, refused = self._ask(part, found)
                bad += refused
                for one, answer in zip(part, said, strict=True):
                    answers[one.place] = found.cut(answer)
                bar.update(len(part))
        if cut:
            logger.warning(f"{task}: {cut} sound(s) were cut to their first {self.crop:g} s")
        if bad:
            logger.warning(f"{task}: {bad} of {len(places)} questions had a bad sound; their answer is empty")

    def _read(self, place: int, one: Any) -> tuple[Request, int]:
        text, _, doc_to_visual, doc_id, task, split = one.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return request(place, text, visuals, f"{task}, document {doc_id}", self.crop)

    def _ask(self, part: Sequence[Request], found: How) -> tuple[list[str], int]:
        """Answers to a batch, and how many of its sounds cannot be heard."""
        try:
            return self.thinker.answer([one.row for one in part], max_new_tokens=found.max_new_tokens), 0
        except DataError as error:
            if len(part) == 1:
                return [""], self._refuse(error)
            if self.bad == "refuse":
                raise
        each = [self._ask([one], found) for one in part]  # one of them is bad: find out which
        return [said[0] for said, _ in each], sum(refused for _, refused in each)

    def _refuse(self, error: DataError) -> int:
        if self.bad == "refuse":
            raise error
        self._say(f"bad sound, first: {error}", "bad sound")
        return 1

    def _say(self, message: str, topic: str | None = None) -> None:
        """A warning, once."""
        if (topic or message) not in self._said and self.rank == 0:
            self._said.add(topic or message)
            logger.warning(message)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: coatkit answers in text.

        Raises:
            CoatkitError: Always.
        """
        raise CoatkitError(
            "coatkit answers in text: a task with output_type loglikelihood or multiple_choice cannot be asked;"
            " take one with generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            CoatkitError: Always.
        """
        raise CoatkitError(
            "tasks of several rounds (generate_until_multi_round) cannot be asked; no task of sounds is one"
        )
