"""Parity of coatkit-expert-basic-pitch with the basic-pitch package: the real weights on both sides."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

PACKAGES = ["basic-pitch", "onnxruntime", "librosa", "numpy"]
RATE = 22_050
LIMITS = {"features": 1e-4, "contour": 1e-4}
NOTE = (
    "Real weights. Frames are compared with upstream's frame nearest in time: upstream's concatenated windows drift by "
    "0.73 frames each, ours do not (see the plugin's README). Contours are compared window by window."
)

STRIDE, LEAD, WINDOW, FIRST, KEPT = 36_164, 3_840, 43_844, 15, 142
Encode = Callable[[list[np.ndarray]], list[dict[str, np.ndarray]]]


def upstream(folder: Path, extras: bool = True) -> Encode:
    """z at the node before the contour head, by upstream's own windowing, and the contour of its `run_inference`.

    Without extras only `run_inference` is called, which is what a user of the package would: it does not give z.
    """
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
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1  # as torch is given one
    session = onnxruntime.InferenceSession(graph.SerializeToString(), threads, providers=["CPUExecutionProvider"])
    model.model = onnxruntime.InferenceSession(str(ICASSP_2022_MODEL_PATH), threads, providers=["CPUExecutionProvider"])

    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        found = []
        with tempfile.TemporaryDirectory() as scratch:
            for samples in heard:
                path = Path(scratch) / "sound.wav"
                soundfile.write(path, samples, RATE, subtype="FLOAT")
                contour = run_inference(path, model)["contour"]
                if not extras:
                    found.append({"contour": contour})
                    continue
                windows = [w for w, _, _ in get_audio_input(path, 2 * LEAD, STRIDE)]
                z = np.stack([session.run([relu.output[0]], {session.get_inputs()[0].name: w})[0][0] for w in windows])
                # The upstream frame nearest in time to each of ours, by search instead of by the plugin's formula.
                times = (np.arange(len(z))[:, None] * STRIDE + np.arange(KEPT) * 256).ravel()
                ours = 256 * np.arange(-(-samples.size // 256))
                after = np.searchsorted(times, ours).clip(1, len(times) - 1)
                nearest = np.where(ours - times[after - 1] <= times[after] - ours, after - 1, after)
                frames = z[:, :, FIRST : FIRST + KEPT].transpose(0, 2, 1, 3).reshape(len(times), -1)
                found.append({"features": frames[nearest], "contour": contour})
        return found

    return encode


def ours(folder: Path, extras: bool = True) -> Encode:
    """The expert's features, and the contour of its network on upstream's windows."""
    import torch

    import coatkit

    expert = coatkit.load_expert("basic-pitch")

    def contour(samples: np.ndarray) -> np.ndarray:
        count = -(-(samples.size + LEAD) // STRIDE)
        padded = np.concatenate([np.zeros(LEAD, np.float32), samples, np.zeros(WINDOW, np.float32)])
        windows = np.stack([padded[w * STRIDE : w * STRIDE + WINDOW] for w in range(count)])
        kept = torch.sigmoid(expert.network(torch.from_numpy(windows))[1])[:, FIRST : FIRST + KEPT].flatten(0, 1)
        return kept[: int(samples.size * (86 / RATE))].numpy()  # upstream keeps 86 frames per second here

    @torch.no_grad()
    def encode(heard: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        features = expert.encode(coatkit.AudioBatch.from_arrays(heard, RATE))
        rows = zip(features.values, features.lengths.tolist(), strict=True)
        found = [{"features": values[:length].numpy()} for values, length in rows]
        for arrays, samples in zip(found, heard, strict=True) if extras else ():
            arrays["contour"] = contour(samples)
        return found

    return encode
