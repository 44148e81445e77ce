"""Memory that a run on a CPU has freed stays with its process.

XLA allocates and frees the buffers of each program anew. glibc's allocator gives large ones back to
the system, which clears each page before it hands it out again; on a virtual machine that takes up
to half of a training step (docs/results/cpu_demo.md).
"""

import ctypes
import os
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Names of options in glibc's malloc.h."""

_OPTIONS = {
    # Freed memory at the end of the heap is never given back.
    _TRIM_THRESHOLD: -1,
    # Large arrays lie in the heap too, not each in a mapping of its own.
    _MMAP_MAX: 0,
    # The heap grows by so many bytes more than asked for.
    _TOP_PAD: 64 * 2**20,
    # One heap for all threads.
    _ARENA_MAX: 1,
}
"""Option of `mallopt` → value, an int each."""

_SET = "MALLOC_TRIM_THRESHOLD_"


def keep_freed_memory(library: Any = None) -> bool:
    """Lets the allocator of this process keep what is freed; its memory stays at its peak.

    Nothing is changed where the environment says itself when memory is given back
    (`MALLOC_TRIM_THRESHOLD_`, as in the `Makefile`), nor where the allocator is not glibc's.

    Args:
      library: that has `mallopt`; by default that of this process.

    Returns:
      Whether it was changed.
    """
    mallopt = getattr(library or ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _SET in os.environ:
        return False
    return all([mallopt(option, value) for option, value in _OPTIONS.items()])
