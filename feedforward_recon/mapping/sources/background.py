"""``BackgroundCall``: one call on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar('T')


class BackgroundCall(Generic[T]):
    """Starts a call at once. ``done`` is called on its thread when it has ended.

    A daemon thread, unlike those of ``concurrent.futures``: a process that ends does not wait for
    a network.
    """

    def __init__(self, call: Callable[[], T], done: Callable[[], None]) -> None:
        self._call, self._done = call, done
        self._results: list[T] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name='network', daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except Exception as error:  # raised where the result is asked for
            self._errors.append(error)
        self._done()

    @property
    def is_running(self) -> bool:
        """The call has not ended."""
        return self._thread.is_alive()

    def result(self) -> T:
        """What the call returned; waits for it. Raises what it raised."""
        self._thread.join()
        if self._errors:
            raise self._errors[0]
        return self._results[0]
