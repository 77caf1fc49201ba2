"""Threads and freed memory: what the programs of the package set, and when the user decides."""

import os
import subprocess
import sys

import cv2
import pytest
import torch

from feedforward_recon.threads import one_thread

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
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(2)
        cv2.setNumThreads(2)
        with one_thread():
            assert (torch.get_num_threads(), cv2.getNumThreads()) == (1, 1)
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
        monkeypatch.setenv('OMP_NUM_THREADS', '2')
        with one_thread():
            assert (torch.get_num_threads(), cv2.getNumThreads()) == (2, 2)
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
