"""Reading the thinker, its tokenizer and its feature extractor from a model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor

from coatkit import AssetError
from coatkit.backbones import whisper
from coatkit.backbones.folder import read, read_model
from coatkit_backbone_qwen2_5_omni.preparer import AUDIO, MARKUP

# Of the published preprocessor_config.json, beside the feature extractor's own fields.
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12_845_056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "temporal_patch_size": 2,
}
END, PAD = "<|im_end|>", "<|endoftext|>"
_REMEDY = "  Give a complete Qwen2.5-Omni folder as `weights`, or fetch the default again."


def read_parts(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Model, tokenizer and feature extractor of a folder that holds the whole of Qwen2.5-Omni, or its thinker alone.

    Of the whole, `thinker.*` is read strictly and `talker.*` and `token2wav.*`, which speak, are left in the file.

    Raises:
        AssetError: If a file is missing or damaged, or its parts do not fit each other; says which.
    """
    tokenizer, extractor = read(AutoTokenizer, folder), read(WhisperFeatureExtractor, folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processors_template(folder)
    model = read_model(Qwen2_5OmniThinkerForConditionalGeneration, folder, dtype)
    _check(folder, model.config, tokenizer, extractor)
    return model, tokenizer, extractor


def image_tensors(folder: Path) -> dict[str, Tensor]:
    """The image encoder of a folder, whose file names it `thinker.visual.*` or `visual.*`, by the former names."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if (bare := name.removeprefix("thinker.")).startswith("visual."):
                    found[f"thinker.{bare}"] = tensors.get_tensor(name)
    return found


def complete_processor(folder: Path, source: Path | None) -> None:
    """Add to a written tokenizer and feature extractor what the stock processor wants for images and videos.

    Args:
        folder: Holds `preprocessor_config.json`.
        source: The folder the model came from; the published settings when there is none.
    """
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    before = IMAGES
    if source is not None:
        before = json.loads((source / path.name).read_text(encoding="utf-8"))
        for name in ("processor_config.json", "video_preprocessor_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    path.write_text(json.dumps({**before, **settings}, indent=2) + "\n", encoding="utf-8")


def _processors_template(folder: Path) -> str:
    """The chat template that older processors keep in a file of its own, which tokenizers do not read."""
    path = folder / "chat_template.json"
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(
            f"{folder}: there is no chat template: neither its tokenizer nor {path.name} has one.\n{_REMEDY}"
        ) from error
    return str(template)


def _check(folder: Path, config: Any, tokenizer: Any, extractor: Any) -> None:
    """Check that tokenizer, chat template and feature extractor are this model's, and let `<|im_end|>` end an answer.

    Raises:
        AssetError: If they are not; says which.
    """
    known = tokenizer.get_vocab()
    if absent := [token for token in (AUDIO, END, PAD) if token not in known]:
        raise AssetError(f"{folder}: its tokenizer has no {', '.join(absent)}.\n{_REMEDY}")
    if known[AUDIO] != config.audio_token_id:
        raise AssetError(
            f"{folder}: {AUDIO} is token {known[AUDIO]} in its tokenizer and audio_token_index {config.audio_token_id}"
            f" in its config.json.\n{_REMEDY}"
        )
    mels, bins = extractor.feature_size, config.audio_config.num_mel_bins
    if (mels, extractor.sampling_rate, extractor.hop_length) != (bins, 16_000, whisper.HOP):
        raise AssetError(
            f"{folder}: its feature extractor gives {mels} mel bins of {extractor.sampling_rate} Hz audio, every"
            f" {extractor.hop_length} samples; the model hears {bins} bins of 16000 Hz, every {whisper.HOP}.\n{_REMEDY}"
        )
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": f"{MARKUP}What?"}], tokenize=False)
    except Exception as error:  # a damaged template can fail in any way
        raise AssetError(f"{folder}: its chat template cannot be used: {error}.\n{_REMEDY}") from error
    if text.count(f"{MARKUP}What?") != 1 or not text.rstrip().endswith(END):
        raise AssetError(f"{folder}: its chat template does not write a message and end it in {END}.\n{_REMEDY}")
    tokenizer.eos_token, tokenizer.pad_token = END, PAD
