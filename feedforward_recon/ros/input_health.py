"""What is known of one subscribed topic: who publishes it, what arrived, which stamps are wrong.

Nothing here needs ROS. Times are nanoseconds of the node's clock.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from feedforward_recon.ros.meters import SECOND, RateMeter

RECENT_NS = 10 * SECOND  # a fault is reported for this long after it happened
CALIBRATIONS = ('camera_info', 'right_info')  # of whatever time, one message is enough
AHEAD_NS = 10 * SECOND  # stamps that run ahead of the clock by more at once have jumped


def is_recent(then_ns: int | None, now_ns: int) -> bool:
    """True if something happened in the last seconds; a clock that went back counts as near."""
    return then_ns is not None and abs(now_ns - then_ns) <= RECENT_NS


class StampFault(str, Enum):
    """What can be wrong with the stamp of a message, seen from the one before."""

    ZERO = 'ZERO'
    EQUAL = 'EQUAL'
    REVERSED = 'REVERSED'
    JUMP_BACK = 'JUMP_BACK'
    JUMP_AHEAD = 'JUMP_AHEAD'


def stamp_fault(stamp_ns: int, before_ns: int | None, elapsed_ns: int,
                jump_ns: int) -> StampFault | None:
    """What is wrong with a stamp, or None.

    before_ns: stamp of the message before, None for the first. elapsed_ns: what the clock says
    has passed since then. jump_ns: stamps that go back by more have jumped, by less are reversed.
    """
    if stamp_ns == 0:
        return StampFault.ZERO
    if before_ns is None or before_ns == 0:
        return None
    step_ns = stamp_ns - before_ns
    if step_ns == 0:
        return StampFault.EQUAL
    if step_ns < 0:
        return StampFault.JUMP_BACK if -step_ns > jump_ns else StampFault.REVERSED
    return StampFault.JUMP_AHEAD if step_ns - max(elapsed_ns, 0) > AHEAD_NS else None


@dataclass(frozen=True)
class Publisher:
    """Who publishes a topic, and whether reliably."""

    node: str
    reliable: bool


@dataclass
class Connection:
    """How a topic is published, and how this side subscribes.

    reliable: this side asks for reliable delivery. publishers: as the graph shows them, None
    before it was looked at. published_ns: since when somebody publishes the topic, None while
    nobody does. alternatives: other topics that could be meant. lost, unmatched: totals of the
    events "message lost" and "incompatible QoS". lost_ns: when the last message was lost.
    """

    reliable: bool = True
    publishers: tuple[Publisher, ...] | None = None
    published_ns: int | None = None
    alternatives: tuple[str, ...] = ()
    lost: int = 0
    lost_ns: int | None = None
    unmatched: int = 0

    def published(self, publishers: tuple[Publisher, ...], now_ns: int) -> None:
        """The graph shows who publishes the topic."""
        self.publishers = publishers
        if not publishers:
            self.published_ns = None
        elif self.published_ns is None:
            self.published_ns = now_ns

    def resubscribed(self, reliable: bool) -> None:
        """This side subscribed anew; what the old subscription lost no longer matters."""
        self.reliable, self.lost, self.unmatched, self.lost_ns = reliable, 0, 0, None

    def lost_total(self, total: int, now_ns: int) -> None:
        """The transport says how many messages this subscription has lost."""
        if total > self.lost:
            self.lost_ns = now_ns
        self.lost = total


@dataclass
class Traffic:
    """The messages that arrived on a topic.

    stamp_ns: newest stamp. offset_ns: clock minus the stamp of the last message. arrived_ns: when
    the last message came, None before the first. size_before: image size before the last change,
    at size_changed_ns. faults: stamp faults so far; fault_ns: when each happened last.
    """

    messages: int = 0
    nbytes: int = 0
    size_wh: tuple[int, int] | None = None
    size_before: tuple[int, int] | None = None
    size_changed_ns: int | None = None
    frame_id: str | None = None
    stamp_ns: int | None = None
    offset_ns: int = 0
    arrived_ns: int | None = None
    faults: Counter[StampFault] = field(default_factory=Counter)
    fault_ns: dict[StampFault, int] = field(default_factory=dict)
    rate: RateMeter = field(default_factory=RateMeter)

    def received(self, now_ns: int, stamp_ns: int, *, size_wh: tuple[int, int] | None = None,
                 nbytes: int = 0, frame_id: str | None = None,
                 jump_ns: int = SECOND) -> StampFault | None:
        """Note a message; returns what is wrong with its stamp."""
        elapsed_ns = now_ns - self.arrived_ns if self.arrived_ns is not None else 0
        fault = stamp_fault(stamp_ns, self.stamp_ns, elapsed_ns, jump_ns)
        if fault is not None:
            self.faults[fault] += 1
            self.fault_ns[fault] = now_ns
        if size_wh is not None and self.size_wh not in (None, size_wh):
            self.size_before, self.size_changed_ns = self.size_wh, now_ns
        self.size_wh = size_wh or self.size_wh
        self.nbytes, self.frame_id = nbytes or self.nbytes, frame_id
        if fault is not StampFault.REVERSED:  # later ones are compared with the newest
            self.stamp_ns = stamp_ns
        self.arrived_ns, self.offset_ns = now_ns, now_ns - stamp_ns
        self.messages += 1
        self.rate.add(now_ns)
        return fault


@dataclass
class InputHealth:
    """One subscribed topic.

    kind: 'image', 'camera_info', 'depth', 'right', 'right_info' or 'odom'. needed: nothing works
    without it.
    """

    topic: str
    kind: str = 'image'
    needed: bool = True
    connection: Connection = field(default_factory=Connection)
    traffic: Traffic = field(default_factory=Traffic)
