"""An expert whose package cannot be installed beside coatkit: basic-pitch's own inference, with its old TensorFlow.

coatkit has a basic-pitch expert of its own, which needs no TensorFlow; this one is here because its package conflicts.
"""

import numpy as np
import torch

from coatkit import AudioBatch, Expert, Features

HOP, FRAMES, HELD = 256, 142, 36_164  # samples per frame; frames and samples that each window of the model answers for


class Notes(Expert):
    """Teaches which of the piano's 88 keys sound, as probabilities; index 48 is the A of 440 Hz."""

    sample_rate = 22_050  # Hz
    frame_rate = 22_050 / HOP
    dim = 88

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        # Imported here: training reads the store, and makes this class where there is no basic-pitch.
        from basic_pitch import ICASSP_2022_MODEL_PATH
        from basic_pitch.inference import Model

        self.model = Model(ICASSP_2022_MODEL_PATH)

    def encode(self, audio: AudioBatch) -> Features:
        each = [self.hear(s[:n].cpu().numpy()) for s, n in zip(audio.samples, audio.lengths, strict=True)]
        values = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in each], batch_first=True)
        return Features(values, torch.tensor([len(one) for one in each]), self.frame_rate)

    def hear(self, samples: np.ndarray) -> np.ndarray:
        """[N] samples to [L, 88], in windows as the package's own `run_inference` makes them."""
        from basic_pitch.constants import AUDIO_N_SAMPLES

        padded = np.concatenate([np.zeros(3_840, np.float32), samples])
        windows = []
        for start in range(0, len(samples), HELD):
            window = padded[start : start + AUDIO_N_SAMPLES]
            window = np.pad(window, (0, AUDIO_N_SAMPLES - len(window)))
            windows.append(self.model.predict(window[None, :, None])["note"][0, 15:-15])
        # 142 frames are a little longer than what a window answers for: take each frame by its time.
        at = np.arange(-(-len(samples) // HOP)) * HOP
        window_of = at // HELD
        frame_of = np.minimum(np.round((at - window_of * HELD) / HOP).astype(int), FRAMES - 1)
        return np.stack(windows)[window_of, frame_of]
