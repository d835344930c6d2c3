"""A run as a folder for others: a PEFT adapter or a whole model, with the heads beside it and a card on top.

README.md            the model card: what it is, how to prompt it, what it was trained on
config.json, ...     with `merge`: the model, as the stock class of transformers loads it
adapter_config.json  without: a PEFT adapter and the three token rows, for the stock model
chat_template.jinja  writes the thinking block; takes `audio_think_len`
coatkit.json         the block's settings, and heads and experts by name
coatkit/             heads.safetensors, for analysis; answering needs none of them
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coatkit import __version__
from coatkit.backbones.hf import HFBackbone
from coatkit.errors import RunError
from coatkit.export.card import card, without_paths
from coatkit.files import let_read
from coatkit.infer import AudioThinker, load
from coatkit.thinking import TOKENS

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        files: (name, bytes) of each file.
        local_base: Folder that an adapter names as its base model, which others do not have; None otherwise.
    """

    folder: Path
    files: tuple[tuple[str, int], ...]
    local_base: str | None = None


def export(
    run: Path,
    to: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    step: int | None = None,
    base_model: str | None = None,
) -> Exported:
    """Write a run's model for plain transformers or peft.

    Args:
        run: The run folder.
        to: Folder to write; not there yet, or empty. It appears whole or not at all.
        merge: Put the adapters into the weights and write the whole model, not an adapter.
        dtype: Of the whole model's weights: `float32`, `bfloat16` or `float16`; that of training when left out.
        step: Of the checkpoint; the newest when left out.
        base_model: OWNER/NAME of the stock model on the hub, where the run had it from a folder: an adapter names its
            base, and others do not have that folder.

    Raises:
        RunError: If there is something at `to`, the run has no checkpoint, or its backbone is no transformers model.
        PluginError: If an adapter cannot hold what was trained.
    """
    to = to.absolute()
    if to == Path.cwd():
        raise RunError(f"{to}: is the folder this was started in; name another")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to}: is there already; name a folder that is not there yet, or is empty")
    model = load(run, step=step, device="cpu")
    backbone = model.backbone
    if not isinstance(backbone, HFBackbone):
        raise RunError(
            f"{run}: only transformers backbones (HFBackbone) can be exported, not {type(backbone).__name__}"
        )
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        facts = describe(model, merged=merge, base_model=base_model)
        if merge:
            backbone.save_merged(partial, DTYPES[dtype] if dtype else None)
        else:
            backbone.save_adapter(partial, base_model)
        _save_heads(model, partial)
        (partial / "coatkit.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        let_read(partial, partial / "coatkit.json")  # a server may be somebody else
        (partial / "README.md").write_text(card(model, facts), encoding="utf-8")
        if to.exists():
            to.rmdir()
        partial.rename(to)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{to}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted((str(f.relative_to(to)), f.stat().st_size) for f in to.rglob("*") if f.is_file())
    local = not merge and Path(facts["base_model"]).exists()
    return Exported(to, tuple(files), facts["base_model"] if local else None)


def describe(model: AudioThinker, *, merged: bool, base_model: str | None = None) -> dict[str, Any]:
    """What coatkit.json holds: all that is needed to lay out the block, and where the model came from."""
    assert model.run is not None
    assert isinstance(model.backbone, HFBackbone)
    spec, record = model.run.read_spec(), model.run.read_record()
    backbone, thinking = model.backbone, model.backbone.thinking
    base, revision = (base_model, None) if base_model else backbone.base_model()
    if merged:  # who has the whole model needs no base; an adapter must say where its own is
        base = without_paths(base)
    block = None
    if thinking is not None:
        block = {
            "start": TOKENS[0],
            "think": TOKENS[1],
            "end": TOKENS[2],
            "placement": thinking.placement,
            "tokens_per_audio_token": thinking.tokens_per_audio_token,
        }
    return {
        "format": FORMAT,
        "coatkit": __version__,
        "name": spec.get("name"),
        "backbone": without_paths(spec["backbone"]["use"]),
        "base_model": base,
        "base_revision": revision,
        "model_class": type(backbone.stock).__name__,
        "merged": merged,
        "step": model.step,
        "random_weights": record.get("random_weights", []),
        "audio": {
            "sample_rate": backbone.preparer.sample_rate,
            "token": backbone.preparer.tokenizer.convert_ids_to_tokens(backbone.preparer.audio_token),
            "markup": backbone.preparer.audio_markup,
            "tokens_per_second": backbone.preparer.frame_rate,
        },
        "thinking": block,
        "suppress_tokens": backbone.suppressed(),
        "heads": {
            name: record["experts"][name]
            | without_paths({k: entry[k] for k in ("use", "head", "target") if k in entry})
            for name, entry in (spec.get("experts") or {}).items()
            if name in record["experts"]
        },
    }


def _save_heads(model: AudioThinker, folder: Path) -> None:
    assert model.checkpoint is not None
    tensors = load_file(model.checkpoint / "model.safetensors")
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}
    if heads:
        # In a folder of its own: servers read every safetensors file beside config.json as the model's.
        (folder / "coatkit").mkdir()
        save_file(heads, folder / "coatkit/heads.safetensors", metadata={"format": "pt"})
