"""What a node knows about itself and its inputs: counts, rates, latencies, faults.

Nothing here needs ROS. Times are nanoseconds of the node's clock (simulated time where the node
uses it). Everything is bounded.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import cv2
import numpy as np

from feedforward_recon.mapping.preparation import is_in_another_unit

SECOND = 1_000_000_000
RECENT_NS = 10 * SECOND  # a fault is reported for this long after it happened
AHEAD_NS = 10 * SECOND  # stamps that run ahead of the clock by more at once have jumped
BLACK, WHITE, FLAT = 16, 239, 4  # gray levels: 98 % of the pixels below, above, within
# Mean absolute Laplacian over contrast, of cells of 4 x 4 pixels: their mean holds little of the
# noise and the rounding that make every blurred image look sharp. Of 290 images of 11 real sets
# one lies below; after a Gaussian blur of 8 px and noise of 2 gray levels all do, of 5 px 5 of 6.
BLURRED = 0.16
CELL = 4
FEW_DEPTHS = 0.01  # share of pixels below which a depth image holds no measurement


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
class InputHealth:
    """One subscribed topic.

    kind: 'image', 'camera_info', 'depth' or 'odom'. needed: nothing works without it.
    reliable: how this side subscribes. publishers: as the graph shows them, None before it was
    looked at. published_ns: since when somebody publishes it, None while nobody does.
    alternatives: other topics that could be meant. lost, unmatched: totals of the events "message
    lost" and "incompatible QoS". offset_ns: clock minus newest stamp.
    """

    topic: str
    kind: str = 'image'
    needed: bool = True
    reliable: bool = True
    publishers: tuple[Publisher, ...] | None = None
    published_ns: int | None = None
    alternatives: tuple[str, ...] = ()
    lost: int = 0
    unmatched: int = 0
    messages: int = 0
    nbytes: int = 0
    size_wh: tuple[int, int] | None = None
    size_before: tuple[int, int] | None = None
    frame_id: str | None = None
    stamp_ns: int | None = None
    offset_ns: int = 0
    arrived_ns: int | None = None
    faults: Counter[StampFault] = field(default_factory=Counter)
    rate: RateMeter = field(default_factory=RateMeter)
    _last: dict[str, int] = field(default_factory=dict)

    def received(self, now_ns: int, stamp_ns: int, *, size_wh: tuple[int, int] | None = None,
                 nbytes: int = 0, frame_id: str | None = None,
                 jump_ns: int = SECOND) -> StampFault | None:
        """Note a message; returns what is wrong with its stamp."""
        elapsed_ns = now_ns - self.arrived_ns if self.arrived_ns is not None else 0
        fault = stamp_fault(stamp_ns, self.stamp_ns, elapsed_ns, jump_ns)
        if fault is not None:
            self.faults[fault] += 1
            self._last[fault] = now_ns
        if size_wh is not None and self.size_wh not in (None, size_wh):
            self.size_before, self._last['size'] = self.size_wh, now_ns
        self.size_wh = size_wh or self.size_wh
        self.nbytes, self.frame_id = nbytes or self.nbytes, frame_id
        if fault is not StampFault.REVERSED:  # later ones are compared with the newest
            self.stamp_ns = stamp_ns
        self.arrived_ns, self.offset_ns = now_ns, now_ns - stamp_ns
        self.messages += 1
        self.rate.add(now_ns)
        return fault

    def published(self, publishers: tuple[Publisher, ...], now_ns: int) -> None:
        """The graph shows who publishes the topic."""
        self.publishers = publishers
        if not publishers:
            self.published_ns = None
        elif self.published_ns is None:
            self.published_ns = now_ns

    def resubscribed(self, reliable: bool) -> None:
        """This side subscribed anew; what the old subscription lost no longer matters."""
        self.reliable, self.lost, self.unmatched = reliable, 0, 0
        self._last.pop('lost', None)

    def lost_total(self, total: int, now_ns: int) -> None:
        """The transport says how many messages this subscription has lost."""
        if total > self.lost:
            self._last['lost'] = now_ns
        self.lost = total

    def recently(self, what: str, now_ns: int) -> bool:
        """True if a StampFault, 'size' (change) or 'lost' happened in the last seconds."""
        return what in self._last and abs(now_ns - self._last[what]) <= RECENT_NS


class ImageWatch:
    """Looks at the pixels: images and depth that cannot be mapped, and for how many frames.

    faults: fault now -> consecutive images with it. Codes: BLACK, WHITE, FLAT, BLURRED,
    REPEATED, DEPTH_EMPTY, DEPTH_UNIT.
    """

    def __init__(self) -> None:
        self.faults: dict[str, int] = {}
        self._before: np.ndarray | None = None

    def look(self, image: np.ndarray, depth: np.ndarray | None = None) -> None:
        """Judge one image [H, W, 3] uint8 and its depth [H, W], if any, in about a millisecond."""
        sample = np.ascontiguousarray(image[::4, ::4])
        now = {_picture_fault(image, sample)}
        if self._before is not None and np.array_equal(sample, self._before):
            now.add('REPEATED')
        if depth is not None and _measured_share(depth) < FEW_DEPTHS:
            now.add('DEPTH_EMPTY')
        if depth is not None and is_in_another_unit(depth):
            now.add('DEPTH_UNIT')
        self._before = sample
        self.faults = {code: self.faults.get(code, 0) + 1 for code in sorted(now - {''})}


def _picture_fault(image: np.ndarray, sample: np.ndarray) -> str:
    low, high = np.percentile(sample, (2, 98))
    if high < BLACK:
        return 'BLACK'
    if low > WHITE:
        return 'WHITE'
    if high - low < FLAT:
        return 'FLAT'
    height, width = image.shape[:2]
    middle = image[height // 4:height - height // 4, width // 4:width - width // 4, 1]
    cells = cv2.resize(middle.astype(np.float32), None, fx=1 / CELL, fy=1 / CELL,
                       interpolation=cv2.INTER_AREA)
    detail = np.abs(cv2.Laplacian(cells, cv2.CV_32F)).mean()
    return 'BLURRED' if detail < BLURRED * sample[..., 1].std() else ''


def _measured_share(depth: np.ndarray) -> float:
    sample = depth[::4, ::4]
    return float(np.mean(np.isfinite(sample) & (sample > 0)))


class InfoState(str, Enum):
    """What is known of the calibration of the camera."""

    UNKNOWN = 'UNKNOWN'
    GOOD = 'GOOD'
    MISSING = 'MISSING'
    ZERO = 'ZERO'
    OTHER_SIZE = 'OTHER_SIZE'


def info_state(K: Sequence[float], info_wh: tuple[int, int],
               image_wh: tuple[int, int] | None) -> InfoState:
    """Judge a CameraInfo: K, row by row (9), for images of ``info_wh``, against the images."""
    if K[0] <= 0 or K[4] <= 0:
        return InfoState.ZERO
    if image_wh is not None and info_wh != image_wh:
        return InfoState.OTHER_SIZE
    return InfoState.GOOD


@dataclass(frozen=True)
class Warned:
    """Something a node noticed: what to do about it, how often, and when last."""

    code: str
    sentence: str
    times: int
    last_ns: int


@dataclass
class Health:
    """Everything that is known about a node now.

    state: of its life cycle. paused: somebody asked to leave images unused. mode, status,
    reason: as in ``types.Estimate``. has_map: there is something to localise in. frames, dropped,
    refused: images used, given up in the queue, and not usable. latency: image stamp or arrival
    to pose, milliseconds. info_wh: what CameraInfo describes. window: what the window of a network
    waits for. tf_missing: (parent, child) frames that TF does not connect. conversions: what
    converts which message, as chosen at start. clock_running: False while simulated time stands
    at 0.
    """

    name: str
    state: str = 'unconfigured'
    paused: bool = False
    mode: str = 'mapping'
    status: str = 'INITIALISING'
    reason: str = ''
    has_map: bool = False
    active_since_ns: int = 0
    use_sim_time: bool = False
    clock_running: bool = True
    frames: int = 0
    dropped: int = 0
    refused: int = 0
    keyframes: int = 0
    memory_bytes: int = 0
    window: str = ''
    scale_source: str = 'unknown'
    camera_source: str = ''
    camera_info: InfoState = InfoState.UNKNOWN
    info_wh: tuple[int, int] | None = None
    tf_mode: str = ''
    tf_missing: tuple[tuple[str, str], ...] = ()
    conversions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, InputHealth] = field(default_factory=dict)
    pictures: ImageWatch = field(default_factory=ImageWatch)
    latency: Percentiles = field(default_factory=Percentiles)
    poses: RateMeter = field(default_factory=RateMeter)
    warnings: dict[str, Warned] = field(default_factory=dict)

    def warn(self, code: str, sentence: str, now_ns: int) -> None:
        """Note something noticed; it is one of the causes for a while."""
        before = self.warnings.get(code)
        times = before.times + 1 if before else 1
        self.warnings[code] = Warned(code, sentence, times, now_ns)
