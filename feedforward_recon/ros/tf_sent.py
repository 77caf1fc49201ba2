"""Which transforms on /tf are our own: a node also receives what it sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KEPT = 1024  # newest transforms; our own come back within milliseconds


class SentTransforms:
    """Remembers the newest transforms that were sent, to the last bit."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], None] = {}  # in the order of sending

    def add(self, transforms: Iterable[Any]) -> None:
        """Remember geometry_msgs/TransformStamped messages; call it before they are sent."""
        self._kept.update((_content(stamped), None) for stamped in transforms)
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]

    def __contains__(self, stamped: Any) -> bool:
        """True for a message that was sent."""
        return _content(stamped) in self._kept


def _content(stamped: Any) -> tuple[Any, ...]:
    header, at, turn = stamped.header, stamped.transform.translation, stamped.transform.rotation
    return (header.frame_id.lstrip('/'), stamped.child_frame_id.lstrip('/'), header.stamp.sec,
            header.stamp.nanosec, at.x, at.y, at.z, turn.x, turn.y, turn.z, turn.w)
