"""How many threads torch, OpenCV and the BLAS of NumPy and SciPy compute with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, everything computes on one thread: a single image is too small a job for more.

    Threads that wait for each other do so actively, which costs more than they save. A user
    who sets OMP_NUM_THREADS has decided, and nothing is changed.
    """
    before = torch.get_num_threads(), cv2.getNumThreads()
    with threadpool_limits(None):  # which gives back what changes within
        use_one_thread()
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            cv2.setNumThreads(before[1])


def use_one_thread() -> None:
    """One thread from now on, for the programs of the package; libraries use ``one_thread``."""
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        threadpool_limits(1, user_api='blas')
