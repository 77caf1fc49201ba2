"""``Seconds``: what took how long, by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


def _nothing() -> None:
    """Nothing to wait for."""


class Seconds:
    """Wall time of parts of a computation; parts of one name add up, in the order they came.

    settled: waits until a device has done what it was told.
    """

    def __init__(self, settled: Callable[[], None] = _nothing) -> None:
        self._parts: dict[str, float] = {}
        self._settled = settled

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._settled()
            self.add({name: time.perf_counter() - before})

    def add(self, parts: Mapping[str, float]) -> None:
        """Seconds that were measured elsewhere."""
        for name, seconds in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return dict(self._parts)
