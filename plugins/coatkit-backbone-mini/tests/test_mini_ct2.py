"""The reader of CTranslate2 files, on files made here."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from coatkit import AssetError
from coatkit_backbone_mini.ct2 import encoder_heads, encoder_state, read_ct2

Variables = dict[str, npt.NDArray[np.generic]]
TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def ct2_file(variables: Variables, spec: str = "WhisperSpec", version: int = 6) -> bytes:
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", TYPES[array.dtype.name], array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 1) + text("alias") + text(next(iter(variables)))


def whisper_variables(state: dict[str, torch.Tensor], layers: int, heads: int) -> Variables:
    """A Whisper encoder's state dictionary under CTranslate2's names."""
    arrays = {name: value.numpy() for name, value in state.items()}
    out: Variables = {
        "encoder/num_heads": np.array(heads, np.int16),
        "encoder/position_encodings/encodings": arrays["embed_positions.weight"],
        "encoder/layer_norm/gamma": arrays["layer_norm.weight"],
        "encoder/layer_norm/beta": arrays["layer_norm.bias"],
    }
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            out[f"encoder/{conv}/{part}"] = arrays[f"{conv}.{part}"]
    for index in range(layers):
        hf, ct = f"layers.{index}", f"encoder/layer_{index}"
        attention = f"{hf}.self_attn"
        biases = [arrays[f"{attention}.q_proj.bias"]]
        biases += [np.zeros_like(biases[0]), arrays[f"{attention}.v_proj.bias"]]
        weights = [arrays[f"{attention}.{letter}_proj.weight"] for letter in "qkv"]
        out[f"{ct}/self_attention/linear_0/weight"] = np.concatenate(weights)
        out[f"{ct}/self_attention/linear_0/bias"] = np.concatenate(biases)
        for part in ("weight", "bias"):
            out[f"{ct}/self_attention/linear_1/{part}"] = arrays[f"{attention}.out_proj.{part}"]
            out[f"{ct}/ffn/linear_0/{part}"] = arrays[f"{hf}.fc1.{part}"]
            out[f"{ct}/ffn/linear_1/{part}"] = arrays[f"{hf}.fc2.{part}"]
        for norm, place in (("self_attn_layer_norm", "self_attention"), ("final_layer_norm", "ffn")):
            out[f"{ct}/{place}/layer_norm/gamma"] = arrays[f"{hf}.{norm}.weight"]
            out[f"{ct}/{place}/layer_norm/beta"] = arrays[f"{hf}.{norm}.bias"]
    return out


@pytest.fixture
def encoder() -> WhisperEncoder:
    return WhisperEncoder(
        WhisperConfig(
            d_model=8,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=16,
            num_mel_bins=4,
            max_source_positions=10,
        )
    )


@pytest.fixture
def variables(encoder: WhisperEncoder) -> Variables:
    return whisper_variables(encoder.state_dict(), layers=2, heads=2)


def test_reads_what_was_written() -> None:
    written: Variables = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a/scale": np.array(1.5, np.float32),
        "b": np.array([1, -2], np.int8),
    }
    model = read_ct2(ct2_file(written, spec="OtherSpec"), "here")
    assert (model.source, model.spec, model.revision, model.aliases) == ("here", "OtherSpec", 3, {"alias": "a/weight"})
    assert model.variables.keys() == written.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(model.variables[name], array)
        assert model.variables[name].shape == array.shape


def test_every_truncation_is_a_clear_error() -> None:
    whole = ct2_file({"a/weight": np.ones((2, 2), np.float32), "n": np.array(3, np.int16)})
    read_ct2(whole, "whole")
    for length in range(len(whole)):
        with pytest.raises(AssetError, match="cut short: not a readable CTranslate2 model"):
            read_ct2(whole[:length], "cut short")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + b"\0" * 60, "binary version"),
        (b"\x06\0\0\0\x03\0\xff\xfe\0", "is not text"),
        (ct2_file({"a": np.ones(1, np.float32)}) + b"more", "4 bytes follow"),
        (ct2_file({"a": np.ones(1, np.float32)}, version=99), "binary version 99"),
        (struct.pack("<I", 6) + text("S") + struct.pack("<II", 1, 1) + text("a") + b"\0\x63", "unknown type 99"),
        (struct.pack("<I", 6) + text("S") + struct.pack("<II", 1, 1) + text("a") + b"\0\0\x05\0\0\0", "has 5 bytes"),
    ],
)
def test_foreign_files_are_clear_errors(data: bytes, message: str) -> None:
    with pytest.raises(AssetError, match=message):
        read_ct2(data, "foreign")


def test_encoder_comes_back_under_transformers_names(encoder: WhisperEncoder, variables: Variables) -> None:
    model = read_ct2(ct2_file(variables), "made here")
    state = encoder_state(model)
    assert encoder_heads(model) == 2
    assert state.keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_missing_weight_is_named(variables: Variables) -> None:
    del variables["encoder/layer_1/ffn/linear_1/bias"]
    with pytest.raises(AssetError, match="made here: has no variable encoder/layer_1/ffn/linear_1/bias"):
        encoder_state(read_ct2(ct2_file(variables), "made here"))


def test_other_models_are_refused(variables: Variables) -> None:
    with pytest.raises(AssetError, match="holds a TransformerSpec"):
        encoder_state(read_ct2(ct2_file(variables, spec="TransformerSpec"), "made here"))
    quantised = variables | {"encoder/conv1/weight": np.ones((8, 4, 3), np.int8)}
    with pytest.raises(AssetError, match="encoder/conv1/weight is quantised to int8"):
        encoder_state(read_ct2(ct2_file(quantised), "made here"))
    biased = variables | {"encoder/layer_0/self_attention/linear_0/bias": np.ones(24, np.float32)}
    with pytest.raises(AssetError, match="not zero for the keys"):
        encoder_state(read_ct2(ct2_file(biased), "made here"))
