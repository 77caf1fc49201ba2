"""``WindowPoses``: a feed-forward network gives poses, window by window.

    frame -> followed in the map as it is: a pose at once, or none
          -> if it shows something new: a view, which waits for its window
    window full, or the camera leaves what is mapped
          -> predict, on a thread of its own -> place in the map
          -> view after view to the mapper: keyframes, memory, and the poses that were missing

Of a recording (``selects=False``) every frame is a view and none is followed: the mapper waits
for each window. Late poses come in the order of their stamps: a view without a pose gets its
late one when its window is placed, unless a newer frame has had one by then.

Without sensor depth the first camera is the origin, the median depth of its window is one
unit, and ``metres_per_unit`` is None.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import InputError, TooManyImagesError
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.mapping.adjustment import adjust_newest
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.scene_map import Gauge
from feedforward_recon.mapping.sources.background import BackgroundCall
from feedforward_recon.mapping.sources.base import NO_KNOWN_PLACE, MapExtension
from feedforward_recon.mapping.sources.features import Relocaliser
from feedforward_recon.mapping.sources.given import GivenPoses
from feedforward_recon.mapping.sources.placement import WindowPlacement
from feedforward_recon.mapping.sources.selection import ViewSelection
from feedforward_recon.mapping.sources.view_follower import ViewFollower
from feedforward_recon.mapping.sources.window import PlacedView, WaitingView, Window
from feedforward_recon.mapping.tracking import Tracked, Tracker
from feedforward_recon.model import Encoder, Predictor
from feedforward_recon.types import Estimate, Prediction

log = logging.getLogger(__name__)
# Views of the first window of a stream, where a robot waits for its first pose; chosen by hand.
FIRST_VIEWS = 8
# Views of a window that is not full because the camera leaves what is mapped: one anchor per new
# view instead of one per seven (docs/decisions.md, Windows on a robot).
FEWEST_VIEWS = 4
# Share of the points of a view that another view of the window must confirm: most of them.
SURE_SCORE = 0.5


def settings_for_views(config: MapperConfig) -> MapperConfig:
    """Settings of a mapper whose frames are selected: each prediction is worth a keyframe."""
    return replace(config, keyframes=replace(config.keyframes, min_gap=1, motion_share=0.0))


class WindowQueue:
    """Views that wait for a window, the window that the network looks at, and how many fill one.

    early: a window may be sent before it is full.
    """

    def __init__(self, network: Predictor, windows: WindowConfig, *, early: bool,
                 on_ready: Callable[[], None]) -> None:
        self.network, self.windows, self.early = network, windows, early
        self.views: list[WaitingView] = []
        self._on_ready = on_ready
        self._window: Window | None = None
        self._call: BackgroundCall[Prediction] | None = None

    def add(self, waiting: WaitingView) -> None:
        """One more view; where the camera is much faster than the network, some are dropped."""
        self.views.append(waiting)
        if self.early and len(self.views) > 2 * self.windows.size:
            log.warning('the network is slower than the camera: every other of %d views that '
                        'wait is left out', len(self.views))
            self.views = self.views[::2]

    def room(self, anchors: int) -> int:
        """New images that a window holds beside at most ``anchors`` mapped ones."""
        return self.windows.size - min(self.windows.anchors, anchors)

    def wanted(self, placement: WindowPlacement) -> int:
        """Views that fill the next window."""
        room = self.room(len(placement.anchors))
        return min(room, FIRST_VIEWS) if self.early and not placement.started else room

    def is_due(self, placement: WindowPlacement, *, leaving: bool, final: bool) -> bool:
        """Enough views wait. leaving: the camera leaves what is mapped; final: no view follows."""
        fewest = self.wanted(placement)
        if self.early and placement.started and leaving:
            fewest = min(fewest, FEWEST_VIEWS)
        return len(self.views) >= (1 if final else fewest)

    @property
    def window(self) -> Window | None:
        """What the network looks at."""
        return self._window

    @property
    def is_busy(self) -> bool:
        """The network is at work on its thread."""
        return self._call is not None and self._call.is_running

    def send(self, window: Window) -> None:
        """Show the oldest views to the network."""
        self.views = self.views[len(window.views):]
        self._window = window
        self._call = BackgroundCall(
            lambda: self.network.predict(window.images, keep=False, K=window.K)[0],
            self._on_ready)

    def receive(self) -> Prediction:
        """The prediction of the window that was sent; waits for it.

        Raises what the network raises.
        """
        call, self._window, self._call = self._call, None, None
        assert call is not None
        return call.result()

    def shrink(self, window: Window, problem: MemoryError) -> None:
        """The device is too small for a window: its views wait for one that fits, or for half.

        Raises InputError when not even two images fit.
        """
        self.views[:0] = window.views
        shown, foreseen = len(window.images), isinstance(problem, TooManyImagesError)
        fits = problem.fits if isinstance(problem, TooManyImagesError) else max(2, shown // 2)
        if shown <= 2 or fits < 2:
            raise InputError('expected enough memory for two images at once, found less'
                             f'{f" ({problem})" if foreseen else ""}; use smaller images, another '
                             'device or a smaller model')
        self.windows = self.windows.of_size(fits)
        log.warning('%s: going on with windows of %d images, %d of them anchors',
                    problem if foreseen else 'out of memory', self.windows.size,
                    self.windows.anchors)


class LateEstimates:
    """Poses of views, given out once their window is placed, in the order of their stamps."""

    def __init__(self) -> None:
        self._posed_ns = self._seen_ns = -2**63  # newest stamps, with a pose and at all
        self._late: list[Estimate] = []

    def see(self, stamp_ns: int, *, has_pose: bool) -> None:
        """A frame came; has_pose: it had one at once."""
        if stamp_ns < self._seen_ns:  # the stamps jumped back: a bag that loops
            self._posed_ns = -2**63
        self._seen_ns = stamp_ns
        if has_pose:
            self._posed_ns = stamp_ns

    def add(self, estimate: Estimate) -> None:
        """The pose of an earlier frame became known."""
        if estimate.stamp_ns > self._posed_ns:
            self._posed_ns = estimate.stamp_ns
            self._late.append(estimate)

    def take(self) -> list[Estimate]:
        """Those that were not taken before."""
        late, self._late = self._late, []
        return late


class WindowPoses:
    """Poses from a predictor of many images.

    selects: frames come from a running camera: only some are views, the others are followed.
    refine: bundle adjustment of the finished map, and relocalisation of frames in it. On walks
    through synthetic rooms, poses that are off by 1 cm and 0.6 degrees, with 2 % of depth, end
    within 0.9 cm instead of 2.0 cm, those off by half as much within 0.7 instead of 0.6 cm, exact
    ones also within 0.7 cm.
    relocalise: called for a lost camera that is not found among the keyframes.
    on_ready: called, on another thread, when ``work`` has something to do.
    """

    is_exact = True
    holds_poses = False
    refines_calibration = False

    def __init__(self, config: MapperConfig, network: Predictor, encoder: Encoder, *,
                 windows: WindowConfig | None = None, selects: bool = False, refine: bool = True,
                 relocalise: Relocaliser | None = None,
                 on_ready: Callable[[], None] = lambda: None) -> None:
        self.T_map_first = np.eye(4)
        self._encoder = encoder
        self._queue = WindowQueue(network, windows or WindowConfig(), early=selects,
                                  on_ready=on_ready)
        self._placement = WindowPlacement(settings_for_views(config) if selects else config,
                                          refine=refine)
        self._given = GivenPoses(config, encoder)
        self._selection = ViewSelection(config) if selects else None
        self._follower = ViewFollower(encoder, relocalise)
        self._late = LateEstimates()
        self._arrived: deque[PlacedView] = deque()
        self._new: list[tuple[int, Estimate]] = []
        self._overlaps = True  # the last window had an overlap with the map

    # -- frames ----------------------------------------------------------------------------

    @property
    def lost(self) -> str:
        """Why a frame has no pose."""
        return 'waiting for its window' if self._selection is None else NO_KNOWN_PLACE

    @property
    def tracker(self) -> Tracker:
        """Follows the keyframes; between windows another one follows the camera."""
        return self._given.tracker

    def mapping_config(self, config: MapperConfig) -> MapperConfig:
        """Frames of a stream are selected before: each prediction is worth a keyframe."""
        return config if self._selection is None else settings_for_views(config)

    def locate(self, view: View, map_: GrowingMap) -> Tracked | None:
        """Pose of a frame in the map as it is now; views wait for their window too."""
        is_view = self._selection is None or self._selection.takes(view)
        if is_view:
            self._queue.add(WaitingView(view, self.T_map_first))
        tracked = None
        if self._selection is not None and self._placement.started:
            tracked = self._follower.follow(self._placement.as_seen(view), map_, refresh=is_view)
        self._late.see(view.stamp_ns, has_pose=tracked is not None)
        return tracked

    def keyframe_added(self, map_: GrowingMap, tracks: Tracks) -> list[tuple[View, PoseFit]]:
        """Nothing follows for other frames."""
        return []

    def late(self) -> list[Estimate]:
        """Poses of earlier frames that became known since the last call."""
        return self._late.take()

    def kept_images(self) -> list[tuple[int, np.ndarray]]:
        """Those that may be anchors, with the numbers of their frames: a bounded number."""
        return self._placement.anchors.images

    # -- windows ---------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """The network is at work on its thread."""
        return self._queue.is_busy

    @property
    def progress(self) -> str:
        """How many views the window has and needs, or that the network is at work, in words."""
        if self._queue.window is not None:
            return f'the network looks at {len(self._queue.window.views)} views'
        wanted = self._queue.wanted(self._placement)
        return f'{len(self._queue.views)} of {wanted} views for a window'

    def waiting_for(self, map_: GrowingMap) -> str:
        """The first window; '' once it is in the map."""
        return '' if len(map_) else self.progress

    def work(self, mapper: MapExtension, map_: GrowingMap, *, wait: bool, final: bool) -> bool:
        """One piece of what is due; False when nothing is, or when only waiting would help.

        Raises InputError when not even two images fit the device, and what the network raises;
        the images of that window have no pose then.
        """
        if self._queue.window is not None:
            if self._queue.is_busy and not wait:
                return False
            self._receive(mapper, map_)
        elif self._arrived:
            self._insert(mapper, map_, self._arrived.popleft())
            if not self._arrived:
                self._end_window(mapper, map_)
        elif self._queue.is_due(self._placement, final=final,
                                leaving=self._follower.is_leaving and self._overlaps):
            self._queue.send(self._next_window(mapper))
        else:
            return False
        return True

    def _next_window(self, mapper: MapExtension) -> Window:
        """The oldest views that wait, and the anchors that align them with the map."""
        anchors = self._placement.anchors
        views = self._queue.views[:self._queue.room(len(anchors))]
        if not len(anchors):
            return Window(views)
        descriptors = (self._encoder.encode(one.view.image).global_descriptor
                       for one in (views[0], views[len(views) // 2], views[-1]))
        return Window(views, anchors.chosen(self._queue.windows.anchors, descriptors,
                                            mapper.pose))

    def _receive(self, mapper: MapExtension, map_: GrowingMap) -> None:
        window = self._queue.window
        assert window is not None
        try:
            prediction = self._queue.receive()
        except MemoryError as problem:
            self._queue.shrink(window, problem)
            return
        except Exception:
            self._arrived.extend(PlacedView(waiting.view, reason='the network failed')
                                 for waiting in window.views)
            raise
        had_map = self._placement.started
        placed = self._placement.place(window, prediction)
        if self._placement.started and not had_map:
            self._start_map(mapper, map_)
        self._arrived.extend(placed)
        self._queue.views[:0] = window.views[len(placed):]
        self._overlaps = any(one.T_map_cam is not None for one in placed)

    def _start_map(self, mapper: MapExtension, map_: GrowingMap) -> None:
        settings = map_.config = self._placement.mapping_settings
        self._given = GivenPoses(settings, self._encoder)
        self._follower.start(self._placement.settings(wide=False))
        camera = self._placement.camera
        if camera is not None:
            mapper.adopt_camera(camera)

    def _insert(self, mapper: MapExtension, map_: GrowingMap, placed: PlacedView) -> None:
        """One view to the mapper, with the pose and the depth that the window gave it.

        A view that has a pose may be an anchor of the next window.
        """
        if not self._placement.started:
            mapper.insert(placed.view, None, 'waiting for views that overlap')
            return
        if placed.T_map_cam is None or placed.prediction is None:
            mapper.insert(placed.view, None, placed.reason)
            return
        view = self._placement.posed(placed)
        is_first = not len(map_)
        tracked = self._given.locate(view, map_)
        estimate = mapper.insert(view, tracked and _with_confidence(
            tracked, placed, is_first or
            tracked.fit.count >= map_.config.tracking.min_inliers))
        newest = map_.keyframes[-1] if len(map_) else None
        is_keyframe = newest is not None and newest.frame == view.index
        variance = (placed.covariance[0, 0], placed.covariance[3, 3])
        self._placement.anchors.add(
            view.index, view.image, placed.prediction, variance,
            newest.features.global_descriptor if newest is not None and is_keyframe else None)
        if estimate.T_map_cam is not None:
            self._new.append((view.index, estimate))

    def _end_window(self, mapper: MapExtension, map_: GrowingMap) -> None:
        """All views of a window are in the map: refine them, and give out their poses."""
        new, self._new = self._new, []
        self._follower.window_ended()
        if self._selection is None or not new:
            return
        adjust_newest(map_, max(2, sum(e.is_keyframe for _, e in new)),
                      [self._placement.mapping_settings, self._placement.settings(wide=False)])
        for frame, estimate in new:
            self._late.add(replace(estimate, T_map_cam=mapper.pose(frame)))

    # -- the finished map ------------------------------------------------------------------

    def gauge(self, *, sensor: str) -> Gauge:
        """Metres where the first window had sensor depth; axes of the camera that began it."""
        metric = self._placement.metric
        return Gauge(1.0 if metric else None, 'depth' if metric else 'unknown',
                     self._placement.frame)

    def final_settings(self, config: MapperConfig) -> Sequence[MapperConfig]:
        """First with wide gates: poses of a network are off by many pixels."""
        return self._placement.final_settings

    def wants_relocalisation(self, estimate: Estimate) -> bool:
        """Frames without a pose, and after a refinement all that are no keyframes."""
        return not estimate.status.has_pose or (
            bool(self._placement.final_settings) and not estimate.is_keyframe)


def _with_confidence(tracked: Tracked, placed: PlacedView, followed: bool) -> Tracked:
    """A placed view with the covariance and the score of its window.

    followed: enough tracks of optical flow agree with the pose.
    """
    return replace(tracked, fit=replace(tracked.fit, covariance=placed.covariance),
                   score=placed.score, sure=placed.score >= SURE_SCORE and followed)
