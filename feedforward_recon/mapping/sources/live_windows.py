"""``LiveWindows``: windows of a feed-forward network, filled by a camera that is running.

    frame -> followed in the map as it is: a pose at once, or none
          -> if it shows something new: a view, which waits for the window
    window full, or the camera leaves what is mapped
          -> predict, on a thread of its own -> place in the map
          -> view after view to the mapper: keyframes, memory, and the poses that were missing

Poses come in the order of their stamps: a view that got none is told its pose when its window
is placed, unless a newer frame has had one by then.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import cv2
import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.cloud import CloudSource
from feedforward_recon.mapping.keyframes import KeyframePolicy, View, sharpness
from feedforward_recon.mapping.mapper import Memory
from feedforward_recon.mapping.matching import Tracks, follow
from feedforward_recon.mapping.preparation import check_rgb
from feedforward_recon.mapping.scene_map import Draft, SceneMap
from feedforward_recon.mapping.sources.window_parts import FeedForward, Placed, Placement, Window
from feedforward_recon.mapping.sources.windows import WindowedReconstructor
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Frame, Prediction, Status, Trajectory

log = logging.getLogger(__name__)
T = TypeVar('T')
FIRST_VIEWS = 8  # start a map early: a robot waits for its first pose
FEWEST_VIEWS = 4  # of a window that is not full because the camera leaves what is mapped
LEAVING = 0.6  # share of the landmarks seen in the best frame since the last window
LONG_AGO_NS = -2**63
CORNERS = 300
CORNER_QUALITY = 0.01
CORNER_SPACING = 1 / 40  # of the image width


class Errand(threading.Thread, Generic[T]):
    """One call on a thread of its own. ``done`` is called there when it has ended."""

    def __init__(self, call: Callable[[], T], done: Callable[[], None]) -> None:
        super().__init__(name='network', daemon=True)
        self._call, self._done = call, done
        self._result: T | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Make the call."""
        try:
            self._result = self._call()
        except Exception as error:  # raised where the result is asked for
            self._error = error
        self._done()

    def result(self) -> T:
        """What the call returned; waits for it. Raises what it raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Selection:
    """Which frames of a stream differ enough from the last view to be one.

    The rules are those of keyframes, on corners that are followed from frame to frame. An image
    without enough of them, such as a black one, is never a view.
    """

    def __init__(self, config: MapperConfig) -> None:
        self._tracking = config.tracking
        self._policy = KeyframePolicy(config.keyframes)
        self._tracks: Tracks | None = None
        self._frames = 0

    def takes(self, frame: Frame) -> bool:
        """Whether a frame, the next of the stream, is a view."""
        gray = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        camera = frame.camera or Camera.from_fov(self._tracking.guessed_fov_deg,
                                                 (gray.shape[1], gray.shape[0]))
        view = View(self._frames, frame.stamp_ns, frame.image, gray, camera, None,
                    sharpness(gray), frame.source)
        self._frames += 1
        sharp = self._policy.observe(view.sharpness)
        if self._tracks is not None:
            self._tracks = follow(self._tracks, gray, self._tracks.px, self._tracking)
            if not self._policy.wants(view, self._tracks, sharp):
                return False
        corners = cv2.goodFeaturesToTrack(gray, CORNERS, CORNER_QUALITY,
                                          CORNER_SPACING * gray.shape[1])
        if corners is None or len(corners) < self._tracking.min_inliers:
            return False
        self._tracks = Tracks(gray, np.arange(len(corners)), corners.reshape(-1, 2))
        self._policy.kept(view, self._tracks)
        return True


class LiveWindows(WindowedReconstructor):
    """Maps a stream with a predictor of many images; one thread calls it.

    T_map_first: pose of the camera if the next frame starts the map, z up where that is known.
    relocalise: asked for a lost camera when the keyframes do not help.
    on_ready: called, on another thread, when ``work`` has something to do.
    """

    def __init__(self, config: MapperConfig, network: FeedForward, encoder: Encoder,
                 memory: Memory | None = None, *,
                 relocalise: Callable[[Frame], Estimate] | None = None,
                 on_ready: Callable[[], None] = lambda: None) -> None:
        # Frames are selected already; each view that costs a prediction is worth a keyframe.
        one_each = replace(config, keyframes=replace(config.keyframes, min_gap=1,
                                                     motion_share=0.0))
        super().__init__(one_each, network, encoder, memory, windows=network.windows)
        self.T_map_first = np.eye(4)
        self.frame = 'first camera'
        self._selection = Selection(config)
        self._relocalise, self._on_ready = relocalise, on_ready
        self._starts: dict[int, np.ndarray] = {}
        self._errand: Errand[Prediction] | None = None
        self._window: Window | None = None
        self._arrived: deque[Placed] = deque()
        self._new: list[tuple[int, Estimate]] = []
        self._late: list[Estimate] = []
        self._seen_ns = self._told_ns = LONG_AGO_NS
        self._best = 0  # inliers since the last window
        self._leaving, self._tied, self._flushing = False, True, False

    # -- frames ----------------------------------------------------------------------------

    def process(self, frame: Frame) -> Estimate:
        """Take in a frame and do all the work that is due; ``late`` has what it brought."""
        estimate = self.track(frame)
        while self.work(wait=True):
            pass
        return estimate

    def track(self, frame: Frame, on_pose: Callable[[Estimate], None] | None = None) -> Estimate:
        """Pose of a frame as far as the map can tell now; ``work`` extends the map.

        Raises InputError for an image that cannot be used.
        """
        check_rgb(frame)
        self._check_size(frame)
        if frame.stamp_ns < self._seen_ns:  # the stamps jumped back: a bag that loops
            self._told_ns = LONG_AGO_NS
        self._seen_ns = frame.stamp_ns
        is_view = self._selection.takes(frame)
        if is_view:
            self._wait(frame)
        estimate = self._followed(frame, is_view)
        self._best = max(self._best, estimate.inliers)
        self._leaving = estimate.status is not Status.TRACKING \
            or estimate.inliers < LEAVING * self._best
        if estimate.T_map_cam is not None:
            self._told_ns = estimate.stamp_ns
        return estimate

    def _wait(self, frame: Frame) -> None:
        self._pending.append(frame)
        if self._mapper is None:
            self._starts[frame.stamp_ns] = self.T_map_first
            self.camera_source = 'given' if frame.camera else 'predicted'
        if len(self._pending) > 2 * self.windows.size:
            log.warning('the network is slower than the camera: every other of %d views that '
                        'wait is left out', len(self._pending))
            self._pending = self._pending[::2]

    def _followed(self, frame: Frame, is_view: bool) -> Estimate:
        """Pose by what is mapped; views are listed later, when their window is placed."""
        note = not is_view
        if self._mapper is None:
            estimate = Estimate(frame.stamp_ns, Status.INITIALISING, source=frame.source,
                                reason=self.progress)
            self._early.extend([estimate] * note)
            return estimate
        self._placements.extend([None] * note)
        depth = frame.depth if self.metric else None
        return self._mapper.follow(replace(frame, T_map_cam=None, depth=depth,
                                           camera=frame.camera or self._camera),
                                   note=note, refresh=is_view)

    # -- windows ---------------------------------------------------------------------------

    @property
    def _wanted(self) -> int:
        """Views that fill the window."""
        return min(self._room, FIRST_VIEWS) if self._mapper is None else self._room

    @property
    def _is_due(self) -> bool:
        fewest = self._wanted
        if self._mapper is not None and self._leaving and self._tied:
            fewest = min(fewest, FEWEST_VIEWS)
        return len(self._pending) >= (1 if self._flushing else fewest)

    @property
    def progress(self) -> str:
        """What the window waits for, in words."""
        if self._window is not None:
            return f'the network looks at {len(self._window.frames)} views'
        return f'{len(self._pending)} of {self._wanted} views for a window'

    @property
    def is_busy(self) -> bool:
        """The network is at work on its thread."""
        return self._errand is not None and self._errand.is_alive()

    def work(self, *, wait: bool = False) -> bool:
        """One piece of what is due; False when nothing is, or when only waiting would help.

        Raises InputError when not even two images fit the device, and what the network raises;
        the images of that window have no pose then.
        """
        if self._errand is not None:
            if self._errand.is_alive() and not wait:
                return False
            self._receive(self._errand)
        elif self._arrived:
            self._hand_on(self._arrived.popleft())
            if not self._arrived:
                self._end_window()
        elif self._is_due:
            self._send()
        else:
            return False
        return True

    def _send(self) -> None:
        window = self._next_window()
        self._pending = self._pending[len(window.frames):]
        self._window = window
        self._errand = Errand(lambda: self._predict(window), self._on_ready)
        self._errand.start()

    def _receive(self, errand: Errand[Prediction]) -> None:
        window = self._window
        assert window is not None
        self._errand = self._window = None
        try:
            prediction = errand.result()
        except MemoryError:
            self._shrink()
            self._pending[:0] = window.frames
            return
        except Exception:
            self._arrived.extend(Placed(frame, None, Placement(reason='the network failed'))
                                 for frame in window.frames)
            raise
        placed = self._placed(window, prediction)
        self._arrived.extend(placed)
        self._pending[:0] = window.frames[len(placed):]
        self._tied = any(placed.placement.T_map_cam is not None for placed in self._arrived)

    def _hand_on(self, placed: Placed) -> Estimate:
        estimate = super()._hand_on(placed)
        if estimate.T_map_cam is not None:
            self._new.append((len(self._placements) - 1, estimate))
        return estimate

    def _end_window(self) -> None:
        """All views of a window are in the map: refine it there, and tell what was waited for."""
        mapper, new, self._new = self._mapper, self._new, []
        self._best = 0
        if mapper is None or not new:
            return
        mapper.adjust(max(2, sum(e.is_keyframe for _, e in new)), self._settings(wide=False))
        for frame, estimate in new:
            if estimate.stamp_ns > self._told_ns:
                self._told_ns = estimate.stamp_ns
                self._late.append(replace(estimate, T_map_cam=mapper.pose(frame)))

    def _first_pose(self, frame: Frame) -> np.ndarray:
        T_map_cam = self._starts[frame.stamp_ns]
        self._starts.clear()
        self.frame = 'first camera' if np.array_equal(T_map_cam, np.eye(4)) else 'z up'
        return T_map_cam

    # -- results ---------------------------------------------------------------------------

    def late(self) -> list[Estimate]:
        """Poses of earlier frames that became known since this was asked last."""
        late, self._late = self._late, []
        return late

    def finish(self) -> SceneMap:
        """Map the views that wait, refine the map, write all of the memory.

        Frames may follow. Raises as ``work`` does.
        """
        self._flushing = True
        try:
            while self.work(wait=True):
                pass
        finally:
            self._flushing = False
        if self._mapper is not None:
            self._mapper.refine(self._settings(wide=False))
        return self.scene_map()

    def scene_map(self) -> SceneMap:
        """The result so far, in the order of the stamps."""
        scene = super().scene_map()
        order = np.argsort(scene.trajectory.stamps_ns, kind='stable')
        return replace(
            scene, frame=self.frame,
            estimates=tuple(sorted(scene.estimates, key=lambda estimate: estimate.stamp_ns)),
            trajectory=Trajectory(scene.trajectory.stamps_ns[order],
                                  scene.trajectory.T_map_cam[order]))

    def draft(self) -> Draft:
        """The map as it stands, unrefined."""
        scene = self.scene_map()
        return Draft(lambda: scene, [] if self._mapper is None else self._mapper.draft().pending)

    @property
    def camera(self) -> Camera | None:
        """The camera in use; None before there is a map."""
        return self._camera

    @property
    def scale_source(self) -> str:
        """What the unit of the map rests on."""
        return 'depth' if self.metric else 'unknown'

    def keyframe_poses(self) -> Trajectory:
        """Stamps and present poses of the keyframes."""
        return Trajectory() if self._mapper is None else self._mapper.keyframe_poses()

    def cloud_source(self, newest_only: bool = False) -> CloudSource | None:
        """What the cloud is fused from; None before there is a map."""
        return None if self._mapper is None else self._mapper.cloud_source(newest_only)
