"""``Seconds``: what took how long, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Seconds:
    """Wall time of parts of a computation; parts of one name add up, in the order they came.

    device: what computes them; a part ends when it has done all that it was told.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._parts: dict[str, float] = {}
        self._device = device

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        before = time.perf_counter()
        try:
            yield
        finally:
            if self._device is not None and self._device.type == 'cuda':
                torch.cuda.synchronize(self._device)
            self.add({name: time.perf_counter() - before})

    def add(self, parts: Mapping[str, float]) -> None:
        """Seconds that were measured elsewhere."""
        for name, seconds in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        return dict(self._parts)
