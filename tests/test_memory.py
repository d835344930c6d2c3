"""Freed memory stays with the process: seen in its page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from coatkit.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):  # 64 MB, more than glibc keeps by itself
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", SCRIPT, word], text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_what_is_freed_is_taken_again_without_page_faults() -> None:
    block = (1 << 26) // 4096
    assert faults("keep") < 16 * block  # 6 to 8 seen: the heap grows until an aligned block fits where another was
    assert faults("leave") > 24 * block
