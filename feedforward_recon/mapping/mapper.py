"""``OnlineReconstructor``: one frame in, one pose out, and a map that grows.

    prepare -> track -> estimate -> if novel: keyframe -> triangulate or take sensor depth
            -> refine the sliding window -> close loops -> write memory

RGB-D and monocular cameras run the same code: sensor depth is a better start for landmarks
and one more residual. Without depth the first keyframe is the map origin, the median depth of
its first landmarks is one unit, and ``metres_per_unit`` is None.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.mapping.bootstrap import Bootstrap
from feedforward_recon.mapping.cloud import sampled_depth
from feedforward_recon.mapping.coverage import renewed
from feedforward_recon.mapping.estimates import Journal
from feedforward_recon.mapping.keyframes import Archive, KeyframePolicy, View
from feedforward_recon.mapping.loop_closure import closing, find_loop
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.relocalisation import relocalise, settle
from feedforward_recon.mapping.results import MapResults
from feedforward_recon.mapping.scene_map import Memory, SceneMap, Stats
from feedforward_recon.mapping.tracking import Tracked, Tracker, exact_fit
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Frame, Status

EASY = 3  # times the fewest inliers: a camera that is tracked well
FOCAL_ROUNDS = (6, 12, 24, 48)  # keyframes after which a guessed focal length is refined


class OnlineReconstructor(MapResults):
    """Maps a camera walk frame by frame.

    memory: gets each keyframe once, after it left the sliding window (``finish`` writes the
    rest), and all keyframe poses whenever more than the window has moved.
    relocalise: another way to find a lost camera, asked when the keyframes do not help.
    poses: 'estimated', or 'given' to take ``Frame.T_map_cam`` as it is.
    T_map_first: pose of the camera that starts the map, in a frame with z up; None puts the
    origin and the axes into the first camera.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, memory: Memory | None = None, *,
                 poses: Literal['estimated', 'given'] = 'estimated',
                 relocalise: Callable[[Frame], Estimate] | None = None,
                 T_map_first: np.ndarray | None = None) -> None:
        self.config, self.encoder, self.memory = config, encoder, memory
        self.poses, self.relocalise, self.bends = poses, relocalise, poses == 'estimated'
        self.T_map_first = np.eye(4) if T_map_first is None else T_map_first
        self.status, self.stats = Status.INITIALISING, Stats()
        self._preparation = Preparation(config.tracking)
        self._policy, self._journal = KeyframePolicy(config.keyframes), Journal()
        self._start_map()

    def _start_map(self) -> None:
        self._map = GrowingMap(self.config, self.encoder.dim)
        self._tracker = Tracker(self.config.tracking)
        self._bootstrap: Bootstrap | None = None
        self._due: deque[Callable[[], object]] = deque()
        self._closing: Iterator[None] | None = None
        self._written, self._archive = 0, Archive(self.config.cloud)

    def _start_again(self) -> None:
        self.stats.restarts += len(self._map) > 0
        self._start_map()
        self._journal.forget_poses()

    @property
    def _is_starting(self) -> bool:
        """There is no map yet, or a monocular one without depth so far."""
        return not len(self._map) or self._bootstrap is not None

    # -- the loop --------------------------------------------------------------------------

    def process(self, frame: Frame) -> Estimate:
        """Track one frame, and extend the map when it shows something new.

        Raises InputError for an image that cannot be used; losing track is a status.
        """
        estimate = self.track(frame)
        self._work_off()
        return estimate

    def track(self, frame: Frame, on_pose: Callable[[Estimate], None] | None = None
              ) -> Estimate:
        """The part of ``process`` that a pose waits for; ``work`` does the rest in pieces.

        Other frames may be tracked between pieces; a new keyframe first ends those that follow
        the last keyframe, and may come while a loop is being closed.
        on_pose: told the pose in an established map before the frame becomes a keyframe, or
        turns out to show a place that is known already.
        """
        started = time.perf_counter()
        if self._preparation.gains_depth(frame) and self._is_starting:
            self._start_again()
            self._preparation.metric = True
        view = self._preparation.view(frame, len(self._journal))
        tracked = self._track(view, frame)
        novel = tracked is not None and self._is_novel(view, tracked)
        established = not self._is_starting
        if tracked is not None and on_pose is not None and established:
            on_pose(self._measured(view, tracked.fit, novel, _ms_since(started)))
        if tracked is not None and novel:
            found = tracked.features is not None  # a place lost is tied again by a keyframe
            tracked = self._described(view, self._brought_up_to_date(tracked))
            known = self._renewed(view, tracked) if established and not found else None
            novel = known is None
            tracked = known or tracked
        if tracked is not None and novel:
            tracked = self._extend(view, tracked)
            self._due.extend((partial(self._map.refine_window, poses_fixed=self.poses == 'given'),
                              self._close_loops, self._refine_focal, self._write_memory))
        return self._record(view, tracked, novel, started)

    def work(self) -> bool:
        """One piece of what a keyframe or a loop is followed by; False when nothing is left."""
        if not self._due and self._closing is None:
            return False
        piece = self._due.popleft() if self._due else self._close_further
        newest = len(self._map) - 1
        T_map_before = self._map.T_map_cam[newest].copy()
        piece()
        # Not the transpose: rounding in a rotation would be fed back, and doubled each time.
        self._tracker.carried(self._map, self._map.T_map_cam[newest] @ np.linalg.inv(T_map_before))
        return True

    def _work_off(self) -> None:
        while self.work():
            pass

    def _brought_up_to_date(self, tracked: Tracked) -> Tracked:
        """End the work on the last keyframe; the map has moved under the tracked frame."""
        while self._due:
            self.work()
        tracks, T_map_cam = self._tracker.tracks, self._tracker.T_map_cam
        assert tracks is not None
        return replace(tracked, tracks=tracks, fit=replace(tracked.fit, T_map_cam=T_map_cam))

    # -- tracking --------------------------------------------------------------------------

    def _track(self, view: View, frame: Frame) -> Tracked | None:
        """Pose of the frame, or None: lost, or waiting for what starts a map."""
        if self.poses == 'given':
            tracked = self._take_given(view)
        elif not len(self._map):
            tracked = self._first(view, self.T_map_first)
        elif self._bootstrap is not None:
            tracked = self._second(view)
        else:
            tracked = self._tracker.track(view, self._map)
            if tracked is None:
                return self._recover(view, frame)
        if tracked is not None:
            self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
        return tracked

    def _first(self, view: View, T_map_cam: np.ndarray) -> Tracked | None:
        """A frame with enough texture - and depth, if the camera has it - starts the map."""
        features = self.encoder.encode(view.image)
        enough = 2 * self.config.tracking.min_inliers
        if self._preparation.metric and (view.depth_at(features.keypoints) > 0).sum() < enough:
            return None
        if len(features) < enough:
            return None
        nothing = Tracks(view.gray, np.zeros(0, int), np.zeros((0, 2), np.float32))
        return Tracked(nothing, exact_fit(T_map_cam), features)

    def _take_given(self, view: View) -> Tracked | None:
        if view.T_given is None:
            return None
        if not len(self._map):
            return self._first(view, view.T_given)
        return self._tracker.given(view, self._map, view.T_given)

    def _second(self, view: View) -> Tracked | None:
        """Monocular: the frame whose parallax gives the map its depth."""
        assert self._bootstrap is not None
        tracks = self._tracker.flow(view, self._map, self.T_map_first)
        if self._bootstrap.is_hopeless(tracks):
            self._start_again()
            return self._first(view, self.T_map_first)
        tracked = self._bootstrap.second_view(view, tracks, self.T_map_first)
        if tracked is None:
            self._tracker.accept(view, tracks, self.T_map_first)
        return tracked

    def _recover(self, view: View, frame: Frame) -> Tracked | None:
        """Look for a lost camera among the keyframes, then wherever the caller knows to ask."""
        features = self.encoder.encode(view.image)
        tracked = relocalise(view, features, self._map, self.config.tracking)
        if tracked is None and self.relocalise is not None:
            answer = self.relocalise(frame)
            if answer.T_map_cam is not None:
                tracked = settle(view, features, self._map, answer.T_map_cam,
                                 self.config.tracking)
        if tracked is not None:
            self.stats.relocalised += 1
            self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam, moved=False)
        return tracked

    def _is_novel(self, view: View, tracked: Tracked) -> bool:
        """Is this tracked frame worth keeping?"""
        sharp = self._policy.observe(view.sharpness)
        # A view that starts the map or that was found by its features is tied to the map now,
        # while the evidence is at hand.
        if self._bootstrap is not None or tracked.features is not None:
            return True
        # A well tracked camera can wait until the last keyframe is followed up.
        if self._due and tracked.fit.count >= EASY * self.config.tracking.min_inliers:
            return False
        return self._policy.wants(view, tracked.tracks, sharp)

    # -- mapping ---------------------------------------------------------------------------

    def _renewed(self, view: View, tracked: Tracked) -> Tracked | None:
        """The frame with its tracks renewed from old landmarks, where these say it all."""
        if self.poses == 'given':
            return None
        assert tracked.features is not None
        T_map_cam = tracked.fit.T_map_cam
        tracks = renewed(view, tracked.features, self._map, T_map_cam, tracked.tracks)
        if tracks is None:
            return None
        self._policy.kept(view, tracks)
        self._tracker.corrected(tracks, T_map_cam)
        self.stats.revisited += 1
        return replace(tracked, tracks=tracks)

    def _described(self, view: View, tracked: Tracked) -> Tracked:
        return replace(tracked, features=tracked.features or self.encoder.encode(view.image))

    def _extend(self, view: View, tracked: Tracked) -> Tracked:
        """Make a frame a keyframe: tie it to known landmarks, add new ones."""
        features = tracked.features
        assert features is not None
        tracks = self._map.add_keyframe(view, features, tracked.fit.T_map_cam, tracked.tracks)
        newest = len(self._map) - 1
        self._map.triangulate_pending(newest)
        self._complete_start(tracks)
        tracks = self._map.reassociate(newest, view, tracks)
        self._map.triangulate_matches(newest)
        keyframe = self._map.keyframes[newest]
        keyframe.cloud_cam, keyframe.cloud_rgb = sampled_depth(view, self.config.cloud.stride_px)
        self.stats.keyframes += 1
        T_map_cam = self._map.T_map_cam[newest].copy()
        self._policy.kept(view, tracks)
        self._tracker.corrected(tracks, T_map_cam)
        return replace(tracked, tracks=tracks, fit=replace(tracked.fit, T_map_cam=T_map_cam))

    def _complete_start(self, tracks: Tracks) -> None:
        """Enter and leave the phase in which a monocular map has no depth yet."""
        if self.poses == 'given' or self._preparation.metric:
            return
        if len(self._map) == 1:
            self._bootstrap = Bootstrap(self.config, tracks)
        elif self._bootstrap is not None:
            for view, fit in self._bootstrap.complete(self._map):
                self._journal.note(self._measured(view, fit, False, 0.0), 0,
                                   self._map.T_map_cam[0], view.index)
            self._bootstrap = None

    def _close_loops(self) -> None:
        """Tie the newest keyframe to old ones; when the map is off, bend it back."""
        newest = len(self._map) - 1
        if newest % self.config.loops.every or not self.bends or self._closing is not None:
            return
        loop = find_loop(self._map, newest, self.config)
        if loop is None:
            return
        self.stats.loops += 1
        if loop.shift_px <= self.config.loops.correct_px:
            self._map.tie(newest, loop.features, loop.landmarks)
            return
        self.stats.corrections += 1
        self._closing = closing(self._map, loop, with_scale=not self._is_metric, bent=self._bent)

    def _close_further(self) -> None:
        if self._closing is not None and next(self._closing, self) is self:
            self._closing = None

    def _bent(self, scale: np.ndarray) -> None:
        self._journal.rescale(scale)
        self._reanchor()

    def _refine_focal(self) -> None:
        """A guessed focal length is refined with the whole map, early and then more rarely."""
        if (self._preparation.camera_source != 'given' and self.poses == 'estimated'
                and len(self._map) in FOCAL_ROUNDS):
            self._refine_all(refine_focal=True)

    def _refine_all(self, *, refine_focal: bool) -> None:
        self._map.refine_all(self.config.refine.global_steps, refine_focal=refine_focal)
        if refine_focal:
            self._preparation.refocus(self._map.keyframes[-1].camera)
        self._reanchor()

    def _write_memory(self, *, everything: bool = False) -> None:
        """Hand keyframes to the memory once the window has left them behind."""
        done = len(self._map) - (0 if everything else self.config.refine.window)
        for id_ in range(self._written, done):
            if self.memory is not None:
                self.memory.write(self._map.exported(id_))
        self._written = max(self._written, done)
        self._archive.pack(self._map.keyframes, self._written - self.config.refine.window)

    def _reanchor(self) -> None:
        if self.memory is not None and self._written:
            self.memory.reanchor(dict(enumerate(self._map.T_map_cam[:self._written].copy())))

    # -- results ---------------------------------------------------------------------------

    def _record(self, view: View, tracked: Tracked | None, novel: bool,
                started: float) -> Estimate:
        latency_ms = _ms_since(started)
        self.stats.frames += 1
        newest = len(self._map) - 1
        if tracked is not None:
            estimate = self._measured(view, tracked.fit, novel, latency_ms)
        else:
            status, reason = self._no_pose()
            self.stats.lost += status is Status.LOST
            estimate = Estimate(view.stamp_ns, status, reason=reason, latency_ms=latency_ms,
                                source=view.source)
        self._journal.note(estimate, newest, self._map.T_map_cam[newest] if newest >= 0 else None)
        self.status = estimate.status
        return estimate

    def _no_pose(self) -> tuple[Status, str]:
        if self.poses == 'given' and len(self._map):
            return Status.LOST, 'no pose was given'
        if not len(self._map):
            lacking = 'texture with depth' if self._preparation.metric else 'texture'
            return Status.INITIALISING, f'waiting for {lacking}'
        if self._bootstrap is not None:
            return Status.INITIALISING, 'waiting for parallax'
        return Status.LOST, 'no known place in view'

    def _measured(self, view: View, fit: PoseFit, novel: bool, latency_ms: float) -> Estimate:
        score = fit.count / len(fit.inliers) if len(fit.inliers) else 1.0
        starts = novel and len(self._map) == 1
        sure = starts or (fit.count >= 2 * self.config.tracking.min_inliers and score > 0.5)
        return Estimate(view.stamp_ns, Status.TRACKING if sure else Status.UNCERTAIN,
                        fit.T_map_cam, fit.covariance, fit.count, score, latency_ms=latency_ms,
                        is_keyframe=novel, source=view.source)

    def finish(self) -> SceneMap:
        """Refine the whole map, write the rest of the memory, and return the result."""
        while self.work():
            pass
        if self.poses == 'estimated' and len(self._map) > 1:
            self._refine_all(refine_focal=self._preparation.camera_source != 'given')
        self._write_memory(everything=True)
        return self.scene_map()

    def revisit(self, index: int, frame: Frame) -> Estimate:
        """Look up frame ``index``, which had no pose, in the present map; writes nothing."""
        started = time.perf_counter()
        view = self._preparation.view(frame, index)
        features = self.encoder.encode(view.image)
        tracked = relocalise(view, features, self._map, self.config.tracking)
        if tracked is None:
            return self.estimates[index]
        estimate = self._measured(view, tracked.fit, False, _ms_since(started))
        depth = self._map.typical_depth(len(self._map) - 1)
        nearest = int(self._map.neighbours(tracked.fit.T_map_cam, depth)[0])
        self._journal.note(estimate, nearest, self._map.T_map_cam[nearest], index)
        return estimate


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
