"""First step: fit the projector without the language model, so that frames come to stand for the words that are said.

    python align.py --data data --epochs 20

The tower's output is computed once and kept (OUT/tower.safetensors). The projector's output is then compared with the
language model's own input embeddings, which stay as they are:

- speech: CTC over the tokens of the transcript. The score of a token is minus half the squared distance from frame to
  embedding, so frames move to where the language model expects that token. A space is the blank.
- what a clip is (its kind, voice, instrument, pitch, sound): the mean over its frames, scored in the same way against
  the embeddings of the words of a closed set, such as low, middle, high.

An epoch takes a minute on one thread. Writes the projector after each; --resume goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
from music import INSTRUMENTS, NAMES, SOUNDS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import coatkit
from coatkit import AudioBatch

HERE = Path(__file__).parent
BATCH = 48
SHARPNESS = 2.0
"""Nats by which a score changes per half a squared distance; the larger, the nearer to the embeddings frames settle."""
SETS: dict[str, tuple[str, ...]] = {
    "kind": ("speech", "music", "noise"),
    "gender": ("man", "woman"),
    "instrument": tuple(sorted(INSTRUMENTS)),
    "height": ("low", "middle", "high"),
    "note": NAMES,
    "direction": ("up", "down"),
    "sound": SOUNDS,
}
"""What may be asked of a clip as a whole, and its possible answers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, help="folder of the results; --data unless given")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out or arguments.data
    out.mkdir(parents=True, exist_ok=True)
    clips = [describe(json.loads(line)) for line in (arguments.data / "clips.jsonl").open(encoding="utf-8")]
    backbone = coatkit.load_backbone("mini", thinking=None, projector="random", train={"lm": "none", "tokens": "none"})
    towers = tower_outputs(backbone, arguments.data, clips)
    words = Words(backbone, clips)
    projector = backbone.projector.requires_grad_(True)
    first = 0
    if arguments.resume:
        projector.load_state_dict(load_file(out / "projector.safetensors"))
        first = json.loads((out / "align.json").read_text())["epoch"]
    fit(projector, words, towers, clips, first, arguments.epochs, arguments.rate, out)


def describe(clip: dict[str, Any]) -> dict[str, Any]:
    """A clip with the answers that follow from what is known of it."""
    if "key" in clip:
        key = clip["key"]
        clip |= {"height": "low" if key < 55 else "middle" if key < 67 else "high", "note": NAMES[key % 12]}
    return clip


def tower_outputs(backbone: Any, data: Path, clips: list[dict[str, Any]]) -> list[Tensor]:
    """The tower's output of every clip, [frames, 384] in half precision; kept in a file beside the clips."""
    kept = data / "tower.safetensors"
    if not kept.exists():
        print(f"listening to {len(clips)} clips ...", flush=True)
        order = sorted(range(len(clips)), key=lambda i: clips[i]["seconds"])
        found: dict[str, Tensor] = {}
        for at in range(0, len(order), 32):
            chosen = order[at : at + 32]
            sounds = [soundfile.read(data / clips[i]["audio"], dtype="float32")[0] for i in chosen]
            frames, counts = heard(backbone, sounds)
            for i, part in zip(chosen, frames.split(counts), strict=True):
                found[clips[i]["audio"]] = part.half()
        save_file(found, kept)
    stored = load_file(kept)
    return [stored[clip["audio"]] for clip in clips]


def heard(backbone: Any, sounds: list[Any]) -> tuple[Tensor, list[int]]:
    features, counts = backbone.preparer.audio_features(AudioBatch.from_arrays(sounds, 16_000))
    with torch.no_grad():
        output = backbone.tower(**features).last_hidden_state
    return backbone.tower_frames(output, features), counts


class Words:
    """The language model's input embeddings of what is said and of the closed sets.

    Args:
        backbone: The loaded backbone; nothing in it is changed.
        clips: All clips; the tokens of every transcript are kept.
    """

    def __init__(self, backbone: Any, clips: list[dict[str, Any]]) -> None:
        tokenizer = backbone.preparer.tokenizer
        table = backbone.stock.get_input_embeddings().weight.detach()
        space = tokenizer.encode(" ", add_special_tokens=False)
        assert len(space) == 1
        spoken = [tokenizer.encode(" " + c["text"], add_special_tokens=False) if "text" in c else [] for c in clips]
        self.ids = space + sorted({token for ids in spoken for token in ids} - set(space))
        place = {token: number for number, token in enumerate(self.ids)}
        self.targets = [torch.tensor([place[token] for token in ids], dtype=torch.long) for ids in spoken]
        self.rows = table[self.ids]
        self.names = [tokenizer.decode([token]) for token in self.ids]
        self.sets = {
            name: torch.stack([table[tokenizer.encode(f" {w}", add_special_tokens=False)].mean(0) for w in answers])
            for name, answers in SETS.items()
        }
        self.centre = table.mean(0)
        self.norm = float((table - self.centre).norm(dim=1).mean())


def score(x: Tensor, rows: Tensor) -> Tensor:
    """Minus the squared distances of x [..., d] and rows [n, d], times SHARPNESS / 2, but for what all rows share."""
    return SHARPNESS * (x @ rows.T - 0.5 * rows.square().sum(1))


