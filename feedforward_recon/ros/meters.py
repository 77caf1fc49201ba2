"""Rates and percentiles of what a node does. Bounded, and nothing here needs ROS."""

from __future__ import annotations

from collections import deque

import numpy as np

SECOND = 1_000_000_000


class RateMeter:
    """Rate of events over the last ``window_s`` seconds, from at most ``size`` of them."""

    def __init__(self, window_s: float = 5.0, size: int = 512) -> None:
        self._window_ns = int(window_s * SECOND)
        self._times: deque[int] = deque(maxlen=size)

    def add(self, now_ns: int) -> None:
        """Note one event; a clock that went back starts the measurement again."""
        if self._times and now_ns < self._times[-1]:
            self._times.clear()
        self._times.append(now_ns)

    def rate_hz(self, now_ns: int) -> float:
        """Events per second, 0 without two recent ones."""
        recent = [time for time in self._times if time > now_ns - self._window_ns]
        span_ns = now_ns - recent[0] if recent else 0
        return (len(recent) - 1) * SECOND / span_ns if span_ns > 0 else 0.0


class Percentiles:
    """Percentiles of the newest ``size`` values."""

    def __init__(self, size: int = 512) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Note one value."""
        self._values.append(value)

    def at(self, *percents: float) -> tuple[float, ...] | None:
        """The values below which so many percent lie; None while there are no values."""
        if not self._values:
            return None
        return tuple(float(v) for v in np.percentile(list(self._values), percents))
