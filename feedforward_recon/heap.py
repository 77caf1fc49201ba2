"""How the C library keeps the memory that a process has freed."""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt(3) in glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BYTES = 1 << 20  # blocks from this size on are given back to the system when freed
KEPT_BYTES = 8 << 20  # free memory at the end of the heap that is kept
HEAPS = 2  # shared by all threads


def give_back_freed_memory() -> bool:
    """Have large blocks go back to the system at once; False where the C library cannot.

    By default glibc learns to keep blocks of up to 32 MB, in a heap for every thread: the clouds
    and matrices that come and go while mapping leave holes that no other thread uses.
    A user who sets glibc's own variables (MALLOC_ARENA_MAX and the like) has decided.
    """
    if any(name.startswith('MALLOC_') for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
    if mallopt is None:
        return False
    settings = ((M_MMAP_THRESHOLD, LARGE_BYTES), (M_TRIM_THRESHOLD, KEPT_BYTES),
                (M_ARENA_MAX, HEAPS))
    return all(mallopt(name, value) == 1 for name, value in settings)
