"""Join a language model and an audio encoder into one Audio Flamingo 3 folder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, GenerationConfig

from coatkit import AssetError
from coatkit.backbones.folder import transformers_quiet
from coatkit_backbone_mini.parts import Parts, feature_extractor
from coatkit_backbone_mini.projector import initial_projector
from coatkit_backbone_mini.tokens import SOUND, complete_tokenizer


def save_backbone(parts: Parts, folder: Path) -> None:
    """Write configuration, float32 weights, tokenizer and feature extractor of the joined model.

    The embedding rows of added tokens, input and output, are the mean of the existing rows, and the projector starts
    as `initial_projector` makes it: the same parts always give the same weights.

    Args:
        parts: What to join; its tokenizer is changed (it gets the added tokens).
        folder: Folder to write, made if missing.

    Raises:
        AssetError: If the weights do not fit their configurations.
    """
    tokenizer = parts.tokenizer
    known = len(tokenizer)
    complete_tokenizer(tokenizer)
    text_rows = parts.text_state["embed_tokens.weight"]
    if known > text_rows.shape[0]:
        raise AssetError(
            f"{parts.text_config.name_or_path or 'language model'}: {known} tokens but {text_rows.shape[0]} embeddings"
        )
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_state = parts.text_state | {"embed_tokens.weight": _with_added_rows(text_rows, known, len(tokenizer))}
    state = {f"model.language_model.{name}": value for name, value in text_state.items()}
    state["lm_head.weight"] = _with_added_rows(parts.output_rows, known, len(tokenizer))
    state |= {f"model.audio_tower.{name}": value for name, value in parts.audio_state.items()}
    projector = initial_projector(parts.audio_config.hidden_size, text_rows[:known])
    state |= {f"model.multi_modal_projector.{name}": value for name, value in projector.items()}

    text_config = copy.deepcopy(parts.text_config)
    text_config.update(
        {"vocab_size": state["lm_head.weight"].shape[0], "tie_word_embeddings": False, "dtype": "float32", **token_ids}
    )
    config = AudioFlamingo3Config(
        audio_config=parts.audio_config,
        text_config=text_config,
        audio_token_id=tokenizer.convert_tokens_to_ids(SOUND),
        dtype="float32",
    )
    # On the meta device the model costs no memory and no random numbers; the weights are then put in, not copied.
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise AssetError(
            f"the language model and the encoder do not fit the Audio Flamingo 3 layout: {error}"
        ) from error
    model.generation_config = GenerationConfig(**token_ids)

    # Under a launcher transformers writes in the first process alone, and which of them is here is a matter of chance.
    model.should_save_on_this_rank = lambda is_main_process: True
    with transformers_quiet():
        model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # which its writer alone may read, and a cache may serve several people
        file.chmod((folder / "config.json").stat().st_mode)
    tokenizer.save_pretrained(folder)
    feature_extractor(parts.audio_config.num_mel_bins).save_pretrained(folder)


def _with_added_rows(rows: torch.Tensor, known: int, wanted: int) -> torch.Tensor:
    """Rows for `wanted` tokens, in a tensor of its own: those from `known` on are the mean of the ones before."""
    grown = rows.new_empty((max(wanted, rows.shape[0]), rows.shape[1]))
    grown[: rows.shape[0]] = rows
    grown[known:wanted] = rows[:known].mean(dim=0)
    return grown
