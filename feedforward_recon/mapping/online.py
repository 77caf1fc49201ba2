"""``OnlineReconstructor``: one frame in, one pose out, and a map that grows and stays bounded.

    prepare -> track -> estimate -> if novel: keyframe -> triangulate or take sensor depth
            -> refine the sliding window -> close loops -> write memory

RGB-D and monocular cameras run the same code: sensor depth is a better start for landmarks
and one more residual. Without depth the first keyframe is the map origin, the median depth of
the first landmarks is one unit, and ``metres_per_unit`` is None.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import cv2
import numpy as np

from feedforward_recon.config import MapperConfig
from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import FLOOR_STD, PoseFit
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.geometry.twoview import relative_pose
from feedforward_recon.mapping.cloud import voxel_fused
from feedforward_recon.mapping.growing_map import GrowingMap
from feedforward_recon.mapping.keyframes import KeyframePolicy, View, sharpness
from feedforward_recon.mapping.loops import correct, find_loop
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.mapping.tracking import Tracked, Tracker
from feedforward_recon.model import Encoder
from feedforward_recon.types import (Estimate, Frame, Keyframe, PointCloud, Status,
                                     Trajectory)

log = logging.getLogger(__name__)
START_POINTS = 50  # triangulated at once when a monocular map starts


class Memory(Protocol):
    """What the mapper needs of a scene memory."""

    def write(self, keyframe: Keyframe) -> None:
        """Take in a keyframe once it has left the sliding window."""

    def reanchor(self, poses: dict[int, np.ndarray]) -> None:
        """Keyframes {id: T_map_cam} have moved."""


@dataclass(frozen=True)
class FrameRecord:
    """A frame's estimate, and its pose relative to the keyframe that carries it."""

    estimate: Estimate
    keyframe: int = -1
    T_keyframe_cam: np.ndarray | None = None


@dataclass
class Stats:
    """Counts of a run."""

    frames: int = 0
    keyframes: int = 0
    tracked: int = 0
    lost: int = 0
    relocalised: int = 0
    loops: int = 0
    restarts: int = 0


