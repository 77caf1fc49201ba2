"""Brings images and their partners of one moment together: depth, or the right image of a pair."""

from __future__ import annotations

from collections import deque
from typing import Any

WAITING_IMAGES = 8


class DepthPairing:
    """Pairs each image with the depth of its moment; both must come in order.

    Images wait for their depth until a later depth image shows that there is none, and never
    more than ``patience`` of them. Each depth image serves one image, the nearest that waits:
    frames may follow each other faster than the slop. Stamps are nanoseconds.
    """

    def __init__(self, slop_ns: int, patience: int = WAITING_IMAGES) -> None:
        self.slop_ns, self.patience = slop_ns, patience
        self._images: deque[tuple[int, Any]] = deque()
        self._depths: deque[tuple[int, Any]] = deque(maxlen=patience)

    def forget_after(self, stamp: int) -> None:
        """The time line went back to a stamp: what waits with later ones is of the past."""
        for waiting in (self._images, self._depths):
            kept = [entry for entry in waiting if entry[0] <= stamp]
            waiting.clear()
            waiting.extend(kept)

    def add_image(self, stamp: int, image: Any) -> list[tuple[Any, Any | None]]:
        """Take an image; returns what is ready, as (image, depth or None)."""
        self._images.append((stamp, image))
        return self._ready()

    def add_depth(self, stamp: int, depth: Any) -> list[tuple[Any, Any | None]]:
        """Take a depth image; returns what is ready, as (image, depth or None)."""
        self._depths.append((stamp, depth))
        return self._ready()

    def give_up(self) -> list[tuple[Any, None]]:
        """The images that wait: no partner is expected any more."""
        waiting = [(image, None) for _, image in self._images]
        self._images.clear()
        return waiting

    def _ready(self) -> list[tuple[Any, Any | None]]:
        ready = []
        while self._images:
            stamp, image = self._images[0]
            near = self._nearest(stamp)
            if near is not None:
                ready.append((image, near[1]))
                while self._depths.popleft() is not near:
                    pass
            elif len(self._images) > self.patience \
                    or (self._depths and self._depths[-1][0] > stamp + self.slop_ns):
                ready.append((image, None))
            else:
                break
            self._images.popleft()
        return ready

    def _nearest(self, stamp: int) -> tuple[int, Any] | None:
        """The depth for the oldest image, unless a younger image is nearer to it."""
        near = min(self._depths, key=lambda depth: abs(depth[0] - stamp), default=None)
        if near is None:
            return None
        gap_ns = min(abs(near[0] - waiting) for waiting, _ in self._images)
        return near if abs(near[0] - stamp) == gap_ns <= self.slop_ns else None
