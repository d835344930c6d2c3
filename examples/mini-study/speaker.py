"""Who is speaking: Resemblyzer's speaker embeddings as an expert, written by a user in one file.

The network (a generalised end-to-end speaker encoder, arXiv:1710.10467) and its weights are Resemblyzer 0.1.4's
(Apache-2.0); this is our own reading of it in plain torch, since the package wants librosa and webrtcvad. Its wheel,
which need not be installed, holds the weights:

    pip download --no-deps Resemblyzer==0.1.4
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from coatkit import AssetError, AudioBatch, Expert, Features

SHA256 = "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f"
HOP, FFT, MELS = 160, 400, 40  # 10 ms, 25 ms
WINDOW, STEP = 160, 40  # mel frames: 1.6 s, of which the encoder makes one embedding, every 0.4 s
LEAST_RMS = 10 ** (-30 / 20)  # quieter sounds are made as loud as this
AT_ONCE = 64  # windows


class Speaker(Expert):
    """Embeddings of windows of 1.6 s around every 0.4 s, [L, 256], positive, with a mean square of 1.

    Resemblyzer's are of length 1; times 16 they have the scale of other experts' features. Near the ends of a sound the
    window is the nearest that lies inside it. Its voice activity detection is left out: it would cut time away.

    Args:
        weights: The wheel of Resemblyzer 0.1.4.
    """

    sample_rate = 16_000
    frame_rate = 100 / STEP
    dim = 256

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        path = Path(self.weights)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise AssetError(
                f"{path}: {error.strerror}; get it with: pip download --no-deps Resemblyzer==0.1.4"
            ) from None
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise AssetError(f"{path}: is not the wheel of Resemblyzer 0.1.4; delete it and download it again")
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            saved = torch.load(io.BytesIO(wheel.read("resemblyzer/pretrained.pt")), "cpu", weights_only=True)
        state = saved["model_state"]
        self.lstm = nn.LSTM(MELS, self.dim, 3, batch_first=True)
        self.linear = nn.Linear(self.dim, self.dim)
        for name, module in (("lstm", self.lstm), ("linear", self.linear)):
            module.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{name}.")})
            module.to(device).eval().requires_grad_(False)
        filters = mel_filter_bank(FFT // 2 + 1, MELS, 0.0, 8000.0, self.sample_rate, norm="slaney", mel_scale="slaney")
        self.filters = torch.as_tensor(filters, dtype=torch.float32, device=device)

    def encode(self, audio: AudioBatch) -> Features:
        mel = self._mel(audio)  # [A, T, 40]
        frames = -(-audio.lengths // (STEP * HOP))  # embeddings of each sound: one for every 0.4 s begun
        last = (audio.lengths // HOP - WINDOW).clamp(min=0)  # where the last window inside begins
        each = torch.arange(int(frames.max()), device=mel.device)
        starts = (each * STEP + STEP // 2 - WINDOW // 2).clamp(min=0)
        starts = torch.minimum(starts[None], last.to(mel.device)[:, None])  # [A, L]
        valid = each[None] < frames.to(mel.device)[:, None]
        sound, place = valid.nonzero(as_tuple=True)
        at = starts[sound, place][:, None] + torch.arange(WINDOW, device=mel.device)
        values = mel.new_zeros(len(audio), len(each), self.dim)
        for part in torch.split(torch.arange(len(sound), device=mel.device), AT_ONCE):
            values[sound[part], place[part]] = self._embed(mel[sound[part][:, None], at[part]])
        return Features(values, frames, self.frame_rate)

    def _embed(self, mel: Tensor) -> Tensor:
        """[W, 160, 40] to [W, 256]; zeros where nothing is active."""
        _, (hidden, _) = self.lstm(mel)
        raw = torch.relu(self.linear(hidden[-1]))
        return self.dim**0.5 * raw / raw.norm(dim=1, keepdim=True).clamp(min=1e-9)

    def _mel(self, audio: AudioBatch) -> Tensor:
        """Power of 40 mel bands every 10 ms, [A, T, 40] with T at least a window; no logarithm."""
        count = max(audio.samples.shape[1], WINDOW * HOP)
        beyond = torch.arange(audio.samples.shape[1], device=audio.samples.device) >= audio.lengths[:, None]
        samples = audio.samples.float().masked_fill(beyond, 0.0)
        rms = (samples.square().sum(1, keepdim=True) / audio.lengths[:, None]).sqrt()
        samples = samples * (LEAST_RMS / rms.clamp(min=1e-9)).clamp(min=1.0)
        samples = nn.functional.pad(samples, (0, count - samples.shape[1]))
        window = torch.hann_window(FFT, device=samples.device)
        found = torch.stft(samples, FFT, HOP, window=window, pad_mode="constant", return_complex=True)
        return found.abs().square().transpose(1, 2) @ self.filters
