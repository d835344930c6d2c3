"""What a projector carries, read without any language model: nearest embeddings of frames, on held-out clips.

    python reading.py data/projector.safetensors --data data

For speech, tokens by the best CTC path: the error rate in tokens (inserted, deleted and changed, over those said), by
voice and by what was said. For the closed sets of align.py, the word nearest to the mean over frames. Each figure has a
95 % bootstrap interval over clips, and the same with answers exchanged between clips: what needs no hearing.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import torch
from align import BATCH, SETS, Words, describe, score, tower_outputs
from safetensors.torch import load_file
from texts import COMMANDS, PLACES, WORDS
from torch import Tensor

import coatkit

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projector", type=Path)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    arguments = parser.parse_args()
    clips = [describe(json.loads(line)) for line in (arguments.data / "clips.jsonl").open(encoding="utf-8")]
    backbone = coatkit.load_backbone("mini", thinking=None, projector="random", train={"lm": "none", "tokens": "none"})
    projector = backbone.projector
    projector.load_state_dict({name: x.float() for name, x in load_file(arguments.projector).items()})
    towers, words = tower_outputs(backbone, arguments.data, clips), Words(backbone, clips)
    kept = [i for i, clip in enumerate(clips) if clip["split"] == "heldout"]
    frames: dict[int, Tensor] = {}
    with torch.no_grad():
        for at in range(0, len(kept), BATCH):
            chosen = kept[at : at + BATCH]
            projected = projector(torch.cat([towers[i] for i in chosen]).float())
            frames.update(zip(chosen, projected.split([len(towers[i]) for i in chosen]), strict=True))
    speech(words, clips, frames)
    print()
    closed_sets(words, clips, frames)


def speech(words: Words, clips: list[dict[str, Any]], frames: dict[int, Tensor]) -> None:
    """Print token error rates."""
    groups: dict[str, list[int]] = {}
    for i in frames:
        if "text" in clips[i]:
            groups.setdefault(clips[i]["voice"], []).append(i)
            if not clips[i]["voice"].startswith("human"):
                groups.setdefault(f"all synthetic voices: {said(clips[i]['text'])}", []).append(i)
    print(f"{'speech':42}{'clips':>6}{'errors':>8}{'95 % interval':>16}{'exchanged':>11}{'all right':>11}")
    for name, members in sorted(groups.items()):
        read = []
        for i in members:
            path = torch.unique_consecutive(score(frames[i], words.rows).argmax(-1))
            read.append([token for token in path.tolist() if token])
        told = [words.targets[i].tolist() for i in members]
        wrong = numpy.array([distance(a, b) for a, b in zip(read, told, strict=True)])
        lengths = numpy.array([len(t) for t in told])
        deaf = sum(distance(a, b) for a, b in zip(read, told[1:] + told[:1], strict=True))
        draws = numpy.random.default_rng(0).integers(0, len(members), (2000, len(members)))
        low, high = 100 * numpy.quantile(wrong[draws].sum(1) / lengths[draws].sum(1), [0.025, 0.975])
        rate, without = 100 * wrong.sum() / lengths.sum(), 100 * deaf / lengths.sum()
        exact = 100 * (wrong == 0).mean()
        print(f"{name:42}{len(members):6}{rate:8.1f}{f'{low:.1f} to {high:.1f}':>16}{without:11.1f}{exact:11.1f}")


def said(text: str) -> str:
    if len(text.split()) == 1:
        return "single words" if text in WORDS else "other words"
    known = set(WORDS) | {word for command in COMMANDS for word in command.split()}
    known |= {word + "s" for word in WORDS} | {"the", "a", "is", "my", "and", "mice", *PLACES}
    return "sentences" if set(text.split()) <= known else "rows of common words"


def distance(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and changes between two rows of tokens."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def closed_sets(words: Words, clips: list[dict[str, Any]], frames: dict[int, Tensor]) -> None:
    """Print shares of right words."""
    titles = ("right", "95 % interval", "exchanged", "commonest", "chance")
    print(f"{'set':12}{'clips':>6}{titles[0]:>8}{titles[1]:>16}{titles[2]:>11}{titles[3]:>11}{titles[4]:>8}")
    for name, answers in SETS.items():
        members = [i for i in frames if name in clips[i]]
        truth = [clips[i][name] for i in members]
        found = [answers[int(score(frames[i].mean(0), words.sets[name]).argmax())] for i in members]
        right = numpy.array([a == b for a, b in zip(found, truth, strict=True)])
        order = numpy.random.default_rng(0).permutation(len(members))
        deaf = numpy.mean([found[a] == truth[b] for a, b in zip(order, numpy.roll(order, 1), strict=True)])
        draws = numpy.random.default_rng(0).integers(0, len(members), (2000, len(members)))
        low, high = 100 * numpy.quantile(right[draws].mean(1), [0.025, 0.975])
        commonest = Counter(truth).most_common(1)[0][1] / len(members)
        print(
            f"{name:12}{len(members):6}{100 * right.mean():8.1f}{f'{low:.1f} to {high:.1f}':>16}"
            f"{100 * deaf:11.1f}{100 * commonest:11.1f}{100 / len(answers):8.1f}"
        )


if __name__ == "__main__":
    main()
