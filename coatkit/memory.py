"""Memory of the process: what is freed is kept for the next step."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # numbers of glibc's mallopt
_PAD = 256 << 20


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, where the C library is glibc; says whether it is.

    A training step on a CPU takes and frees gigabytes. glibc hands large blocks back to the system, and the next step
    pays for every page anew: up to three quarters of a step, seen here. The process then stays as large as it has been,
    which for training is its peak anyway.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([set_option(_MMAP_MAX, 0), set_option(_TRIM_THRESHOLD, -1), set_option(_TOP_PAD, _PAD)])
