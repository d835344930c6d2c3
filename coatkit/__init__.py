"""coatkit: continuous audio thinking, and distilling audio experts into large audio language models.

Names below are imported on first use, so that `import coatkit` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coatkit.assets import cache_dir as cache_dir
    from coatkit.assets import require as require
    from coatkit.backbones.hf import HFBackbone as HFBackbone
    from coatkit.backbones.hf import HFPreparer as HFPreparer
    from coatkit.backbones.options import BackboneOptions as BackboneOptions
    from coatkit.backbones.options import TrainOptions as TrainOptions
    from coatkit.data.rows import AUDIO_TAG as AUDIO_TAG
    from coatkit.data.rows import AudioRef as AudioRef
    from coatkit.data.rows import JsonlRows as JsonlRows
    from coatkit.data.rows import Message as Message
    from coatkit.data.rows import Row as Row
    from coatkit.errors import AssetError as AssetError
    from coatkit.errors import CoatkitError as CoatkitError
    from coatkit.errors import DataError as DataError
    from coatkit.errors import PluginError as PluginError
    from coatkit.hookspecs import hookimpl as hookimpl
    from coatkit.infer import AudioThinker as AudioThinker
    from coatkit.infer import load as load
    from coatkit.infer import load_backbone as load_backbone
    from coatkit.infer import load_expert as load_expert
    from coatkit.losses import masked_bce as masked_bce
    from coatkit.losses import masked_focal_bce as masked_focal_bce
    from coatkit.losses import masked_mse as masked_mse
    from coatkit.manifest import Asset as Asset
    from coatkit.manifest import Manifest as Manifest
    from coatkit.precision import exact_float32 as exact_float32
    from coatkit.protocols import AudioBatch as AudioBatch
    from coatkit.protocols import Backbone as Backbone
    from coatkit.protocols import BackboneAudio as BackboneAudio
    from coatkit.protocols import Expert as Expert
    from coatkit.protocols import Features as Features
    from coatkit.protocols import Head as Head
    from coatkit.protocols import Inputs as Inputs
    from coatkit.protocols import Output as Output
    from coatkit.protocols import Preparer as Preparer
    from coatkit.protocols import Sketch as Sketch
    from coatkit.readout import Readout as Readout
    from coatkit.spec import ThinkingSpec as ThinkingSpec
    from coatkit.thought import Heard as Heard
    from coatkit.thought import Thought as Thought
    from coatkit.waveforms import conv_frames as conv_frames
    from coatkit.waveforms import encode_by_length as encode_by_length
    from coatkit.waveforms import receptive_field as receptive_field
    from coatkit.waveforms import standardise as standardise
    from coatkit.weights import fill_weights as fill_weights
    from coatkit.weights import read_weights as read_weights

__version__ = "0.1.0"

_HOME = {
    "coatkit.assets": ("cache_dir", "require"),
    "coatkit.backbones.hf": ("HFBackbone", "HFPreparer"),
    "coatkit.backbones.options": ("BackboneOptions", "TrainOptions"),
    "coatkit.data.rows": ("AUDIO_TAG", "AudioRef", "JsonlRows", "Message", "Row"),
    "coatkit.errors": ("AssetError", "CoatkitError", "DataError", "PluginError"),
    "coatkit.hookspecs": ("hookimpl",),
    "coatkit.infer": ("AudioThinker", "load", "load_backbone", "load_expert"),
    "coatkit.losses": ("masked_bce", "masked_focal_bce", "masked_mse"),
    "coatkit.manifest": ("Asset", "Manifest"),
    "coatkit.precision": ("exact_float32",),
    "coatkit.protocols": (
        "AudioBatch",
        "Backbone",
        "BackboneAudio",
        "Expert",
        "Features",
        "Head",
        "Inputs",
        "Output",
        "Preparer",
        "Sketch",
    ),
    "coatkit.readout": ("Readout",),
    "coatkit.spec": ("ThinkingSpec",),
    "coatkit.thought": ("Heard", "Thought"),
    "coatkit.waveforms": ("conv_frames", "encode_by_length", "receptive_field", "standardise"),
    "coatkit.weights": ("fill_weights", "read_weights"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'coatkit' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
