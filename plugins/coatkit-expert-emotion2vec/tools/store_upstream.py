"""Store what FunASR's Emotion2vec makes of a sound with drawn weights, for the tests (tests/upstream.npz).

Run it in the environment of `make parity`, from the repository's root:

    .parity/bin/python plugins/coatkit-expert-emotion2vec/tools/store_upstream.py

The network is a quarter as wide as the base model, so that tests are quick, and otherwise the same. Its weights are
drawn from their names, so that tests can draw them again and need not store them.
"""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
STORED = HERE.parent / "tests/upstream.npz"
WIDTH = 192


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor for an upstream name: features of order 1, and no two tensors could be swapped unseen."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith("alibi_scale"):
        return np.linspace(-0.1, 2.0, normal.size, dtype=np.float32).reshape(shape)  # below zero counts as zero
    if name.endswith("extra_tokens"):
        return normal
    if len(shape) == 1:
        return np.float32(0.2) * normal + np.float32(name.endswith(".weight"))
    gain = 1.5 if ".qkv." in name else 1.0  # attention that chooses
    return normal * np.float32(gain / np.sqrt(np.prod(shape[1:])))


def sound() -> np.ndarray:
    """0.6 s of noise that swells, off zero: [9600] float32 at 16 kHz."""
    t = np.arange(9_600) / 16_000
    return (np.random.default_rng(3).standard_normal(t.size) * 0.1 * t + 0.02).astype(np.float32)


def main() -> None:
    import torch
    from funasr.models.emotion2vec.model import Emotion2vec

    spec = importlib.util.spec_from_file_location("parity", HERE.parents[2] / "tests/parity/emotion2vec.py")
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    model = Emotion2vec(model_conf=parity._config("base") | {"embed_dim": WIDTH}).eval()
    model.load_state_dict({k: torch.from_numpy(draw(k, tuple(v.shape))) for k, v in model.state_dict().items()})
    samples = torch.from_numpy(sound())
    with torch.no_grad():
        samples = torch.nn.functional.layer_norm(samples, samples.shape)
        features = model.extract_features(samples[None])["x"][0]
    np.savez_compressed(STORED, features=features.numpy(), samples=sound()[:16], drawn=draw("norm1.weight", (16,)))


if __name__ == "__main__":
    main()
