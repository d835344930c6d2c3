"""What every suite shares: the component under test, and how a check fails or is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import pytest

from coatkit.manifest import Kind


class Conformance:
    """Base of the suites; a subclass's test methods are its checks.

    Attributes:
        kind: What the suite checks.
        name: What a spec's `use` takes: a plugin's name, `./file.py:Class` or `module:Class`.
        options: The component's options; small or random weights make the suite fast.
    """

    kind: ClassVar[Kind]
    name: str = ""
    options: Mapping[str, Any] = {}  # a Mapping cannot be changed, and authors write a plain dict

    @classmethod
    def fail(cls, what: str, remedy: str) -> NoReturn:
        """Fail a check: what is wrong in which component, then what its author can do."""
        pytest.fail(f"{cls.kind} {cls.name!r}: {what}\n  What to do: {remedy}", pytrace=False)

    @classmethod
    def skip(cls, why: str) -> NoReturn:
        """Leave a check out, saying why."""
        pytest.skip(f"{cls.kind} {cls.name!r}: {why}")
