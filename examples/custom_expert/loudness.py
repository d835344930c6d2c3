"""An expert of your own in one file: how loud the sound is, 50 times a second. No plugin, no edit to coatkit."""

import torch

from coatkit import AudioBatch, Expert, Features


class Loudness(Expert):
    """Teaches the root-mean-square level in decibels, scaled to about [-1, 0].

    Args:
        floor_db: Level taken as silence, dB below full scale.
    """

    sample_rate = 16_000  # Hz that encode() wants
    frame_rate = 50.0  # frames per second that encode() gives
    dim = 1

    def __init__(self, floor_db: float = 80.0) -> None:
        self.floor_db = floor_db

    def encode(self, audio: AudioBatch) -> Features:
        hop = int(self.sample_rate / self.frame_rate)
        frames = -(-audio.lengths // hop)  # rounded up: the last frame may be partly filled
        padded = torch.nn.functional.pad(audio.samples, (0, int(frames.max()) * hop - audio.samples.shape[1]))
        power = padded.unflatten(1, (-1, hop)).square().mean(-1)
        level = 10 * torch.log10(power + 1e-12) / self.floor_db
        return Features(level.clamp(-1, 0)[..., None], frames, self.frame_rate)
