"""How the C library keeps the memory that a process has freed."""

from __future__ import annotations

import ctypes
import os
from typing import Any

M_ARENA_MAX = -8  # parameter of mallopt(3) in glibc
HEAPS = 2  # shared by all threads
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # more of these parameters


def share_heaps() -> None:
    """Have glibc keep two heaps for all threads, not one for each of them.

    A user who sets MALLOC_ARENA_MAX has decided.
    """
    mallopt = _function('mallopt')
    if mallopt is not None and 'MALLOC_ARENA_MAX' not in os.environ:
        mallopt(M_ARENA_MAX, HEAPS)


def give_back_freed_memory() -> None:
    """Hand the free pages of all heaps to the system; milliseconds.

    glibc learns to keep blocks of up to 32 MB: the clouds and matrices that come and go while
    mapping leave holes that stay resident. Handing each block back at once (M_MMAP_THRESHOLD)
    costs a tenth to a third of the time of an image in page faults, this now and then does not.
    """
    trim = _function('malloc_trim')
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Have glibc keep all that was freed for what is allocated next: for a process that trains.

    A step allocates the same tensors again, and fresh pages for each cost some percent of its
    time. A user who sets MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ has decided.
    """
    mallopt = _function('mallopt')
    for parameter, value, variable in ((M_TRIM_THRESHOLD, -1, 'MALLOC_TRIM_THRESHOLD_'),
                                       (M_MMAP_MAX, 0, 'MALLOC_MMAP_MAX_')):
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, value)


def _function(name: str) -> Any:
    """A function of the C library; None where that is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == 'posix' else None
