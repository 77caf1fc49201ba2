"""How many threads torch, OpenCV and the BLAS of NumPy and SciPy compute with."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import torch

LOADED = Path('/proc/self/maps')  # on Linux, the files that this process has loaded
# Names in a plain OpenBLAS and in those that the wheels of NumPy and SciPy bring.
OPENBLAS_NAMES = ('openblas_{}', 'openblas_{}64_', 'scipy_openblas_{}', 'scipy_openblas_{}64_')
Knob = tuple[Callable[[], int], Callable[[int], object]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, everything computes on one thread: a single image is too small a job for more.

    Threads that wait for each other do so actively, which costs more than they save. A user
    who sets OMP_NUM_THREADS has decided, and nothing is changed.
    """
    before = [(change, count()) for count, change in _knobs()]
    use_one_thread()
    try:
        yield
    finally:
        for change, count in before:
            change(count)


def use_one_thread() -> None:
    """One thread from now on, for the programs of the package; libraries use ``one_thread``."""
    if 'OMP_NUM_THREADS' not in os.environ:
        for _, change in _knobs():
            change(1)


def _knobs() -> list[Knob]:
    """For each library: how many threads it has, and how to give it another number."""
    return [(torch.get_num_threads, torch.set_num_threads),
            (cv2.getNumThreads, cv2.setNumThreads), *_openblas()]


def _openblas() -> list[Knob]:
    """OpenBLAS, once for each copy of it that was loaded; it asks its variable only then."""
    try:
        lines = LOADED.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return []  # another system: there NumPy keeps as many threads as it likes
    files = {line.split(maxsplit=5)[5] for line in lines if 'openblas' in line}
    found = []
    for library in map(ctypes.CDLL, sorted(file for file in files if os.path.exists(file))):
        for name in OPENBLAS_NAMES:
            count = getattr(library, name.format('get_num_threads'), None)
            change = getattr(library, name.format('set_num_threads'), None)
            if count is not None and change is not None:
                found.append((count, change))
    return found
