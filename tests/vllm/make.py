"""Exports of tiny runs, and what transformers answers: the models and the right answers of `make test-vllm`.

    python tests/vllm/make.py WORK

Runs where coatkit is installed. For each backbone, WORK/NAME holds `model` (coatkit export --merge), sounds, and
cases.json: prompt, answer and first log-probabilities as coatkit's own backbone gives them with transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
import yaml

import coatkit
from coatkit.backbones.folder import transformers_quiet
from coatkit.data.rows import AudioRef, Message, Row
from coatkit.export.write import export
from coatkit.spec_file import load_spec
from coatkit.trainer import train

RATE = 16_000
BACKBONES = {"mini": 1, "audio-flamingo-3": 1, "qwen2-audio": 3, "qwen2.5-omni": 3}
"""Backbone to the sounds that vLLM takes in one request."""
LENGTHS = (0.4, 1.3, 4.0, 9.7)
LONG = 33.3
NEW = 24


def sound(seconds: float, seed: int) -> np.ndarray:
    """A tone over noise, mono float32 at 16 kHz."""
    random = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * seed) * t)
    return (tone + 0.05 * random.standard_normal(t.size)).astype(np.float32)


def trained(use: str, folder: Path, placement: str) -> Path:
    """A run of a tiny backbone that has learnt four answers, so that greedy answers are more than noise."""
    folder.mkdir(parents=True)
    rows = []
    for number, seconds in enumerate(LENGTHS):
        soundfile.write(folder / f"{number}.wav", sound(seconds, number), RATE, subtype="FLOAT")
        talk = [
            {"role": "user", "content": "<audio>What is heard?"},
            {"role": "assistant", "content": f"it is number {number}"},
        ]
        rows.append(json.dumps({"messages": talk, "audio": f"{number}.wav"}) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    spec = {
        "name": use,
        "seed": 3,
        "backbone": {"use": use, "weights": "random", "lora": {"rank": 4, "alpha": 8}},
        "thinking": {"placement": placement},
        "experts": {"audio": {}},
        "head": {"use": "linear"},
        "data": {"train": "train.jsonl"},
        "stages": [{"name": "one", "steps": 60, "lr": 1e-2, "batch": {"rows": 4}, "weights": {"audio": 0.1}}],
        "output": "run",
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return train(load_spec(folder / "spec.yaml")).folder


def cases(use: str, folder: Path) -> list[tuple[str, list[str], list[Message]]]:
    """Name, sounds and conversation of each request."""
    soundfile.write(folder / "long.wav", sound(LONG, 7), RATE, subtype="FLOAT")
    ask = [Message("user", "<audio>What is heard?")]
    found = [(f"{seconds:g} s", [f"{number}.wav"], ask) for number, seconds in enumerate(LENGTHS)]
    if use != "qwen2-audio":
        found.append((f"{LONG:g} s", ["long.wav"], ask))
    found.append(("text only", [], [Message("user", "What is 1 plus 2?")]))
    turns = [*ask, Message("assistant", "a tone"), Message("user", "Are you sure?")]
    found.append(("a second question", ["1.wav"], turns))
    if BACKBONES[use] > 1:
        found.append(("two sounds", ["1.wav", "2.wav"], [Message("user", "<audio>First.<audio>Which is longer?")]))
        turns = [*ask, Message("assistant", "a tone"), Message("user", "<audio>And this?")]
        found.append(("two blocks", ["2.wav", "0.wav"], turns))
    return found


@torch.no_grad()
def answered(model: Any, name: str, files: list[Path], messages: list[Message]) -> dict[str, Any]:
    row = Row(name, tuple(messages), tuple(AudioRef(file) for file in files))
    inputs, backbone = model.prepare([row]), model.backbone
    with backbone._capturing():
        out = backbone.stock.generate(
            **inputs.tokens,
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=backbone.suppressed(),
            pad_token_id=backbone.preparer.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
    prompt = inputs.tokens["input_ids"][0].tolist()
    first = out.scores[0][0].log_softmax(-1).topk(3)
    return {
        "name": name,
        "sounds": [file.name for file in files],
        "messages": [{"role": m.role, "content": parts(m.content)} for m in messages],
        "prompt": prompt,
        "blocks": runs_of(prompt, backbone.preparer.tokens.think),
        "answer": out.sequences[0, len(prompt) :].tolist(),
        "first": dict(zip(map(str, first.indices.tolist()), first.values.tolist(), strict=True)),
    }


def parts(text: str) -> list[dict[str, str]]:
    first, *rest = text.split("<audio>")
    found = [{"type": "text", "text": first}]
    for after in rest:
        found += [{"type": "audio"}, {"type": "text", "text": after}]
    return [part for part in found if part.get("text") != ""]


def runs_of(ids: list[int], token: int) -> list[int]:
    """Lengths of the runs of a token."""
    found, run = [], 0
    for one in [*ids, None]:
        if one == token:
            run += 1
        elif run:
            found.append(run)
            run = 0
    return found


def main(work: Path) -> None:
    for use in BACKBONES:
        folder = work / use
        placement = "before_header" if use == "audio-flamingo-3" else "response_prefix"
        run = trained(use, folder, placement)
        export(run, folder / "model", merge=True)
        model = coatkit.load(run, device="cpu")
        with transformers_quiet():
            found = [answered(model, name, [folder / f for f in files], m) for name, files, m in cases(use, folder)]
        about = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": found}
        (folder / "cases.json").write_text(json.dumps(about))
        print(use, {case["name"]: len(case["answer"]) for case in found}, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
