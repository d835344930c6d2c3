"""The conformance suite for experts. An author's test file needs no more than this:

```python
from coatkit.testing import ExpertConformance


class TestConformance(ExpertConformance):
    name = "spidr"
    options = {"weights": "random"}
```
"""

from __future__ import annotations

from coatkit.testing.expert_encoding import EncodingChecks
from coatkit.testing.expert_loading import LoadingChecks
from coatkit.testing.expert_loss import LossChecks


class ExpertConformance(LossChecks, EncodingChecks, LoadingChecks):
    """Everything an expert promises, as checks that pytest collects; `docs/testing.md` lists them."""
