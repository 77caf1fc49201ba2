"""Threads and freed memory: what the programs of the package set, and when the user decides."""

import os
import subprocess
import sys

import numpy as np
import pytest

from feedforward_recon.threads import _knobs, one_thread

PROGRAM = """
import sys
import threading
import numpy as np
from feedforward_recon.heap import give_back_freed_memory, share_heaps

def resident_mb():
    return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6

share_heaps()
before = resident_mb()

def work():
    warm = np.ones(30_000_000, np.uint8)  # glibc learns from it that such blocks come and go
    del warm
    blocks = [np.ones(10_000_000, np.uint8) for _ in range(10)]
    kept.append(blocks[-1])  # the newest stays, and holds what lies below it

kept = []
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
held = resident_mb() - before
give_back_freed_memory()
print(held, resident_mb() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc: needs Linux')
def test_freed_memory_goes_back_to_the_system():
    variables = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    held_mb, left_mb = map(float, subprocess.run(
        [sys.executable, '-c', PROGRAM], env=variables, text=True, capture_output=True,
        check=True).stdout.split())
    assert held_mb > 50 and left_mb == pytest.approx(20, abs=10)


def test_one_thread_is_given_back_and_the_user_decides(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    knobs = _knobs()
    before = [count() for count, _ in knobs]
    try:
        for _, change in knobs:
            change(2)
        several = [count() for count, _ in knobs]  # a single core gives BLAS no more than one
        with one_thread():
            assert {count() for count, _ in knobs} == {1}
        assert [count() for count, _ in knobs] == several and several[:2] == [2, 2]
        monkeypatch.setenv('OMP_NUM_THREADS', '2')
        with one_thread():
            assert [count() for count, _ in knobs] == several
    finally:
        for (_, change), count in zip(knobs, before, strict=True):
            change(count)


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc: needs Linux')
def test_the_openblas_of_numpy_is_found_where_it_has_one():
    blas = np.show_config('dicts')['Build Dependencies']['blas']['name']
    if 'openblas' not in blas:
        pytest.skip(f'NumPy has no OpenBLAS but {blas}')
    assert len(_knobs()) > 2
