"""Conformance suites for authors of plugins: subclass one in a test file, and pytest runs its checks.

Names are imported on first use: the child process that looks at a plugin's entry module must not meet torch here.
`docs/testing.md` says how to use them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coatkit.testing.backbones import BackboneConformance as BackboneConformance
    from coatkit.testing.experts import ExpertConformance as ExpertConformance
    from coatkit.testing.heads import HeadConformance as HeadConformance

_HOME = {
    "ExpertConformance": "coatkit.testing.experts",
    "BackboneConformance": "coatkit.testing.backbones",
    "HeadConformance": "coatkit.testing.heads",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coatkit.testing' has no attribute {name!r}; suites: {', '.join(__all__)}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        raise ImportError("coatkit.testing needs pytest; install it with: pip install 'coatkit[testing]'") from error
