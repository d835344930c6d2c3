"""A component in a new interpreter: what its entry module imports, and whether it is the same component there.

This module imports no torch: the child looks at what the plugin brings in.
"""

from __future__ import annotations

import importlib
import json
import os
import site
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coatkit.testing.guard import Watch, environment, guarded

HEAVY = ("torch", "transformers", "tensorflow", "jax", "onnxruntime", "librosa")
"""What listing plugins and checking a spec must not import."""
_TIMEOUT = 300.0
"""Seconds; a child that waits for ever is a hanging test."""


@dataclass
class Found:
    """What the child saw.

    Attributes:
        heavy: Module of the plugin to the heavy packages its import brought in.
        fingerprint: The component's; empty where it was not loaded.
        frames: Frames, or audio tokens, of half a second of sound.
        error: Why the child could not finish; empty where it did.
    """

    heavy: dict[str, list[str]] = field(default_factory=dict)
    fingerprint: str = ""
    frames: int = 0
    error: str = ""
    network: list[str] = field(default_factory=list)
    home: list[str] = field(default_factory=list)


def look(
    light: Sequence[str],
    use: str,
    options: Mapping[str, Any] | None,
    threads: int,
    folder: Path,
    kind: str = "expert",
) -> Found:
    """Start the child and wait for it.

    Args:
        light: Modules that must import nothing heavy, in order: the plugin's entry module and its options module.
        use: What a spec's `use` takes.
        options: The component's options; None where it must not be loaded, as an expert that needs a backbone.
        threads: Threads torch may use there, as many as here: sums in another order round otherwise, so the weights
            that an initialiser computes may differ in their last bits.
        folder: An empty folder for the child's home and its answer.
        kind: `expert` or `backbone`.
    """
    home, answer = folder / "home", folder / "answer.json"
    home.mkdir(parents=True)
    asked = {"light": list(light), "use": use, "options": options, "threads": threads, "kind": kind}
    asked |= {"home": str(home), "answer": str(answer)}
    code = (
        "import json, sys\n"
        "asked = json.loads(sys.argv[1])\n"
        "sys.path[:] = asked.pop('path')\n"
        "from coatkit.testing import fresh\n"
        "fresh.child(**asked)\n"
    )
    given = json.dumps({**asked, "path": [os.path.abspath(p) if p else os.getcwd() for p in sys.path]}, default=str)
    # With another home, Python would no longer find what was installed with `pip install --user`.
    env = {**os.environ, **environment(home), "PYTHONUSERBASE": site.getuserbase()}
    env.pop("XDG_CACHE_HOME", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, given], env=env, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Found(error=f"it did not end within {_TIMEOUT:g} s")
    if not answer.is_file():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Found(error=f"Python ended with status {done.returncode}: {last}")
    return Found(**json.loads(answer.read_text()))


def child(
    light: list[str], use: str, options: dict[str, Any] | None, threads: int, kind: str, home: str, answer: str
) -> None:
    """Runs in the new interpreter."""
    found, watch = Found(), Watch(kind)
    try:
        with guarded(watch, Path(home)):
            for name in light:
                seen = set(sys.modules)
                importlib.import_module(name)
                found.heavy[name] = [heavy for heavy in HEAVY if heavy in set(sys.modules) - seen]
        if options is not None:
            load = _load_backbone if kind == "backbone" else _load_expert
            load(use, options, threads, Path(home), watch, found)
    except BaseException as error:  # SystemExit too: the parent wants to know
        place = traceback.extract_tb(error.__traceback__)[-1]
        found.error = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    found.network, found.home = watch.network, watch.home
    Path(answer).write_text(json.dumps(asdict(found)))


def _load_expert(use: str, options: dict[str, Any], threads: int, home: Path, watch: Watch, found: Found) -> None:
    import torch

    from coatkit.infer import load_expert
    from coatkit.plugins import registry
    from coatkit.protocols import AudioBatch
    from coatkit.testing.sounds import tone

    torch.set_num_threads(threads)
    registry()  # other plugins are imported here: what they do is not this one's fault
    with guarded(watch, home), torch.no_grad():
        expert = load_expert(use, **options)
        found.fingerprint = expert.fingerprint()
        audio = AudioBatch.from_arrays([tone(0.5, expert.sample_rate)], expert.sample_rate)
        found.frames = int(expert.encode(audio).lengths[0])


def _load_backbone(use: str, options: dict[str, Any], threads: int, home: Path, watch: Watch, found: Found) -> None:
    import torch

    from coatkit.data.rows import AUDIO_TAG, AudioRef, Message, Row
    from coatkit.infer import load_backbone
    from coatkit.plugins import registry
    from coatkit.protocols import AudioBatch
    from coatkit.testing.sounds import tone

    torch.set_num_threads(threads)
    registry()
    with guarded(watch, home), torch.no_grad():
        backbone = load_backbone(use, device="cpu", **options)
        found.fingerprint = backbone.fingerprint()
        rate = backbone.preparer.sample_rate
        messages = (Message("user", f"{AUDIO_TAG}What is heard?"), Message("assistant", "A tone."))
        row = Row("sound", messages, (AudioRef(Path("sound.wav")),))
        inputs = backbone.preparer.prepare([row], AudioBatch.from_arrays([tone(0.5, rate)], rate), train=True)
        heard = backbone.forward(inputs).audio
        found.frames = 0 if heard is None else int(heard.lengths[0])
