"""Where images are encoded and compared: threads, processes of this machine, or a cluster.

    with processes(4) as engine:
        run = reconstruct_frames(frames, engine=engine)

An engine is a ``Mapped``: results come in the order of the items. The function goes to each worker
once, and its arrays are shared by all workers of a machine; only items travel with the tasks.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import secrets
import shutil
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from feedforward_recon.errors import InputError
from feedforward_recon.io.writers import not_writable
from feedforward_recon.reconstruction.comparisons import Mapped

AHEAD = 64  # tasks that are given out before the oldest is done; chosen by hand
RESTARTS = 3  # times in a row that a task may lose its worker; chosen by hand
REACH_S = 5.0  # to reach a cluster: Ray itself would try for minutes
ALIGNMENT = 64  # bytes, of arrays in a file: a cache line


@contextmanager
def threads(count: int = 0) -> Iterator[Mapped]:
    """Threads of this process; 0: as many as there are cores."""
    with ThreadPoolExecutor(count or os.cpu_count() or 1) as pool:
        yield pool.map


@contextmanager
def processes(count: int) -> Iterator[Mapped]:
    """Processes of this machine, each on one thread.

    One that dies is replaced, and what it was working on is done again. They import the script
    that starts them: what it does belongs below ``if __name__ == '__main__'``. The map raises
    InputError where a task loses its worker again and again, or the disk has no room for the
    function.
    """
    with TemporaryDirectory(prefix='ffrecon-') as folder:
        pool = _Processes(count, Path(folder))
        try:
            yield pool.map
        finally:
            pool.close()


@contextmanager
def cluster(address: str) -> Iterator[Mapped]:
    """Workers of a Ray cluster that runs already: 'auto' for the one here, or host:port.

    Nothing is shared with its machines but the network: images and results travel, and the
    function lies in the object store. Ray starts tasks again whose worker died.
    Raises InputError without Ray or a cluster; the map does where a task loses each worker, or
    the machines have another version of the package.
    """
    ray = _ray()
    was_connected = ray.is_initialized()
    if not was_connected:
        _connect(ray, address)
    try:
        yield _Cluster(ray).map
    finally:
        if not was_connected:
            ray.shutdown()


@dataclass
class _Task:
    item: Any
    future: Future | None = None


class _Processes:
    """A pool of processes that is made again when one of them dies."""

    def __init__(self, count: int, folder: Path) -> None:
        self._count, self._folder = count, folder
        self._function: Callable | None = None
        self._sent = folder
        self._pool = self._started()

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """As ``Mapped``; one after the other."""
        remaining = iter(items)
        tasks: deque[_Task] = deque()
        while True:
            tasks.extend(map(_Task, islice(remaining, AHEAD - len(tasks))))
            if not tasks:
                return
            self._send(function)
            yield self._oldest(tasks)
            tasks.popleft()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._count, multiprocessing.get_context('spawn'), _begin,
                                   (self._folder,))

    def _send(self, function: Callable) -> None:
        if function is not self._function:
            if self._function is not None:
                shutil.rmtree(self._sent)
            self._function, self._sent = function, self._folder / secrets.token_hex(4)
            _write(function, self._sent)

    def _oldest(self, tasks: deque[_Task]) -> Any:
        """The result of the oldest task, once all have been given out."""
        for _ in range(RESTARTS + 1):
            try:
                for task in tasks:
                    task.future = task.future or self._pool.submit(_call, self._sent, task.item)
                return tasks[0].future.result()  # type: ignore[union-attr]
            except BrokenProcessPool:
                self.close()
                self._pool = self._started()
                for task in tasks:
                    if not _has_result(task.future):
                        task.future = None
        raise InputError(f'expected worker processes that live, found one killed {RESTARTS + 1} '
                         'times in a row, most likely for want of memory; give fewer --workers')


def _has_result(future: Future | None) -> bool:
    return future is not None and future.done() and not future.cancelled() \
        and future.exception() is None


class _Cluster:
    """Tasks of a Ray cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._function: Callable | None = None
        self._sent: tuple = ()  # with a reference, which Ray then does not unpack for each task
        self._ahead = max(AHEAD, 2 * int(ray.cluster_resources().get('CPU', 0)))

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """As ``Mapped``; one after the other."""
        call = self._ray.remote(max_retries=RESTARTS)(_call_on_cluster)
        tasks: deque = deque()
        for item in items:
            if function is not self._function:
                self._function, self._sent = function, (self._ray.put(function),)
            tasks.append(call.remote(self._sent, item))
            if len(tasks) == self._ahead:
                yield self._result(tasks.popleft())
        while tasks:
            yield self._result(tasks.popleft())

    def _result(self, task: Any) -> Any:
        try:
            return copy.deepcopy(self._ray.get(task))  # out of the object store
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self._ray.exceptions.RaySystemError):
                raise InputError('expected this version of feedforward_recon on all machines of '
                                 f'the cluster, found {_first_line(error.cause)}; install it '
                                 'there') from error
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise InputError('expected workers of the cluster that live, found one lost '
                             f'{RESTARTS + 1} times in a row ({type(error).__name__}), most '
                             'likely for want of memory; give the cluster more') from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError('expected the package ray for --cluster, found none; '
                         'pip install ray') from None
    return ray


def _connect(ray: Any, address: str) -> None:
    host, colon, port = address.removeprefix('ray://').rpartition(':')
    try:
        if colon:
            socket.create_connection((host, int(port)), REACH_S).close()
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f'{address}: expected a Ray cluster, found none '
                         f'({_first_line(error)}); start one with `ray start --head`, '
                         'or use --workers') from error


def _begin(folder: Path) -> None:
    """Set up a worker process: one thread, ended by its parent alone, and with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _use_one()
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()


def _end_with_parent(folder: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _use_one() -> None:
    """One thread for each worker: images and pairs are too small a job for more."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threadpool_limits(1, user_api='blas')


def _call(sent: Path, item: Any) -> Any:
    return _received(sent)(item)


def _write(function: Callable, folder: Path) -> None:
    """Write a function for workers; its arrays into a file that all of them map."""
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(function, 5, buffer_callback=buffers.append)
    spans = []
    try:
        folder.mkdir()
        with open(folder / 'arrays', 'wb') as file:
            file.write(bytes(ALIGNMENT))  # an empty file cannot be mapped
            for buffer in buffers:
                start, size = file.tell(), file.write(buffer.raw())
                spans.append((start, start + size))
                file.write(bytes(-size % ALIGNMENT))
        (folder / 'rest').write_bytes(pickle.dumps((spans, rest)))
    except OSError as error:
        raise not_writable(folder, error) from None


@lru_cache(maxsize=1)
def _received(folder: Path) -> Callable:
    spans, rest = pickle.loads((folder / 'rest').read_bytes())
    arrays = np.memmap(folder / 'arrays', np.uint8, 'c')  # private if written to, else shared
    return pickle.loads(rest, buffers=[arrays[start:end] for start, end in spans])


def _call_on_cluster(sent: tuple, item: Any) -> Any:
    return _received_on_cluster(sent)(item)


@lru_cache(maxsize=1)
def _received_on_cluster(sent: tuple) -> Callable:
    import ray

    _use_one()
    return ray.get(sent[0])
