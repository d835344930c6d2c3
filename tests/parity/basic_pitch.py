"""Parity of coatkit-expert-basic-pitch with the basic-pitch 0.4.0 package; see README.md for the two environments.

    python basic_pitch.py dump OUT.npz      # where basic-pitch is installed: run upstream, store what it gives
    python basic_pitch.py compare IN.npz    # where the plugin is installed: run ours, print the differences

`compare` exits with 1 when z differs by more than 1e-4 or the contour by more than 1e-5 anywhere.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

RATE = 22_050
STRIDE, LEAD, WINDOW, FIRST, KEPT = 36_164, 3_840, 43_844, 15, 142
LIMITS = {"z": 1e-4, "contour": 1e-5}


def sounds() -> dict[str, np.ndarray]:
    """Seeded sounds at 22,050 Hz, float32 [N]."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(3 * RATE)
    t = np.arange(2 * RATE) / RATE
    chord = sum(0.1 * np.sin(2 * np.pi * f * k * t) / k for f in (220.0, 277.18, 329.63) for k in (1, 2, 3, 4))
    t = np.arange(7 * RATE) / RATE
    sweep = 0.3 * np.sin(2 * np.pi * (110 * t + 90 * t**2)) * (0.55 + 0.45 * np.sin(2 * np.pi * 0.7 * t))
    sweep += 0.003 * np.random.default_rng(1).standard_normal(t.size)
    found = {
        "noise 3 s": noise,
        "chord 2 s": chord,
        "sweep 7 s": sweep,
        "click 0.1 s": np.eye(1, RATE // 10, 500)[0],
        "silence 2 s": np.zeros(2 * RATE),
    }
    return {name: np.asarray(samples, dtype=np.float32) for name, samples in found.items()}


def dump(out: Path) -> None:
    """Upstream's z for every window, and the contour that its own `run_inference` returns."""
    # This file has the package's name; without this the import below would find the file itself.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    import onnx
    import onnxruntime
    import soundfile
    from basic_pitch import ICASSP_2022_MODEL_PATH
    from basic_pitch.inference import Model, get_audio_input, run_inference

    model = Model(ICASSP_2022_MODEL_PATH)
    assert model.model_type is Model.MODEL_TYPES.ONNX, f"upstream chose {model.model_type}, not ONNX"
    graph = onnx.load(str(ICASSP_2022_MODEL_PATH))
    shapes = {i.name: tuple(i.dims) for i in graph.graph.initializer}
    contour1 = next(n for n in graph.graph.node if n.op_type == "Conv" and shapes[n.input[1]] == (8, 8, 3, 39))
    relu = next(n for n in graph.graph.node if n.op_type == "Relu" and n.input[0] == contour1.output[0])
    graph.graph.output.append(onnx.helper.make_tensor_value_info(relu.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    stored: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, samples in sounds().items():
            path = Path(folder) / "sound.wav"
            soundfile.write(path, samples, RATE, subtype="FLOAT")
            windows = [w for w, _, _ in get_audio_input(path, 2 * LEAD, STRIDE)]
            z = [session.run([relu.output[0]], {session.get_inputs()[0].name: w})[0][0] for w in windows]
            stored[f"{name}/samples"] = samples
            stored[f"{name}/z"] = np.stack(z)
            stored[f"{name}/contour"] = run_inference(path, model)["contour"]
    packages = ("basic-pitch", "onnxruntime", "librosa", "numpy")
    stored["versions"] = np.array([f"{p} {version(p)}" for p in packages] + [f"Python {platform.python_version()}"])
    np.savez_compressed(out, **stored)
    for key, array in stored.items():
        print(f"{key:24} {array.shape}")


def compare(path: Path) -> int:
    """Print the largest differences; 1 if one is over its limit, else 0."""
    import torch
    from coatkit_expert_basic_pitch.expert import BasicPitch

    from coatkit import AudioBatch

    upstream = np.load(path)
    expert = BasicPitch()
    expert.load(torch.device("cpu"), torch.float32)
    assert expert.network is not None
    print("upstream: " + ", ".join(upstream["versions"]))
    ours = [f"{p} {version(p)}" for p in ("coatkit-expert-basic-pitch", "torch", "numpy")]
    print("here:     " + ", ".join([*ours, f"Python {platform.python_version()}"]) + "\n")
    print(f"{'sound':12} {'windows':>7} {'z max':>8} {'z diff':>9} {'encode diff':>11} {'contour diff':>12}")

    failed = False
    for name in (key[: -len("/samples")] for key in upstream.files if key.endswith("/samples")):
        samples, z, contour = (upstream[f"{name}/{part}"] for part in ("samples", "z", "contour"))
        padded = np.concatenate([np.zeros(LEAD, np.float32), samples, np.zeros(WINDOW, np.float32)])
        windows = np.stack([padded[w * STRIDE : w * STRIDE + WINDOW] for w in range(len(z))])
        with torch.no_grad():
            our_z, our_logits = expert.network(torch.from_numpy(windows))
            encoded = expert.encode(AudioBatch.from_arrays([samples], RATE)).values[0].numpy()
        kept = slice(FIRST, FIRST + KEPT)
        our_contour = torch.sigmoid(our_logits)[:, kept].flatten(0, 1)[: len(contour)].numpy()

        # The upstream frame nearest in time to each of ours, by search instead of by the plugin's formula.
        times = (np.arange(len(z))[:, None] * STRIDE + np.arange(KEPT) * 256).ravel()
        nearest = np.abs(times - 256 * np.arange(len(encoded))[:, None]).argmin(1)
        their_frames = z[:, :, kept].transpose(0, 2, 1, 3).reshape(len(times), -1)[nearest]

        z_diff = float(np.abs(our_z.numpy() - z).max())
        encode_diff = float(np.abs(encoded - their_frames).max())
        contour_diff = float(np.abs(our_contour - contour).max())
        bad = max(z_diff, encode_diff) > LIMITS["z"] or contour_diff > LIMITS["contour"]
        failed |= bad or not np.isfinite([z_diff, encode_diff, contour_diff]).all()
        print(f"{name:12} {len(z):7} {z.max():8.3f} {z_diff:9.1e} {encode_diff:11.1e} {contour_diff:12.1e}")
    print(f"\nlimits: z {LIMITS['z']:.0e}, contour {LIMITS['contour']:.0e}: {'EXCEEDED' if failed else 'met'}")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("dump", "compare"))
    parser.add_argument("npz", type=Path)
    args = parser.parse_args()
    if args.mode == "compare":
        return compare(args.npz)
    dump(args.npz)
    return 0


if __name__ == "__main__":
    sys.exit(main())
