"""How many threads torch and OpenCV compute with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch and OpenCV compute on one thread: a single image is too small a job for more.

    Threads that wait for each other do so actively, which costs more than they save. A user
    who sets OMP_NUM_THREADS has decided, and nothing is changed.
    """
    before, before_opencv = torch.get_num_threads(), cv2.getNumThreads()
    use_one_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cv2.setNumThreads(before_opencv)


def use_one_thread() -> None:
    """One thread from now on, for the programs of the package; libraries use ``one_thread``."""
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