class OnlineReconstructor:
    """Maps a camera walk frame by frame.

    memory: gets each keyframe once, after it left the sliding window (``finish`` writes the
    rest), and all keyframe poses whenever more than the window has moved.
    relocalise: another way to find a lost camera, asked when the keyframes do not help.
    poses: 'estimated', or 'given' to take ``Frame.T_map_cam`` as it is.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, memory: Memory | None = None, *,
                 poses: Literal['estimated', 'given'] = 'estimated',
                 relocalise: Callable[[Frame], Estimate] | None = None) -> None:
        self.config = config
        self.encoder = encoder
        self.memory = memory
        self.poses = poses
        self.relocalise = relocalise
        self.status = Status.INITIALISING
        self.stats = Stats()
        self.camera_source = 'given'
        self._camera: Camera | None = None
        self._saw_depth = False
        self._records: list[FrameRecord] = []
        self._policy = KeyframePolicy(config.keyframes)
        self._start_map()

    def _start_map(self) -> None:
        self._records = [replace(r, estimate=_unposed(r.estimate), T_keyframe_cam=None)
                         for r in self._records]
        self._map = GrowingMap(self.config, self.encoder.dim)
        self._tracker = Tracker(self.config.tracking)
        self._written = 0
        self._base_count = 0
        self._base_px = np.zeros((0, 2), np.float32)  # of each landmark at the last keyframe
        self._waiting: list[tuple[View, Tracks]] = []  # frames before the map has depth

    # -- the loop --------------------------------------------------------------------------

    def process(self, frame: Frame) -> Estimate:
        """Track one frame, and extend the map when it shows something new.

        Raises InputError for an image that cannot be used; losing track is a status.
        """
        started = time.perf_counter()
        view = self._prepare(frame)
        tracked = self._track(view, frame)
        keep = tracked is not None and self._is_novel(view, tracked)
        if tracked is not None and keep:
            tracked = self._extend(view, tracked)
            self._map.refine_window(poses_fixed=self.poses == 'given')
            self._close_loops()
            self._write_memory()
            tracked = self._settle(view, tracked)
        return self._record(view, tracked, keep, started)

    def _prepare(self, frame: Frame) -> View:
        """Check a frame and bring it into the form that all steps share."""
        image = frame.image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError('expected an RGB image uint8 [H, W, 3], found '
                             f'{image.dtype} {image.shape} in {frame.source}; convert it first')
        size_wh = (image.shape[1], image.shape[0])
        if self._camera is None:
            self._camera = self._first_camera(frame, size_wh)
        camera = frame.camera or self._camera
        if camera.size_wh != size_wh or self._camera.size_wh != size_wh:
            raise InputError(f'expected images of {self._camera.width}x{self._camera.height} as '
                             f'before, found {size_wh[0]}x{size_wh[1]} in {frame.source}; '
                             'start a new map for another camera')
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return View(len(self._records), frame.stamp_ns, image, gray, camera,
                    self._clean_depth(frame), sharpness(gray), frame.source, frame.T_map_cam)

    def _first_camera(self, frame: Frame, size_wh: tuple[int, int]) -> Camera:
        if frame.camera is not None:
            return frame.camera
        self.camera_source = 'guessed'
        fov_deg = self.config.tracking.guessed_fov_deg
        log.warning('no camera calibration: assuming a horizontal field of view of %.0f degrees',
                    fov_deg)
        return Camera.from_fov(fov_deg, size_wh)

    def _clean_depth(self, frame: Frame) -> np.ndarray | None:
        """Depth with 0 wherever it is missing, not finite or too far; None without any."""
        if frame.depth is None:
            return None
        if frame.depth.shape != frame.image.shape[:2]:
            raise InputError(f'expected depth of the image size {frame.image.shape[:2]}, found '
                             f'{frame.depth.shape} in {frame.source}; align depth to the image')
        limit = self.config.tracking.max_depth_m
        with np.errstate(invalid='ignore'):
            good = (frame.depth > 0) & (frame.depth < limit)
        if not good.any():
            return None
        self._saw_depth = True
        return np.where(good, frame.depth, 0).astype(np.float32)

    # -- tracking --------------------------------------------------------------------------

    def _track(self, view: View, frame: Frame) -> Tracked | None:
        """Pose of the frame, or None: lost, or waiting for the parallax that starts a map."""
        if self.poses == 'given':
            tracked = self._take_given(view)
        elif not len(self._map):
            tracked = self._first(view, np.eye(4))
        elif not self._map.landmarks.has_point.any():
            return self._initialise(view)
        else:
            tracked = self._tracker.track(view, self._map)
        if tracked is not None:
            self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
            return tracked
        return self._recover(view, frame)

    def _first(self, view: View, T_map_cam: np.ndarray) -> Tracked | None:
        """The first frame with enough texture starts the map."""
        features = self.encoder.encode(view.image)
        if len(features) < self.config.tracking.min_inliers:
            return None
        return Tracked(_no_tracks(view), _exact(T_map_cam, 0), features)

    def _take_given(self, view: View) -> Tracked | None:
        """The given pose; tracks that disagree with it are dropped."""
        if view.T_given is None:
            return None
        if not len(self._map):
            return self._first(view, view.T_given)
        tracks = self._tracker.flow(view, self._map, view.T_given)
        table = self._map.landmarks
        points = transform_points(inverse(view.T_given),
                                  table.points_map(tracks.ids, self._map.T_map_cam))
        error = np.linalg.norm(view.camera.project(points) - tracks.px, axis=1)
        known = table.has_point[tracks.ids]
        tracks = tracks.select(~known | (error < self.config.tracking.outlier_px))
        return Tracked(tracks, _exact(view.T_given, len(tracks.ids)))

    def _initialise(self, view: View) -> Tracked | None:
        """Without depth: wait until the tracks of the first keyframe have parallax."""
        tracks = self._tracker.flow(view, self._map, np.eye(4))
        base = self._base_px[tracks.ids]
        if len(tracks.ids) < max(2 * self.config.tracking.min_inliers,
                                 0.3 * len(self._base_px)):
            self.stats.restarts += 1
            self._start_map()
            return self._track_first_again(view)
        self._tracker.accept(view, tracks, np.eye(4))
        self._waiting.append((view, tracks))
        motion_px = np.median(np.linalg.norm(tracks.px - base, axis=1))
        if motion_px < self.config.keyframes.init_motion_share * view.camera.width:
            return None
        try:
            two = relative_pose(view.camera.normalise(base), view.camera.normalise(tracks.px),
                                view.camera.fx, seed=self.config.tracking.seed)
        except DegenerateError as error:
            log.debug('not yet: %s', error)
            return None
        firm = two.inliers & (two.angle_deg > self.config.keyframes.min_parallax_deg)
        if firm.sum() < START_POINTS:
            return None
        self._waiting.pop()
        return Tracked(tracks.select(two.inliers), _exact(two.T_a_b, int(two.inliers.sum())))

    def _track_first_again(self, view: View) -> Tracked | None:
        tracked = self._first(view, np.eye(4))
        if tracked is not None:
            self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
        return tracked

    def _recover(self, view: View, frame: Frame) -> Tracked | None:
        """Look for a lost camera among the keyframes, then wherever the caller knows to ask."""
        if not len(self._map) or self.poses == 'given':
            return None
        features = self.encoder.encode(view.image)
        tracked = self._tracker.relocalise(view, features, self._map)
        if tracked is None and self.relocalise is not None:
            answer = self.relocalise(frame)
            if answer.T_map_cam is not None:
                tracked = self._tracker.settle(view, features, self._map, answer.T_map_cam)
        if tracked is not None:
            self.stats.relocalised += 1
            self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam, moved=False)
        return tracked

    def _is_novel(self, view: View, tracked: Tracked) -> bool:
        """Is this tracked frame worth keeping?"""
        sharp = self._policy.observe(view.sharpness)
        if len(self._map) < 2 and (not len(self._map)
                                   or not self._map.landmarks.has_point.any()):
            return True
        if tracked.features is not None:
            return True  # relocalised: tie the view to the map while the evidence is at hand
        ids = tracked.tracks.ids
        ids_now = ids[ids < len(self._base_px)]
        motion = np.linalg.norm(tracked.tracks.px[ids < len(self._base_px)]
                                - self._base_px[ids_now], axis=1)
        share = np.nanmedian(motion) / view.camera.width if np.isfinite(motion).any() else 1.0
        return self._policy.wants(view.index - self._map.keyframes[-1].frame, float(share),
                                  len(ids) / max(self._base_count, 1), sharp)

    # -- mapping ---------------------------------------------------------------------------

    def _extend(self, view: View, tracked: Tracked) -> Tracked:
        """Make a frame a keyframe: describe it, tie it to known landmarks, add new ones."""
        features = tracked.features or self.encoder.encode(view.image)
        starting = not self._map.landmarks.has_point.any()
        tracks = self._map.add_keyframe(view, features, tracked.fit.T_map_cam, tracked.tracks)
        newest = len(self._map) - 1
        self._map.triangulate_pending(newest)
        if starting and newest > 0 and self.poses == 'estimated':
            self._complete_start()
        tracks = self._map.reassociate(newest, view, tracks)
        self._map.triangulate_matches(newest)
        self._sample_cloud(view)
        self.stats.keyframes += 1
        return replace(tracked, tracks=tracks)

    def _complete_start(self) -> None:
        """First monocular points: fix the unit, refine both views, place the frames between."""
        self._map.refine_all()
        self._map.rescale(1 / self._map.typical_depth(0))
        for view, tracks in self._waiting:
            known = self._map.landmarks.has_point[tracks.ids]
            fit = self._tracker.fit_pose(view, self._map, tracks.select(known),
                                         self._map.T_map_cam[0])
            if fit.count >= self.config.tracking.min_inliers:
                self._records[view.index] = self._measured(view, fit, False, 0.0)
        self._waiting.clear()

    def _close_loops(self) -> None:
        """Tie the newest keyframe to old ones; when the map is off, bend it back."""
        newest = len(self._map) - 1
        loop = find_loop(self._map, newest, self.config)
        if loop is None or self.poses == 'given':
            return
        self.stats.loops += 1
        if loop.shift_px > self.config.loops.correct_px:
            scale = correct(self._map, loop, with_scale=not self._is_metric)
            self._rescale_records(scale)
            self._map.tie(newest, loop.features, loop.landmarks)
            self._map.refine_all()
            self._reanchor()
        else:
            self._map.tie(newest, loop.features, loop.landmarks)
            self._map.refine_window()

    def _write_memory(self, window: int | None = None) -> None:
        """Hand keyframes to the memory once the window has left them behind."""
        done = len(self._map) - (self.config.refine.window if window is None else window)
        for id_ in range(self._written, done):
            if self.memory is not None:
                self.memory.write(self._map.exported(id_))
        self._written = max(self._written, done)

    def _settle(self, view: View, tracked: Tracked) -> Tracked:
        """Take over what refinement changed; the tracks of this keyframe are the new base."""
        table, tracks = self._map.landmarks, tracked.tracks
        ids = table.alias[tracks.ids]
        tracks = Tracks(tracks.gray, ids, tracks.px).select(table.alive[ids])
        self._base_px = np.full((len(table), 2), np.nan, np.float32)
        self._base_px[tracks.ids] = tracks.px
        self._base_count = len(tracks.ids)
        T_map_cam = self._map.T_map_cam[-1]
        self._tracker.corrected(tracks, T_map_cam)
        return replace(tracked, tracks=tracks, fit=replace(tracked.fit, T_map_cam=T_map_cam))

    @property
    def _is_metric(self) -> bool:
        return self.poses == 'given' or self._saw_depth

    def _sample_cloud(self, view: View) -> None:
        if view.depth is None:
            return
        step = self.config.cloud.stride_px
        v, u = np.mgrid[step // 2:view.depth.shape[0]:step, step // 2:view.depth.shape[1]:step]
        depth = view.depth[v, u].ravel()
        seen = depth > 0
        px = np.stack([u.ravel()[seen], v.ravel()[seen]], 1)
        keyframe = self._map.keyframes[-1]
        keyframe.cloud_cam = view.camera.unproject(px, depth[seen]).astype(np.float32)
        keyframe.cloud_rgb = view.image[px[:, 1], px[:, 0]]

    def _reanchor(self) -> None:
        if self.memory is not None:
            self.memory.reanchor(dict(enumerate(self._map.T_map_cam.copy())))

    # -- records ---------------------------------------------------------------------------

    def _record(self, view: View, tracked: Tracked | None, keep: bool,
                started: float) -> Estimate:
        latency_ms = (time.perf_counter() - started) * 1e3
        self.stats.frames += 1
        if tracked is None:
            waiting = not self._map.landmarks.has_point.any()
            status = Status.INITIALISING if waiting else Status.LOST
            reason = 'waiting for parallax' if waiting else 'no known place in view'
            record = FrameRecord(Estimate(view.stamp_ns, status, reason=reason,
                                          latency_ms=latency_ms, source=view.source))
            self.stats.lost += not waiting
        else:
            record = self._measured(view, tracked.fit, keep, latency_ms)
        self._records.append(record)
        self.status = record.estimate.status
        return record.estimate

    def _measured(self, view: View, fit: PoseFit, keep: bool, latency_ms: float) -> FrameRecord:
        count = fit.count
        score = count / max(len(fit.inliers), 1)
        sure = keep or (count >= 2 * self.config.tracking.min_inliers and score > 0.5)
        status = Status.TRACKING if sure else Status.UNCERTAIN
        newest = len(self._map) - 1
        estimate = Estimate(view.stamp_ns, status, fit.T_map_cam, fit.covariance, count, score,
                            latency_ms=latency_ms, is_keyframe=keep, source=view.source)
        return FrameRecord(estimate, newest,
                           inverse(self._map.T_map_cam[newest]) @ fit.T_map_cam)

    def _rescale_records(self, scale: np.ndarray) -> None:
        """Lengths around each keyframe [K] were multiplied by ``scale``."""
        for index, record in enumerate(self._records):
            if record.T_keyframe_cam is not None and record.keyframe < len(scale):
                T = record.T_keyframe_cam.copy()
                T[:3, 3] *= scale[record.keyframe]
                self._records[index] = replace(record, T_keyframe_cam=T)

    # -- results ---------------------------------------------------------------------------

    def finish(self) -> SceneMap:
        """Refine the whole map, write the rest of the memory, and return the result."""
        if self.poses == 'estimated':
            self._map.refine_all(refine_focal=self.camera_source != 'given')
        self._write_memory(window=0)
        self._reanchor()
        return SceneMap(tuple(self.keyframes), self.trajectory(), tuple(self.estimates),
                        self.cloud(), 1.0 if self._is_metric else None, self.scale_source,
                        self.camera_source)

    @property
    def camera(self) -> Camera | None:
        """The camera as the map knows it now; None before the first frame."""
        return self._camera

    @property
    def scale_source(self) -> str:
        """What the unit of the map rests on."""
        if self.poses == 'given':
            return 'given poses'
        return 'depth' if self._saw_depth else 'unknown'

    @property
    def keyframes(self) -> list[Keyframe]:
        """Keyframes with their present poses and points."""
        return [self._map.exported(id_) for id_ in range(len(self._map))]

    @property
    def estimates(self) -> list[Estimate]:
        """One estimate per processed frame, with poses as the map knows them now."""
        return [replace(r.estimate, T_map_cam=self._pose(r)) for r in self._records]

    def _pose(self, record: FrameRecord) -> np.ndarray | None:
        if record.T_keyframe_cam is None:
            return None
        return self._map.T_map_cam[record.keyframe] @ record.T_keyframe_cam

    def trajectory(self) -> Trajectory:
        """Poses of all frames that have one, as the map knows them now."""
        poses = [(r.estimate.stamp_ns, self._pose(r)) for r in self._records
                 if r.T_keyframe_cam is not None]
        if not poses:
            return Trajectory()
        return Trajectory(np.array([s for s, _ in poses], np.int64),
                          np.stack([T for _, T in poses]))

    def cloud(self) -> PointCloud:
        """Coloured points in the map frame: sensor depth of keyframes, else landmarks."""
        parts = [(transform_points(T, k.cloud_cam), k.cloud_rgb)
                 for k, T in zip(self._map.keyframes, self._map.T_map_cam, strict=True)]
        if not parts:
            return PointCloud()
        config = self.config.cloud
        return voxel_fused(np.concatenate([p for p, _ in parts]),
                           np.concatenate([c for _, c in parts]), config.voxel_m,
                           config.max_points)


def _no_tracks(view: View) -> Tracks:
    return Tracks(view.gray, np.zeros(0, int), np.zeros((0, 2), np.float32))


def _unposed(estimate: Estimate) -> Estimate:
    """The estimate of a frame whose map was given up before it had depth."""
    return replace(estimate, status=Status.INITIALISING, T_map_cam=None, covariance=None,
                   reason='waiting for parallax', is_keyframe=False)


def _exact(T_map_cam: np.ndarray, inliers: int) -> PoseFit:
    """A pose that is given or defines the map frame."""
    return PoseFit(T_map_cam, np.diag(FLOOR_STD**2), np.ones(inliers, bool), np.zeros(inliers))
