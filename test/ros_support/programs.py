"""Python programs as processes: a new interpreter, or a fork that has imported everything.

Importing torch takes two to four seconds, and nearly every test starts a node.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

# What nodes and player import, but not the programs themselves: those run anew each time.
PRELOADED = ('feedforward_recon.ros.run', 'feedforward_recon.ros.playback',
             'feedforward_recon.synthetic', 'rosgraph_msgs.msg')


class FreshProcess(subprocess.Popen):
    """``python -m`` with these words in a process group of its own; output goes to log."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start it."""
        with log.open('w') as output:
            super().__init__([sys.executable, '-m', *words], stdout=output,
                             stderr=subprocess.STDOUT, start_new_session=True, env=environment)


class WarmProcess:
    """The same as a fork of a server, with what the harness needs of ``subprocess.Popen``."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start it."""
        log.write_bytes(b'')
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(list(PRELOADED))
        with mock.patch.dict(os.environ, {'PYTHONPATH': environment['PYTHONPATH']}):
            forkserver.ensure_running()
        self._words = tuple(words)
        self._process = context.Process(target=_become,
                                        args=(self._words, log, dict(environment)))
        self._process.start()
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.002)  # a signal to the group would find nobody

    @property
    def pid(self) -> int:
        """Process id, which is also that of the group."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Exit code; raises TimeoutExpired when it takes longer."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._words, timeout)
        return code


def _become(words: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """In the new process: be what ``python -m`` would be."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False)  # noqa: SIM115
                              for number in (1, 2))
    sys.argv = list(words)
    runpy.run_module(words[0], run_name='__main__', alter_sys=True)
    gc.collect()  # what is left of a node leaves the graph, as when an interpreter ends
