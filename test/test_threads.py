"""Threads and freed memory: what the programs of the package set, and when the user decides."""

import os
import subprocess
import sys

import cv2
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from feedforward_recon.console.threads import one_thread

PROGRAM = """
import sys
import threading
import numpy as np
from feedforward_recon.console.heap import give_back_freed_memory, share_heaps

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


def counts():
    """Threads of torch, of OpenCV and of each BLAS."""
    return [torch.get_num_threads(), cv2.getNumThreads(),
            *(pool['num_threads'] for pool in threadpool_info() if pool['user_api'] == 'blas')]


def test_one_thread_is_given_back_and_the_user_decides(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    before = torch.get_num_threads(), cv2.getNumThreads()
    with threadpool_limits(2, user_api='blas'):
        torch.set_num_threads(2)
        cv2.setNumThreads(2)
        several = counts()  # a single core gives BLAS no more than one
        assert several[:2] == [2, 2]
        with one_thread():
            assert set(counts()) == {1}
        assert counts() == several
        monkeypatch.setenv('OMP_NUM_THREADS', '2')
        with one_thread():
            assert counts() == several
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
