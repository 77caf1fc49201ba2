"""What a node knows about itself and its inputs: counts, rates, latencies, faults.

Nothing here needs ROS. Times are nanoseconds of the node's clock (simulated time where the node
uses it). Everything is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from feedforward_recon.ros.image_watch import ImageWatch
from feedforward_recon.ros.input_health import InputHealth
from feedforward_recon.ros.meters import Percentiles, RateMeter

if TYPE_CHECKING:
    from feedforward_recon.session.live import SessionInfo
    from feedforward_recon.types import Estimate


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
class NodeWarning:
    """Something that happened to a node: code, sentence with a remedy, how often, when last."""

    code: str
    sentence: str
    times: int
    last_ns: int


@dataclass
class Health:
    """Everything that is known about a node now; `diagnosis` judges it, `diagnostics` shows it.

    state: of its life cycle. paused: somebody asked to leave images unused. mode, status,
    reason: as in ``types.Estimate``. has_map: there is something to localise in. frames, dropped,
    refused: images used, given up in the queue, and not usable. latency: milliseconds
    from the arrival of an image to its pose. info_wh: image size in CameraInfo. window: what the
    window of a feed-forward network waits for. tf_missing: (parent, child) frames that TF does
    not connect. conversions: library -> what converts messages in its place, chosen at start.
    clock_running: False while simulated time stands at 0.
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
    warnings: dict[str, NodeWarning] = field(default_factory=dict)

    def warn(self, code: str, sentence: str, now_ns: int) -> None:
        """Note something that happened; it is among the diagnoses for a while."""
        before = self.warnings.get(code)
        times = before.times + 1 if before else 1
        self.warnings[code] = NodeWarning(code, sentence, times, now_ns)

    def used_image(self, info: SessionInfo, estimate: Estimate) -> None:
        """The session made an estimate of another image, and stands where info says."""
        self.status, self.reason = estimate.status.value, estimate.reason
        self.mode, self.keyframes = info.mode, info.keyframes
        self.memory_bytes, self.window = info.memory_bytes, info.window
        self.scale_source, self.camera_source = info.scale_source, info.camera_source
        self.has_map = info.has_map

    def new_map(self, info: SessionInfo) -> None:
        """The session has another map than before; nothing was seen in it yet."""
        self.status, self.reason = 'INITIALISING', ''
        self.mode, self.keyframes = info.mode, info.keyframes
        self.has_map, self.scale_source = info.has_map, info.scale_source

    def posed(self, latency_ms: float, now_ns: int) -> None:
        """A pose was published, so long after its image had arrived."""
        self.latency.add(latency_ms)
        self.poses.add(now_ns)
