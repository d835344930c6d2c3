"""Read a CTranslate2 `model.bin`, and name a Whisper encoder's weights in it the way transformers does.

The layout follows CTranslate2's `ModelSpec.save` (binary version 4 to 6, little-endian): version, specification name,
revision, the variables (name, shape, type, bytes), then the aliases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coatkit import AssetError

Array = npt.NDArray[Any]

BINARY_VERSIONS = range(4, 7)
_TYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_REMEDY = "  Delete the asset it comes from and fetch it again with: coatkit fetch mini"


@dataclass(frozen=True)
class Ct2Model:
    """Contents of a `model.bin`.

    Args:
        source: What it was read from, for messages.
        spec: Name of the model's specification, such as `WhisperSpec`.
        revision: Revision of that specification.
        variables: Arrays by name; read-only views of the file's bytes.
        aliases: Other names of variables.
    """

    source: str
    spec: str
    revision: int
    variables: dict[str, Array]
    aliases: dict[str, str]


class _Cursor:
    """Reads on through bytes and refuses to go past their end."""

    def __init__(self, data: bytes, source: str) -> None:
        self._data = data
        self._source = source
        self.position = 0

    def fail(self, problem: str) -> AssetError:
        return AssetError(f"{self._source}: not a readable CTranslate2 model: {problem}.\n{_REMEDY}")

    def skip(self, count: int, what: str) -> int:
        """Step over `count` bytes; returns where they start."""
        start = self.position
        if start + count > len(self._data):
            raise self.fail(f"it ends at byte {len(self._data)}, inside {what} (needs {start + count} bytes)")
        self.position += count
        return start

    def unsigned(self, width: int, what: str) -> int:
        start = self.skip(width, what)
        return int.from_bytes(self._data[start : start + width], "little")

    def text(self, what: str) -> str:
        length = self.unsigned(2, f"the length of {what}")
        start = self.skip(length, what)
        try:
            return self._data[start : start + length].rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not text") from error


def read_ct2(data: bytes, source: str) -> Ct2Model:
    """Parse the bytes of a `model.bin`.

    Args:
        data: The whole file.
        source: What it is called in messages.

    Raises:
        AssetError: If it is truncated, of another format, or of a version or type not known here.
    """
    cursor = _Cursor(data, source)
    version = cursor.unsigned(4, "the version")
    if version not in BINARY_VERSIONS:
        known = f"{BINARY_VERSIONS.start} to {BINARY_VERSIONS.stop - 1}"
        raise cursor.fail(f"its first four bytes say binary version {version}, versions {known} are known")
    spec = cursor.text("the specification's name")
    revision = cursor.unsigned(4, "the revision")
    variables = dict(_read_variable(cursor, data) for _ in range(cursor.unsigned(4, "the number of variables")))
    aliases = {}
    for _ in range(cursor.unsigned(4, "the number of aliases")):
        alias = cursor.text("the name of an alias")
        aliases[alias] = cursor.text(f"the variable of alias {alias}")
    if cursor.position != len(data):
        raise cursor.fail(f"{len(data) - cursor.position} bytes follow the last alias")
    return Ct2Model(source, spec, revision, variables, aliases)


def _read_variable(cursor: _Cursor, data: bytes) -> tuple[str, Array]:
    name = cursor.text("the name of a variable")
    shape = tuple(
        cursor.unsigned(4, f"the shape of {name}") for _ in range(cursor.unsigned(1, f"the number of axes of {name}"))
    )
    code = cursor.unsigned(1, f"the type of {name}")
    if code not in _TYPES:
        raise cursor.fail(f"variable {name} has unknown type {code}")
    dtype = np.dtype(_TYPES[code])
    size = cursor.unsigned(4, f"the size of {name}")
    count = math.prod(shape)
    if size != count * dtype.itemsize:
        raise cursor.fail(f"variable {name} of shape {shape} and type {dtype} says it has {size} bytes")
    start = cursor.skip(size, f"variable {name}")
    return name, np.frombuffer(data, dtype.newbyteorder("<"), count, start).reshape(shape)


def encoder_heads(model: Ct2Model) -> int:
    """Number of attention heads of the encoder.

    Raises:
        AssetError: If the model does not say.
    """
    return int(_variable(model, "encoder/num_heads").item())


def encoder_state(model: Ct2Model) -> dict[str, torch.Tensor]:
    """The Whisper encoder's weights under transformers' names, such as `layers.0.self_attn.q_proj.weight`.

    CTranslate2 stacks the query, key and value projections; they are split here. Whisper's key projection has no bias,
    so the stacked one must be zero there.

    Returns:
        Tensors in float32, in the shapes of `WhisperEncoder`'s state dictionary.

    Raises:
        AssetError: If a weight is missing, is quantised to integers, or the model is not a Whisper model.
    """
    if model.spec != "WhisperSpec":
        raise AssetError(f"{model.source}: holds a {model.spec}, expected a WhisperSpec.\n{_REMEDY}")
    state = {"embed_positions.weight": _tensor(model, "encoder/position_encodings/encodings")}
    for layer in ("conv1", "conv2"):
        state |= _linear(model, f"encoder/{layer}", layer)
    state |= _layer_norm(model, "encoder/layer_norm", "layer_norm")
    index = 0
    while f"encoder/layer_{index}/ffn/linear_0/weight" in model.variables:
        state |= _encoder_layer(model, f"encoder/layer_{index}", f"layers.{index}")
        index += 1
    if index == 0:
        raise _missing(model, "encoder/layer_0/ffn/linear_0/weight")
    return state


def _encoder_layer(model: Ct2Model, source: str, target: str) -> dict[str, torch.Tensor]:
    stacked = f"{source}/self_attention/linear_0"
    weights = _tensor(model, f"{stacked}/weight").chunk(3)
    biases = _tensor(model, f"{stacked}/bias").chunk(3)
    if biases[1].any():
        raise AssetError(f"{model.source}: {stacked}/bias is not zero for the keys, so this is no Whisper.\n{_REMEDY}")
    state = {}
    for letter, weight, bias in zip("qkv", weights, biases, strict=True):
        state[f"{target}.self_attn.{letter}_proj.weight"] = weight.contiguous()
        if letter != "k":
            state[f"{target}.self_attn.{letter}_proj.bias"] = bias.contiguous()
    state |= _layer_norm(model, f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
    state |= _linear(model, f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
    state |= _layer_norm(model, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    state |= _linear(model, f"{source}/ffn/linear_0", f"{target}.fc1")
    state |= _linear(model, f"{source}/ffn/linear_1", f"{target}.fc2")
    return state


def _linear(model: Ct2Model, source: str, target: str) -> dict[str, torch.Tensor]:
    return {f"{target}.{part}": _tensor(model, f"{source}/{part}") for part in ("weight", "bias")}


def _layer_norm(model: Ct2Model, source: str, target: str) -> dict[str, torch.Tensor]:
    return {
        f"{target}.weight": _tensor(model, f"{source}/gamma"),
        f"{target}.bias": _tensor(model, f"{source}/beta"),
    }


def _tensor(model: Ct2Model, name: str) -> torch.Tensor:
    array = _variable(model, name)
    if not np.issubdtype(array.dtype, np.floating):
        raise AssetError(f"{model.source}: {name} is quantised to {array.dtype}; only float32 and float16 can be read.")
    return torch.from_numpy(array.astype(np.float32))


def _variable(model: Ct2Model, name: str) -> Array:
    if name not in model.variables:
        raise _missing(model, name)
    return model.variables[name]


def _missing(model: Ct2Model, name: str) -> AssetError:
    return AssetError(f"{model.source}: has no variable {name}.\n{_REMEDY}")
