"""Lets a process that computes on a CPU keep the memory that it frees.

A layer's activations are allocated and freed in every layer of every step. glibc returns blocks of this size to the
kernel at once, which then zeroes and maps every page anew: for an MLP of 8,192 tokens that takes as long as a third of
its arithmetic.
"""

import ctypes

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30  # that may be free at the heap's end; blocks beyond this size are still returned


def keep_freed_memory() -> bool:
    """Return whether this process keeps what it frees from now on: only where its C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, KEPT_BYTES) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
