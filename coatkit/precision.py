"""Real float32, wherever it matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute in real float32 inside: no autocast, TF32 or bfloat16 products, whatever the program has chosen.

    Targets are what the student is measured by, and a feature store keeps them for runs on other machines.
    """
    switches: tuple[Any, ...] = (
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]  # torch's stubs lack them
        torch.backends.cudnn.rnn,
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
    )
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
