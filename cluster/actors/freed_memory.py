"""Lets a process that computes on a CPU keep the memory that it frees.

A layer's activations are allocated and freed in every layer of every step. glibc may return blocks of their size to the
kernel, depending on how they lie, and the kernel then zeroes and maps every page anew.
"""

import ctypes

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 28  # that may be free at the heap's end; larger blocks are still returned


def keep_freed_memory() -> bool:
    """Return whether this process keeps what it frees from now on: only where its C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, KEPT_BYTES) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
