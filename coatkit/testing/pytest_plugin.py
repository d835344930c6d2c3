"""What pytest loads where coatkit is installed, without torch and without any plugin.

That it is there lets pytest explain the asserts of the suites; a line says which coatkit a plugin was tested with.
"""

from __future__ import annotations

import coatkit


def pytest_report_header() -> str:
    return f"coatkit: {coatkit.__version__}"
