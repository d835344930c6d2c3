"""Make `weights/basic_pitch.safetensors` from the ONNX model in the basic-pitch 0.4.0 wheel.

    python tools/convert_weights.py nmp.onnx src/coatkit_expert_basic_pitch/weights/basic_pitch.safetensors

`nmp.onnx` is `basic_pitch/saved_models/icassp_2022/nmp.onnx` in the wheel. Needs `onnx`, which the plugin
itself never does.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

SHA256 = "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec"
"""Digest of the model in basic-pitch 0.4.0, the only one whose graph `network.py` follows."""


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The tensors of the contour branch under the names of `Network`, found by their place and shape in the graph."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    # The two sets of constant-Q kernels have one shape; the graph negates the output of the imaginary one.
    negated = {node.input[0] for node in model.graph.node if node.op_type == "Neg"}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        inputs = [constants[name] for name in node.input if name in constants]
        shapes = [array.shape for array in inputs]
        if node.op_type == "Conv" and shapes[0] == (36, 1, 1, 256):
            # Only the power is used, so the sign is dropped; the biases are checked to be zero.
            assert not inputs[1].any()
            found["cqt_imag" if node.output[0] in negated else "cqt_real"] = inputs[0][:, :, 0]
        elif node.op_type == "Conv" and shapes[0] == (1, 1, 1, 256):
            assert not inputs[1].any()
            found["lowpass"] = inputs[0][:, :, 0]
        elif node.op_type == "Conv" and shapes[0] in ((8, 8, 3, 39), (1, 8, 5, 5)):
            name = "contour1" if shapes[0] == (8, 8, 3, 39) else "contour2"
            found[f"{name}.weight"], found[f"{name}.bias"] = inputs
        elif node.op_type == "Mul" and (309, 1, 1) in shapes:
            found["bin_scale"] = inputs[0].reshape(309)
        elif node.op_type in ("Mul", "Add") and shapes == [(1,)] and "/batch_normalization/" in "".join(node.input):
            found["norm_scale" if node.op_type == "Mul" else "norm_shift"] = inputs[0]
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("safetensors", type=Path)
    args = parser.parse_args()
    digest = hashlib.sha256(args.onnx.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{args.onnx} has SHA-256 {digest}; the model of basic-pitch 0.4.0 has {SHA256}")
    found = tensors(onnx.load(args.onnx))
    # One entry only: safetensors writes several in random order, and the file should be reproducible.
    source = (
        f"basic-pitch 0.4.0, saved_models/icassp_2022/nmp.onnx, SHA-256 {digest}; Apache-2.0, see NOTICE-basic-pitch"
    )
    save_file(found, args.safetensors, {"source": source})
    for name, array in sorted(found.items()):
        print(f"{name:16} {array.shape}")


if __name__ == "__main__":
    main()
