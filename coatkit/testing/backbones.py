"""The conformance suite for backbones. An author's test file needs no more than this:

```python
from coatkit.testing import BackboneConformance


class TestConformance(BackboneConformance):
    name = "mini"
    options = {"weights": "random"}
```
"""

from __future__ import annotations

from coatkit.testing.backbone_folder import FolderChecks
from coatkit.testing.backbone_forward import ForwardChecks
from coatkit.testing.backbone_generating import GeneratingChecks
from coatkit.testing.backbone_learning import LearningChecks
from coatkit.testing.backbone_loading import LoadingChecks
from coatkit.testing.backbone_preparing import PreparingChecks
from coatkit.testing.backbone_sketch import SketchChecks


class BackboneConformance(
    GeneratingChecks, LearningChecks, ForwardChecks, PreparingChecks, SketchChecks, FolderChecks, LoadingChecks
):
    """Everything a backbone promises, as checks that pytest collects; `docs/testing.md` lists them."""
