"""Write small files in the formats of lhotse and `datasets`, with these libraries: python write.py FOLDER.

It runs in an environment that has them (`make test-formats`) and needs nothing of coatkit. The files kept in
tests/data/formats come from it too.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.table import embed_table_storage
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

RATE = 8_000
SECONDS = {"low": 0.50, "high": 0.20, "both": 0.25}


def sounds() -> None:
    """A low tone, a high one, and both in two channels."""
    Path("sounds").mkdir()
    for name, hertz in {"low": [220], "high": [880], "both": [220, 880]}.items():
        time = np.arange(round(SECONDS[name] * RATE)) / RATE
        waves = [0.3 * np.sin(2 * np.pi * one * time) for one in hertz]
        soundfile.write(f"sounds/{name}.flac", np.stack(waves, 1), RATE)


def lhotse() -> None:
    Path("lhotse").mkdir()
    low, both = (Recording.from_file(f"sounds/{name}.flac") for name in ("low", "both"))
    for recording in (low, both):
        recording.sources[0].source = f"../{recording.sources[0].source}"
    said = [
        SupervisionSegment("low-2", "low", 0.3, 0.1, text="tone", language="en", speaker="s1", gender="F"),
        SupervisionSegment("low-1", "low", 0.0, 0.25, text="a low", language="en", custom={"clear": True}),
    ]
    cut = MonoCut("low", 0.0, 0.45, 0, supervisions=said, recording=low)
    asked = MultiCut("both", 0.05, 0.2, [0, 1], recording=both)
    asked.custom = {"question": "How many tones?", "answer": "Two.", "task": "count"}
    cuts = CutSet.from_cuts([cut, asked])
    cuts.to_file("lhotse/cuts.jsonl")
    cuts.to_file("lhotse/cuts.jsonl.gz")
    url = Recording("far", [AudioSource("url", [0], "https://example.com/a.wav")], RATE, 4000, 0.25, [0])
    odd = {
        "appended": cut.append(cut, preserve_id="left"),
        "padded": cut.pad(1.0, preserve_id=True),
        "faster": cut.perturb_speed(1.1, affix_id=False),
        "channel": MonoCut("channel", 0.0, 0.25, 1, supervisions=said, recording=both),
        "url": MonoCut("url", 0.0, 0.25, 0, supervisions=said, recording=url),
        "outside": cut.truncate(duration=0.1),
        "silent": MonoCut("silent", 0.0, 0.25, 0, recording=low),
    }
    CutSet.from_cuts(one.with_id(name) for name, one in odd.items()).to_file("lhotse/odd.jsonl")
    CutSet.from_cuts([cut.resample(16_000)]).to_file("lhotse/resampled.jsonl")


def datasets() -> None:
    path = {name: str(Path(f"sounds/{name}.flac").resolve()) for name in SECONDS}
    heard = Audio(decode=False)  # strings are cast to it below: encoding them needs torchcodec
    spoken = Dataset.from_dict(
        {
            "audio": [path["low"], path["high"], path["both"]],
            "text": ["a low tone", "a high tone", "both"],
            "locale": ["en", "en", "de"],
            "kind": [0, 0, 1],
        },
        features=Features(
            audio=Value("string"), text=Value("string"), locale=Value("string"), kind=ClassLabel(names=["one", "two"])
        ),
    ).cast_column("audio", heard)
    turns = List({"role": Value("string"), "content": Value("string")})
    talks = Dataset.from_dict(
        {
            "audios": [[path["low"], path["high"]], [path["both"]], []],
            "messages": [
                [
                    {"role": "user", "content": "<audio>How high?"},
                    {"role": "assistant", "content": "Low."},
                    {"role": "user", "content": "And <audio>?"},
                    {"role": "assistant", "content": "High."},
                ],
                [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}],
                [{"role": "user", "content": "1 plus 1?"}, {"role": "assistant", "content": "2"}],
            ],
        },
        features=Features(audios=List(Value("string")), messages=turns),
    ).cast_column("audios", List(heard))
    spoken.save_to_disk("datasets/spoken", num_shards=2)
    talks.save_to_disk("datasets/talks")
    words = spoken.select_columns(["text"])
    DatasetDict({"train": words.select([0]), "test": words.select([1])}).save_to_disk("datasets/splits")
    Path("parquet").mkdir()
    for name, rows in {"spoken": spoken, "talks": talks}.items():  # with the bytes in it, as push_to_hub writes it
        whole = rows.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
        whole.to_parquet(f"parquet/{name}.parquet", batch_size=2)
    beside = Dataset.from_dict({"audio": ["sounds/low.flac", None], "text": ["a low tone", "nothing"]})
    beside.cast_column("audio", heard).to_parquet("beside.parquet")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    sounds()
    lhotse()
    datasets()
    Path("versions.json").write_text(json.dumps({name: version(name) for name in ("lhotse", "datasets", "pyarrow")}))
