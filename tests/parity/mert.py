"""Parity of coatkit-expert-mert with MERT-v1-95M as the model hub lays it out, on random weights.

The hub's own class is a HubertModel whose feature projection may leave out its layer norm and whose input may have a
constant-Q transform beside it; MERT-v1-95M's config.json has neither, and what remains is HubertModel's own forward.
It is loaded here as that, from a folder in the hub's layout, and called as the model card does: sound by sound, through
the folder's Wav2Vec2FeatureExtractor. torchaudio's HuBERT, with the same tensors, is a second witness.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ["transformers", "torchaudio", "torch", "numpy"]
RATE = 24_000
LIMITS = {"features": 1e-5, "layer 0": 1e-5, "layer 6": 1e-5, "average": 1e-5, "torchaudio": 1e-5}
NOTE = (
    "Random weights. Ours encodes all sounds in one batch, upstream each alone. features is layer 12, and so is "
    "torchaudio, by the HuBERT of that package with the same tensors."
)

Encode = Callable[[list[np.ndarray]], list[dict[str, np.ndarray]]]
MODEL = "MERT-v1-95M"
POSITIONAL = "encoder.pos_conv_embed.conv."
SPELLINGS = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
CONFIG: dict[str, Any] = {
    "architectures": ["MERTModel"],
    "auto_map": {"AutoConfig": "configuration_MERT.MERTConfig", "AutoModel": "modeling_MERT.MERTModel"},
    "model_type": "mert_model",
    "attention_relax": -1.0,
    "deepnorm": False,
    "feature_extractor_cqt": False,
    "feature_extractor_cqt_bins": 336,
    "sample_rate": RATE,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "conv_bias": False,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_layer_norm": True,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "mask_time_prob": 0.05,
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_hidden_layers": 12,
}
PREPROCESSOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "return_attention_mask": True,
    "sampling_rate": RATE,
}


def _config() -> Any:
    """What is left for HubertConfig once the hub's own class is not asked for."""
    from transformers import HubertConfig

    ours = ("architectures", "auto_map", "model_type")
    return HubertConfig(**{key: value for key, value in CONFIG.items() if key not in ours})


def _write(place: Path) -> None:
    """The hub's three files, with random tensors of which no two could be swapped unseen."""
    import torch
    from transformers import HubertModel

    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = HubertModel(_config()).requires_grad_(False)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value += 0.2 * torch.randn_like(value)
        elif "q_proj" in name or "k_proj" in name:
            value *= 3
    tensors = dict(model.state_dict())
    for old, new in SPELLINGS.items():
        tensors[POSITIONAL + old] = tensors.pop(POSITIONAL + new)
    (place / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (place / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    torch.save(tensors, place / "pytorch_model.bin")


def upstream(folder: Path, extras: bool = True) -> Encode:
    """The model card's call on each sound: layer 12; with extras also layers 0, 6, their average, and torchaudio's."""
    import torch
    from torchaudio.models.wav2vec2.utils import import_huggingface_model
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    place = folder / MODEL
    if not (place / "pytorch_model.bin").is_file():
        _write(place)
    model, report = HubertModel.from_pretrained(place, config=_config(), output_loading_info=True)
    assert not any(report.values()), f"upstream does not take the checkpoint whole: {report}"
    model.eval()
    processor = Wav2Vec2FeatureExtractor.from_pretrained(place)
    witness = import_huggingface_model(model).eval() if extras else None

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        found = []
        for samples in heard:
            inputs = processor(samples, sampling_rate=RATE, return_tensors="pt")
            result = model(**inputs, output_hidden_states=extras)
            arrays = {"features": result.last_hidden_state[0].numpy()}
            if witness is not None:
                states = torch.stack(result.hidden_states)[:, 0]
                arrays |= {"layer 0": states[0].numpy(), "layer 6": states[6].numpy()}
                arrays |= {"average": states.mean(0).numpy()}
                arrays |= {"torchaudio": witness.extract_features(inputs["input_values"])[0][-1][0].numpy()}
            found.append(arrays)
        return found

    return encode


def ours(folder: Path, extras: bool = True) -> Encode:
    """The expert, one batch of all sounds, once for each choice of layers."""
    import torch

    import coatkit

    choices: dict[str, Any] = {"features": 12}
    if extras:
        choices |= {"layer 0": 0, "layer 6": 6, "average": "average"}
    weights = str(folder / MODEL)
    experts = {key: coatkit.load_expert("mert", weights=weights, layers=layers) for key, layers in choices.items()}

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        audio = coatkit.AudioBatch.from_arrays(heard, RATE)
        found: list[dict[str, np.ndarray]] = [{} for _ in heard]
        for key, expert in experts.items():
            features = expert.encode(audio)
            for arrays, values, length in zip(found, features.values, features.lengths.tolist(), strict=True):
                arrays[key] = values[:length].numpy()
        for arrays in found if extras else ():
            arrays["torchaudio"] = arrays["features"]
        return found

    return encode
