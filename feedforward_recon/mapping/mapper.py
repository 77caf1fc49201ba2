"""``Mapper``: one frame in, one pose out, and a map that grows.

    prepare -> locate (PoseSource) -> estimate -> if novel: keyframe -> triangulate or take depth
            -> backlog: refine the sliding window, close loops, write the scene memory

RGB-D, stereo and monocular cameras run the same code: sensor depth is a better start for
landmarks and one more residual; of a stereo pair this is that of the right image. Without depth
the first keyframe is the map origin, the median depth of its first landmarks is one unit, and
``metres_per_unit`` is None. Where poses come from is the business of a ``PoseSource``: features,
given poses, or windows of a feed-forward network.

Tracking and mapping are separate, as in PTAM (Klein and Murray 2007): a pose that ``track``
returns has not waited for the map to be refined.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.association import (
    reassociate,
    triangulate_matches,
    triangulate_pending,
)
from feedforward_recon.mapping.backlog import Backlog
from feedforward_recon.mapping.cloud import sampled_depth
from feedforward_recon.mapping.coverage import covering_tracks
from feedforward_recon.mapping.dense_clouds import DenseClouds
from feedforward_recon.mapping.estimates import EstimateHistory
from feedforward_recon.mapping.feed import MemoryFeed
from feedforward_recon.mapping.frame_tracks import FrameTracks
from feedforward_recon.mapping.keyframes import EARLIER_SESSION, KeyframePolicy, View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.relocalisation import relocalise
from feedforward_recon.mapping.results import MapResults
from feedforward_recon.mapping.scene_map import Memory, SceneMap, StartingMap, Stats
from feedforward_recon.mapping.sources import FeaturePoses, PoseSource
from feedforward_recon.mapping.tracking import Tracked, is_well_supported, support
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Frame, Status

# Times tracking.min_inliers: a camera tracked so well loses nothing when its next keyframe waits
# for the backlog of the last one, and poses come sooner (docs/experiments.md, Live).
EASY = 3


class Mapper:
    """Maps a camera walk frame by frame; one thread calls it.

    memory: gets each keyframe once, when a few newer ones are there (``finish`` writes the
    rest), and all keyframe poses whenever more than the window has moved.
    source: how frames get their poses; by default from their features.
    start: a map of earlier sessions to go on with: frames are located in it first, and extend it
    once one is found; the mapper changes it in place. results: the map as it is now, for reading.
    backlog: what the keyframes so far are followed by; ``work`` does it.
    dense: gives clouds to keyframes without depth.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, memory: Memory | None = None, *,
                 source: PoseSource | None = None, start: StartingMap | None = None,
                 dense: DenseClouds | None = None) -> None:
        self.encoder, self._dense = encoder, dense
        self.source: PoseSource = source or FeaturePoses(config, encoder)
        config = self.source.mapping_config(config)
        self._map = GrowingMap(config, encoder.dim) if start is None else start.map
        self.stats = Stats(keyframes=len(self._map))
        self._history, self._tracks = EstimateHistory(), FrameTracks()
        self._preparation = Preparation(config.tracking, start)
        self._policy = KeyframePolicy(config.keyframes)
        feed = MemoryFeed(memory, config, written=len(self._map))
        self.backlog = Backlog(self._map, feed, self._history, self._preparation, self.stats)
        self.results = MapResults(self._map, self._history, self._preparation, self.source, feed,
                                  start)

    # -- the loop --------------------------------------------------------------------------

    def process(self, frame: Frame) -> Estimate:
        """Track one frame, and extend the map when it shows something new.

        Raises InputError for an image that cannot be used; losing track is a status.
        """
        estimate = self.track(frame)
        while self.work(wait=True):
            pass
        return estimate

    def track(self, frame: Frame, on_pose: Callable[[Estimate], None] | None = None
              ) -> Estimate:
        """The part of ``process`` that a pose waits for; ``work`` does the rest in pieces.

        Other frames may be tracked between pieces; a new keyframe first ends those that follow
        the last keyframe, and may come while a loop is being closed.
        on_pose: called with the pose in an established map before the frame becomes a keyframe, or
        turns out to show a place that is known already. Raises as ``process``.
        """
        started = time.perf_counter()
        view = self._prepared(frame)
        tracked = self._located(view)
        novel = tracked is not None and self._is_novel(view, tracked)
        if (on_pose is not None and tracked is not None and tracked.extends
                and not self.source.waiting_for(self._map)):
            on_pose(self._estimate(view, tracked, novel, started))
        if tracked is not None and novel:
            tracked, novel = self._extended(view, tracked)
        if tracked is not None and not novel and not self.source.is_exact:
            self._tracks.record(view.index, tracked.tracks)
        return self._recorded(self._estimate(view, tracked, novel, started))

    def work(self, *, wait: bool = False, final: bool = False) -> bool:
        """One piece of the backlog, or of what the pose source put off; False if nothing is left.

        wait: for a network that is at work. final: no frame will follow soon.
        Raises what a network raises; the frames of its window have no pose then.
        """
        return (self._work_on_backlog()
                or (self._dense is not None and self._dense.work(self._map))
                or self.source.work(self, self._map, wait=wait, final=final))

    def finish(self) -> SceneMap:
        """Refine the whole map, write the rest of the memory, and return the result.

        Frames may follow. Raises what a network raises.
        """
        while self.work(wait=True, final=True):
            pass
        settings = self.source.final_settings(self._map.config)
        if len(self._map) > 1 and settings:
            self.backlog.finish(settings, calibrate=self.source.refines_calibration,
                                exact=self.source.holds_poses)
            self._tracks.refit(self._map, self._history, self._map.config.tracking)
        if self._dense is not None:
            self._dense.finish(self._map)
        self.backlog.feed.finish(self._map)
        return self.results.scene_map()

    def relocalise_frame(self, index: int, frame: Frame) -> Estimate:
        """Relocalise frame ``index`` in the finished map by its features; writes nothing.

        It is no surer than the keyframe beside it. Its estimate stays as it was when the frame is
        not found. Raises InputError for an image that cannot be used.
        """
        started, config = time.perf_counter(), self._map.config
        view = self._preparation.view(frame, index)
        settings = [config, *self.source.final_settings(config)][-1]
        tracked = relocalise(view, self.encoder.encode(view.image), self._map, settings.tracking)
        has_pose = self._history.status(index).has_pose
        if tracked is None or (has_pose and not tracked.extends):
            return self.results.estimates[index]
        depth = self._map.typical_depth(len(self._map) - 1)
        nearest = int(self._map.neighbours(tracked.fit.T_map_cam, depth)[0])
        keyframe = self._map.keyframes[nearest].frame
        if keyframe != EARLIER_SESSION and self._history.status(keyframe) is Status.UNCERTAIN:
            tracked = replace(tracked, sure=False)
        estimate = self._estimate(view, tracked, False, started)
        self._history.record(estimate, nearest, self._map.T_map_cam[nearest], index)
        return estimate

    # -- one frame -------------------------------------------------------------------------

    def _prepared(self, frame: Frame) -> View:
        if self._preparation.gains_depth(frame) and self.source.waiting_for(self._map):
            self._start_again(restarts=len(self._map) > 0)
            self._preparation.take_scale(frame)
        return self._preparation.view(frame, len(self._history))

    def _located(self, view: View) -> Tracked | None:
        before = len(self._map)
        tracked = self.source.locate(view, self._map)
        if before and not len(self._map):  # the source cleared it: it never had depth
            self._start_again(restarts=True)
        if tracked is not None:
            self.stats.relocalised += tracked.relocalised
        return tracked

    def _start_again(self, *, restarts: bool) -> None:
        self.stats.restarts += restarts
        self._map.clear()
        if self._dense is not None:
            self._dense.clear()
        self.backlog.clear()
        self._history.forget_poses()
        self._tracks.clear()

    def _is_novel(self, view: View, tracked: Tracked) -> bool:
        """Whether a tracked frame becomes a keyframe."""
        if not tracked.extends:
            return False
        sharp = self._policy.observe(view.sharpness)
        # A view that starts the map or that was relocalised has its matches now: a keyframe keeps
        # them.
        if self.source.waiting_for(self._map) or tracked.features is not None:
            return True
        # A well tracked camera can wait until the last keyframe is followed up.
        easy = tracked.fit.count >= EASY * self._map.config.tracking.min_inliers
        if self.backlog.is_due and easy:
            return False
        return self._policy.wants(view, tracked.tracks, sharp)

    def _extended(self, view: View, tracked: Tracked) -> tuple[Tracked, bool]:
        """The frame as a keyframe, or with renewed tracks where known landmarks cover it."""
        # A relocalised frame becomes a keyframe, however well its place is known.
        may_be_known = not (self.source.waiting_for(self._map) or self.source.is_exact
                            or tracked.features is not None)
        tracked = self._brought_up_to_date(tracked)
        tracked = replace(tracked, features=tracked.features or self.encoder.encode(view.image))
        known = self._renewed(view, tracked) if may_be_known else None
        if known is not None:
            return known, False
        tracked = self._keyframe(view, tracked)
        gauge = self.source.gauge(sensor=self._preparation.sensor)
        self.backlog.follow_up(exact=self.source.is_exact,
                               metric=gauge.metres_per_unit is not None)
        return tracked, True

    def _brought_up_to_date(self, tracked: Tracked) -> Tracked:
        """End the backlog of the last keyframe; the tracked frame moves with the map."""
        while self.backlog.is_due:
            self._work_on_backlog()
        tracker = self.source.tracker
        assert tracker.tracks is not None
        return replace(tracked, tracks=tracker.tracks,
                       fit=replace(tracked.fit, T_map_cam=tracker.T_map_cam))

    def _work_on_backlog(self) -> bool:
        newest = len(self._map) - 1
        T_map_before = self._map.T_map_cam[newest].copy() if newest >= 0 else np.eye(4)
        if not self.backlog.work():
            return False
        # Not the transpose: rounding in a rotation would be fed back, and doubled each time.
        T_new_old = self._map.T_map_cam[newest] @ np.linalg.inv(T_map_before)
        self.source.tracker.map_moved(self._map, T_new_old)
        return True

    def _renewed(self, view: View, tracked: Tracked) -> Tracked | None:
        """The frame with its tracks renewed from old landmarks, if these cover the view."""
        assert tracked.features is not None
        T_map_cam = tracked.fit.T_map_cam
        tracks = covering_tracks(view, tracked.features, self._map, T_map_cam, tracked.tracks)
        if tracks is None:
            return None
        self._policy.kept(view, tracks)
        self.source.tracker.corrected(tracks, T_map_cam)
        self.stats.revisited += 1
        return replace(tracked, tracks=tracks)

    def _keyframe(self, view: View, tracked: Tracked) -> Tracked:
        """Make a frame a keyframe: observe known landmarks in it, add new ones."""
        assert tracked.features is not None
        map_ = self._map
        tracks = map_.add_keyframe(view, tracked.features, tracked.fit.T_map_cam, tracked.tracks)
        newest = len(map_) - 1
        triangulate_pending(map_, newest)
        for earlier, fit in self.source.keyframe_added(map_, tracks):
            estimate = self._estimate(earlier, replace(tracked, fit=fit), False, None)
            self._history.record(estimate, 0, map_.T_map_cam[0], earlier.index)
        tracks = reassociate(map_, newest, view, tracks)
        triangulate_matches(map_, newest)
        keyframe = map_.keyframes[newest]
        keyframe.cloud_cam, keyframe.cloud_rgb = sampled_depth(
            view.camera, view.image, view.depth, map_.config.cloud.stride_px)
        if self._dense is not None:
            self._dense.saw(newest, view)
        self.stats.keyframes += 1
        T_map_cam = map_.T_map_cam[newest].copy()
        self._policy.kept(view, tracks)
        self.source.tracker.corrected(tracks, T_map_cam)
        return replace(tracked, tracks=tracks, fit=replace(tracked.fit, T_map_cam=T_map_cam))

    def _estimate(self, view: View, tracked: Tracked | None, novel: bool,
                  started: float | None) -> Estimate:
        """What is known of a frame. started: when work on it began; None for no latency."""
        latency_ms = 0.0 if started is None else (time.perf_counter() - started) * 1e3
        if tracked is None:
            waiting = self.source.waiting_for(self._map)
            return Estimate(view.stamp_ns, Status.INITIALISING if waiting else Status.LOST,
                            reason=waiting or self.source.lost, latency_ms=latency_ms,
                            source=view.source)
        fit = tracked.fit
        starts = novel and len(self._map) == 1
        supported = is_well_supported(fit, self._map.config.tracking)
        sure = starts or supported if tracked.sure is None else tracked.sure
        return Estimate(view.stamp_ns, Status.TRACKING if sure else Status.UNCERTAIN,
                        fit.T_map_cam, fit.covariance, fit.count,
                        support(fit) if tracked.score is None else tracked.score,
                        latency_ms=latency_ms, is_keyframe=novel, source=view.source)

    def _recorded(self, estimate: Estimate, index: int | None = None) -> Estimate:
        """Add an estimate to the history, in place of that of frame ``index`` if one is given."""
        newest = len(self._map) - 1
        before = None if index is None else self._history.status(index)
        self.stats.frames += index is None
        self.stats.lost += (estimate.status is Status.LOST) - (before is Status.LOST)
        self._history.record(estimate, newest,
                           self._map.T_map_cam[newest] if newest >= 0 else None, index)
        return estimate

    # -- frames whose poses come later ---------------------------------------------------

    def insert(self, view: View, tracked: Tracked | None, reason: str = '') -> Estimate:
        """Give an earlier frame its pose, and make it a keyframe if it shows something new.

        reason: why it has no pose, where ``tracked`` is None.
        """
        started, novel = time.perf_counter(), False
        if tracked is not None and self._is_novel(view, tracked):
            tracked, novel = self._extended(view, tracked)
        estimate = self._estimate(view, tracked, novel, started)
        if tracked is None and reason:
            estimate = replace(estimate, reason=reason)
        self._recorded(estimate, view.index)
        while self._work_on_backlog():
            pass
        return estimate

    def pose(self, frame: int) -> np.ndarray | None:
        """T_map_cam [4, 4] of a frame by its number, as the map has it now; None without."""
        return self._history.pose(frame, self._map.T_map_cam)

    def adopt_camera(self, camera: Camera) -> None:
        """Use a camera that a network predicted for the frames that come without one."""
        self._preparation.adopt(camera, 'predicted')
