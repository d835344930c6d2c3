"""Ask the trained and the untrained model about sounds neither was trained on, and print their answers side by side.

    python compare.py RUN HELDOUT.jsonl

An answer counts when it equals the reference, capitals and punctuation apart. Exits with 1 if training did not help.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import coatkit
from coatkit import AUDIO_TAG, JsonlRows, Row
from coatkit.evaluation.text import plain

BATCH = 8


def answers(run: Path, rows: list[Row], trained: bool) -> list[str]:
    model = coatkit.load(run, trained=trained)
    # Sounds of like length are asked about together: less padding.
    order = sorted(range(len(rows)), key=lambda i: rows[i].audios[0].end or 0)
    found: dict[int, str] = {}
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        found.update(zip(chosen, model.answer([rows[i] for i in chosen], max_new_tokens=20), strict=True))
    return [found[i] for i in range(len(rows))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("heldout", type=Path)
    arguments = parser.parse_args()
    rows = list(JsonlRows(arguments.heldout))
    sounds = len({row.audios[0].path for row in rows})
    print(f"\nAsking {len(rows)} questions about {sounds} sounds that were kept out of training ...\n", flush=True)
    before, after = (answers(arguments.run, rows, trained) for trained in (False, True))
    commonest = common_answers(arguments.heldout.with_name("train.jsonl"))
    guessed: Counter[str] = Counter()
    shown: set[tuple[str, str]] = set()
    asked: Counter[str] = Counter()
    right: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for row, old, new in zip(rows, before, after, strict=True):
        task, answer = row.labels["task"], row.messages[1].content
        asked[task] += 1
        for trained, said in ((False, old), (True, new)):
            right[trained][task] += plain(said) == plain(answer)
        guessed[task] += plain(commonest[task]) == plain(answer)
        if (task, answer) not in shown:
            shown.add((task, answer))
            print(f"{row.audios[0].path.name}: {row.messages[0].content.removeprefix(AUDIO_TAG)}")
            print(f"  untrained  {old.splitlines()[0][:90] if old else '(nothing)'}")
            print(f"  trained    {new}")
            print(f"  reference  {answer}\n")
    print(f"{'right answers':28}{'untrained':>12}{'guessing':>12}{'trained':>12}")
    columns = (right[False], guessed, right[True])
    for task, count in asked.items():
        print(f"{task:28}" + "".join(f"{f'{column[task]}/{count}':>12}" for column in columns))
    old, guess, new = (sum(column.values()) for column in columns)
    print(f"{'all':28}" + "".join(f"{f'{total}/{len(rows)}':>12}" for total in (old, guess, new)))
    print("\nguessing: always the answer most frequent in training, without listening")
    print(f"margin of the trained model: {100 * (new - old) / len(rows):+.0f} points over the untrained one,")
    print(f"{100 * (new - guess) / len(rows):+.0f} points over guessing\n")
    losses(arguments.run)
    example = rows[0]
    print(f"\nEverything is in {arguments.run}. Try next:")
    print(f'  .venv/bin/coatkit ask {arguments.run} {example.audios[0].path} "Is this speech, music or noise?"')
    print(f"  .venv/bin/tensorboard --logdir {arguments.run}/tensorboard")
    print("  .venv/bin/coatkit train examples/custom_expert/spec.yaml   # an expert of your own, in one file")
    return 0 if new > max(old, guess) else 1


def common_answers(train: Path) -> dict[str, str]:
    """The most frequent training answer of each task."""
    answers: dict[str, Counter[str]] = {}
    for row in JsonlRows(train):
        answers.setdefault(row.labels["task"], Counter())[row.messages[1].content] += 1
    return {task: counts.most_common(1)[0][0] for task, counts in answers.items()}


def losses(run: Path) -> None:
    """Mean of every loss term over the first and the last ten steps in which it was active."""
    terms: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if name == "ce" or "." in name:
                terms.setdefault(name, []).append(value)
    print(f"{'loss':28}{'first steps':>12}{'last steps':>12}")
    for name, values in terms.items():
        print(f"{name:28}{sum(values[:10]) / len(values[:10]):12.4f}{sum(values[-10:]) / len(values[-10:]):12.4f}")


if __name__ == "__main__":
    raise SystemExit(main())
