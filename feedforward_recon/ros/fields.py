"""The fields every message has: stamps, headers, and arrays written without a loop."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from std_msgs.msg import Header

SECOND_NS = 1_000_000_000


def stamp_ns(header_or_stamp: Any) -> int:
    """Nanoseconds of a std_msgs/Header or builtin_interfaces/Time."""
    stamp = getattr(header_or_stamp, 'stamp', header_or_stamp)
    return stamp.sec * SECOND_NS + stamp.nanosec


def stamp_msg(ns: int) -> Time:
    """The Time of nanoseconds."""
    sec, nanosec = divmod(int(ns), SECOND_NS)
    return Time(sec=sec, nanosec=nanosec)


def header_msg(frame_id: str, ns: int) -> Header:
    """A header."""
    return Header(stamp=stamp_msg(ns), frame_id=frame_id)


def fill(field: array, content: np.ndarray) -> None:
    """Replace what is in an array field (``msg.data``) by the bytes of ``content``.

    The array of the message is written in place: assigning to the field is checked byte by byte
    on Humble (minutes for a map) and copied element by element elsewhere.
    """
    del field[:]
    field.frombytes(np.ascontiguousarray(content).reshape(-1).view(np.uint8).data)
