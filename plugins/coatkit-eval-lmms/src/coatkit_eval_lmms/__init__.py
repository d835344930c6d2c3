"""coatkit runs in lmms-eval, and the benchmarks of the CoAT paper as its tasks. Imports neither lmms-eval nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"
"""What lmms-eval's --include_path takes; `python -m coatkit_eval_lmms` prints it."""


def manifests() -> list[Any]:
    """The model `coatkit`, for lmms-eval's registry.

    Only the simple interface is offered: the chat interface hands every sound over as a video.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="coatkit", simple_class_path="coatkit_eval_lmms.model.Coatkit")]
