"""Threads and freed memory: what the programs of the package set, and when the user decides."""

import os
import subprocess
import sys

import numpy as np
import pytest

from feedforward_recon.threads import _knobs, one_thread

PROGRAM = """
import threading
import numpy as np
from feedforward_recon.heap import give_back_freed_memory

def resident_mb():
    return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6

done = give_back_freed_memory()
before = resident_mb()

def work():
    warm = np.ones(30_000_000, np.uint8)  # glibc learns from it that such blocks come and go
    del warm
    blocks = [np.ones(10_000_000, np.uint8) for _ in range(10)]
    blocks = blocks[-1:]  # the newest stays, and holds what lies below it
    kept.append(blocks)

kept = []
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(done, resident_mb() - before)
"""


def program(**variables):
    plain = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    words = subprocess.run([sys.executable, '-c', PROGRAM], env={**plain, **variables}, text=True,
                           capture_output=True, check=True).stdout.split()
    return words[0], float(words[1])


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc of Linux')
def test_freed_blocks_go_back_to_the_system():
    assert program() == ('True', pytest.approx(20, abs=10))


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc of Linux')
def test_the_user_decides_how_memory_is_kept():
    done, kept_mb = program(MALLOC_ARENA_MAX='4')
    assert done == 'False' and kept_mb > 40


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


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc of Linux')
def test_the_openblas_of_numpy_is_found_where_it_has_one():
    blas = np.show_config('dicts')['Build Dependencies']['blas']['name']
    if 'openblas' not in blas:
        pytest.skip(f'NumPy computes with {blas}')
    assert len(_knobs()) > 2