def batches(clips: list[dict[str, Any]], split: str, draw: torch.Generator | None) -> list[list[int]]:
    """Numbers of clips of like length together; in random order with `draw`."""
    numbers = [i for i, clip in enumerate(clips) if clip["split"] == split]
    jitter = torch.rand(len(clips), generator=draw) * 0.3 if draw else torch.zeros(len(clips))
    numbers.sort(key=lambda i: clips[i]["seconds"] * (1 + float(jitter[i])))
    cut = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]
    return [cut[i] for i in torch.randperm(len(cut), generator=draw).tolist()] if draw else cut


def terms(
    projector: nn.Module, words: Words, towers: list[Tensor], clips: list[dict[str, Any]], chosen: list[int]
) -> tuple[dict[str, Tensor], dict[str, list[tuple[bool, str]]]]:
    """Losses of a batch by name, and for each name which clips were read rightly, with their split's group."""
    lengths = torch.tensor([len(towers[i]) for i in chosen])
    projected = projector(torch.cat([towers[i] for i in chosen]).float())
    parts = projected.split(lengths.tolist())
    losses: dict[str, Tensor] = {}
    right: dict[str, list[tuple[bool, str]]] = {}
    spoken = [n for n, i in enumerate(chosen) if len(words.targets[i])]
    if spoken:
        padded = nn.utils.rnn.pad_sequence([parts[n] for n in spoken])
        logits = score(padded, words.rows).log_softmax(-1)
        targets = [words.targets[chosen[n]] for n in spoken]
        counts = torch.tensor([len(t) for t in targets])
        losses["ctc"] = (
            functional.ctc_loss(
                logits, torch.cat(targets), lengths[spoken], counts, blank=0, zero_infinity=True, reduction="sum"
            )
            / counts.sum()
        )
        best = logits.argmax(-1)
        for column, n in enumerate(spoken):
            read = torch.unique_consecutive(best[: lengths[n], column])
            same = read[read != 0].tolist() == targets[column].tolist()
            right.setdefault("text", []).append((same, clips[chosen[n]]["voice"]))
    means = torch.stack([part.mean(0) for part in parts])
    for name, answers in SETS.items():
        known = [n for n, i in enumerate(chosen) if name in clips[i]]
        if known:
            truth = torch.tensor([answers.index(clips[chosen[n]][name]) for n in known])
            scores = score(means[known], words.sets[name])
            losses[name] = functional.cross_entropy(scores, truth)
            right[name] = [(bool(hit), "") for hit in scores.argmax(-1) == truth]
    # Nothing above holds the length of a frame, since only differences of scores count: keep it that of the text's.
    losses["length"] = ((projected - words.centre).norm(dim=1) / words.norm - 1).square().mean()
    return losses, right


def fit(
    projector: nn.Module,
    words: Words,
    towers: list[Tensor],
    clips: list[dict[str, Any]],
    first: int,
    epochs: int,
    rate: float,
    out: Path,
) -> None:
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.01)
    learnt_from = sum(clip["split"] == "train" for clip in clips)
    print(f"{len(words.ids)} tokens are said; {learnt_from} clips to learn from", flush=True)
    for epoch in range(first, epochs):
        begun = time.time()
        optimizer.param_groups[0]["lr"] = rate * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * epoch / epochs)))
        sums: dict[str, list[float]] = {}
        for chosen in batches(clips, "train", torch.Generator().manual_seed(epoch)):
            losses, _ = terms(projector, words, towers, clips, chosen)
            total = sum((1.0 if name == "ctc" else 2.0 if name == "length" else 0.3) * x for name, x in losses.items())
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
            for name, x in losses.items():
                sums.setdefault(name, []).append(float(x.detach()))
        means = {name: round(sum(xs) / len(xs), 3) for name, xs in sums.items()}
        accuracy = held_out(projector, words, towers, clips)
        print(f"epoch {epoch + 1}, {time.time() - begun:.0f} s: {means}\n   held out: {accuracy}", flush=True)
        tensors = {name: x.detach().contiguous() for name, x in projector.state_dict().items()}
        save_file(tensors, out / "new.safetensors")
        (out / "new.safetensors").replace(out / "projector.safetensors")
        state = {"epoch": epoch + 1, "losses": means, "heldout": accuracy}
        (out / "align.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def held_out(projector: nn.Module, words: Words, towers: list[Tensor], clips: list[dict[str, Any]]) -> dict[str, str]:
    """Right readings of held-out clips, as a fraction, by what is read; text also by voice."""
    counts: dict[str, list[bool]] = {}
    with torch.no_grad():
        for chosen in batches(clips, "heldout", None):
            for name, hits in terms(projector, words, towers, clips, chosen)[1].items():
                for hit, group in hits:
                    counts.setdefault(f"{name} {group}".strip(), []).append(hit)
    return {name: f"{sum(hits) / len(hits):.2f} of {len(hits)}" for name, hits in sorted(counts.items())}


if __name__ == "__main__":
    main()
