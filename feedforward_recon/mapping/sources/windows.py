"""``WindowedReconstructor``: a feed-forward network maps a walk window by window.

    frames -> window with a few anchors -> predict -> Procrustes from the anchors to the map
           -> poses and depth -> the online mapper with poses given -> refine -> SceneMap

Every window comes back in a frame and a unit of its own. Its anchors, images that are mapped
already (``anchors.Album``), are predicted again; the similarity that brings their points onto
the map carries the other images along. From there on the frames take the way of any frame whose
pose and depth are known, so that keyframes, cloud, memory and files are those of the online
mapper.

Without sensor depth the first camera is the origin, the median depth of its window is one
unit, and ``metres_per_unit`` is None.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.geometry.align import Alignment
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.mapping.mapper import Memory
from feedforward_recon.mapping.scene_map import SceneMap, Stats
from feedforward_recon.mapping.sources.anchors import Album, Anchors
from feedforward_recon.mapping.sources.posed import PosedMapper
from feedforward_recon.mapping.sources.window_geometry import (
    agreement,
    aligned,
    depth_ratio,
    misfit,
    moved,
    pose_spread,
    scaling,
    selected,
    typical_depth,
)
from feedforward_recon.mapping.sources.window_parts import Placed, Placement, Window
from feedforward_recon.model import Encoder, Predictor
from feedforward_recon.types import Estimate, Frame, Prediction, Status

log = logging.getLogger(__name__)
SURE_SCORE = 0.5
MAX_MISFIT = 0.15  # of the typical depth: beyond, the anchors were not recognised
UNSURE_SHARE = 0.2  # of the depth of an image, the least certain, that is not used
# An image's depths are wrong together: a few hundred of them say hardly more than one.
DEPTH_NOISE_FACTOR = 20
DEPTH_NOISE_FLOOR = 0.004
WIDE = 5.0  # gates before refinement, as a multiple of those of tracking


class WindowedReconstructor:
    """Maps frames with a predictor of many images.

    memory: gets the keyframes as in ``OnlineReconstructor``, so that a map is localised against
    in the same way whatever made it. refine: bundle adjustment of the finished map, which
    needs ``look_again`` after it. On walks through synthetic rooms, poses that are off by 1 cm
    and 0.6 degrees with 2 % of depth end within 0.9 cm instead of 2.0 cm, half as good ones
    within 0.7 instead of 0.6 cm, exact ones also within 0.7 cm.
    """

    def __init__(self, config: MapperConfig, predictor: Predictor, encoder: Encoder,
                 memory: Memory | None = None, *, windows: WindowConfig | None = None,
                 refine: bool = True) -> None:
        self.config, self.predictor, self.encoder, self.memory = (config, predictor, encoder,
                                                                  memory)
        self.windows, self.refine = windows or WindowConfig(), refine
        self._relocalise: Callable[[Frame], Estimate] | None = None
        self.metric, self.camera_source = False, 'given'
        self._pending: list[Frame] = []
        self._placements: list[Placement | None] = []
        self._early: list[Estimate] = []
        self._album = Album()
        self._camera: Camera | None = None
        self._size_hw: tuple[int, ...] | None = None
        self._depth_noise = 0.0
        self._mapper: PosedMapper | None = None

    def add(self, frame: Frame) -> None:
        """Take in a frame; a full window is mapped at once.

        Raises InputError for an image that cannot be used, and when not even two images fit
        the device.
        """
        self._check_size(frame)
        self._pending.append(frame)
        self._advance(everything=False)

    def _check_size(self, frame: Frame) -> None:
        shape = frame.image.shape
        if self._size_hw is not None and shape[:2] != self._size_hw:
            raise InputError(f'expected images of {self._size_hw[1]}x{self._size_hw[0]} as '
                             f'before, found {shape[1]}x{shape[0]} in {frame.source}; start a '
                             'new map for another camera')
        self._size_hw = shape[:2]

    def finish(self) -> SceneMap:
        """Map what is left, refine, write the rest of the memory, and return the result."""
        self._advance(everything=True)
        mapper = self._mapper
        if mapper is None:
            return self.scene_map()
        if self.refine:
            mapper.release(self._settings(wide=False))
        mapper.finish()
        return self.scene_map()

    def look_again(self, frames: Iterable[Frame]) -> SceneMap:
        """Place frames in the finished map by their features; ``frames`` are all, in order.

        Those that were lost, and after a refinement all that are no keyframes: the network's
        poses of these have not been refined.
        """
        mapper, early = self._mapper, len(self._early)
        if mapper is None:
            return self.scene_map()
        wanted = {early + index for index, estimate in enumerate(mapper.estimates)
                  if not estimate.status.has_pose or (self.refine and not estimate.is_keyframe)}
        for index, frame in enumerate(frames if wanted else ()):
            if index in wanted:
                depth = frame.depth if self.metric else None
                camera = frame.camera or self._camera
                before = mapper.estimates[index - early]
                found = mapper.revisit(index - early, replace(frame, depth=depth, camera=camera))
                if found is not before and found.T_map_cam is not None:
                    self._placements[index - early] = Placement(
                        found.T_map_cam, found.covariance, found.score)
        return self.scene_map()

    def scene_map(self) -> SceneMap:
        """The result so far."""
        if self._mapper is None:
            return SceneMap(estimates=tuple(self.estimates))
        return replace(self._mapper.scene_map(), estimates=tuple(self.estimates),
                       metres_per_unit=1.0 if self.metric else None,
                       scale_source='depth' if self.metric else 'unknown',
                       camera_source=self.camera_source, frame='first camera')

    # -- windows ---------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        """New images that a window holds beside its anchors."""
        return self.windows.size - min(self.windows.anchors, len(self._album))

    def _advance(self, *, everything: bool) -> None:
        while self._pending and (everything or len(self._pending) >= self._room):
            window = self._next_window()
            try:
                prediction = self._predict(window)
            except MemoryError:
                self._shrink()
                continue
            placed = self._placed(window, prediction)
            self._pending = self._pending[len(placed):]
            for one in placed:
                self._hand_on(one)

    def _next_window(self) -> Window:
        """The oldest images that wait, and what ties them to the map."""
        frames = self._pending[:self._room]
        if self._mapper is None or not len(self._album):
            return Window(frames)
        looks = (self.encoder.encode(frame.image).global_descriptor
                 for frame in (frames[0], frames[len(frames) // 2], frames[-1]))
        return Window(frames, self._album.chosen(self.windows.anchors, looks, self._mapper.pose))

    def _predict(self, window: Window) -> Prediction:
        known = () if window.anchors is None else window.anchors.images
        return self.predictor.predict([*known, *(frame.image for frame in window.frames)])[0]

    def _shrink(self) -> None:
        """The device is too small for a window: go on with half of it."""
        if self.windows.size == 2:
            raise InputError('expected enough memory for two images at once, found less; use '
                             'smaller images, another device or a smaller model')
        self.windows = self.windows.halved()
        log.warning('out of memory: going on with windows of %d images, %d of them anchors',
                    self.windows.size, self.windows.anchors)

    def _placed(self, window: Window, prediction: Prediction) -> list[Placed]:
        """The frames of a predicted window with their places in the map.

        Without the last ones if only they are not tied to the others: in the next window they
        have nearer anchors, and another chance.
        """
        anchors, frames = window.anchors, window.frames
        count = 0 if anchors is None else len(anchors)
        metres = depth_ratio(prediction, [*[None] * count, *(frame.depth for frame in frames)])
        if anchors is None:
            self.metric = metres is not None
        found = agreement(prediction)
        member = found.members(count)
        fit = self._fit(window, prediction, member, metres)
        if fit is None or not member[count:].any():
            return [Placed(frame, None, Placement(reason='no overlap with the map'))
                    for frame in frames]
        prediction = moved(prediction, fit)
        variance = self._variance(anchors, prediction, found.error)
        if anchors is None:
            self._start(frames[0], prediction, float(np.median(found.error[member])))
        self._album.begin(anchors)
        end = int(np.flatnonzero(member)[-1]) + 1
        return [self._place(frame, selected(prediction, slice(i, i + 1)), bool(member[i]),
                            float(found.score[i]), variance)
                for i, frame in enumerate(frames[:end - count], count)]

    def _fit(self, window: Window, prediction: Prediction, member: np.ndarray,
             metres: float | None) -> Alignment | None:
        """From the window to the map; None when the anchors do not fit."""
        anchors = window.anchors
        if not self.metric:
            metres = None
        if anchors is None:
            root = int(np.argmax(member))
            scale = metres or 1 / typical_depth(selected(prediction, member))
            T_root_world = inverse(prediction.T_world_cam[root])
            T_root_world[:3, 3] *= scale
            return Alignment(self._first_pose(window.frames[root]) @ T_root_world, scale,
                             np.ones(0), np.zeros(0))
        again = selected(prediction, slice(0, len(anchors)))
        if metres is not None:
            again = moved(again, scaling(metres))
        tied = member[:len(anchors)]
        worst = 0.0
        for part in _parts(tied, anchors.recent):
            try:
                fit = aligned(selected(again, part), anchors.T_map_cam[part],
                              anchors.select(part).samples, with_scale=metres is None)
            except DegenerateError as problem:
                log.info('anchors of a window do not determine its place: %s', problem)
                continue
            off = misfit(fit, anchors.select(part).samples)
            if off <= MAX_MISFIT:
                return replace(fit, scale=fit.scale * (metres or 1.0))
            worst = max(worst, off)
        log.warning('a window of %d images was lost: its anchors miss the map by %.0f %% of '
                    'their depth', len(prediction), 100 * worst)
        return None

    @staticmethod
    def _variance(anchors: Anchors | None, prediction: Prediction, error: np.ndarray
                  ) -> tuple[float, float]:
        """Variances of position and angle: what windows disagree by, added up along the walk.

        Within a window, which is a prediction in the map, points of one place differ by
        ``error`` [N] of their depth, and a whole image may be off by as much.
        """
        relative = float(np.median(error))
        own = (relative * typical_depth(prediction))**2, relative**2
        if anchors is None:
            return own
        apart = pose_spread(prediction.T_world_cam[:len(anchors)], anchors.T_map_cam)
        return (anchors.variance[0] + max(apart[0]**2, own[0] / 4),
                anchors.variance[1] + max(apart[1]**2, own[1] / 4))

    # -- the map ---------------------------------------------------------------------------

    def _start(self, frame: Frame, prediction: Prediction, noise: float) -> None:
        """The first window decides on the camera and on how far depth is to be trusted."""
        size_wh = (frame.image.shape[1], frame.image.shape[0])
        self._camera = frame.camera
        self.camera_source = 'given' if frame.camera else 'predicted'
        if frame.camera is None:
            self._camera = Camera.from_matrix(np.median(prediction.K, 0), size_wh)
            log.warning('no camera calibration: taking the focal length of %.0f px that the '
                        'network sees', self._camera.fx)
        elif frame.camera.is_distorted:
            log.warning('the network takes images for pinhole images, these are distorted: '
                        'rectify them if poses are off near the borders')
        self._depth_noise = DEPTH_NOISE_FACTOR * max(noise, DEPTH_NOISE_FLOOR)
        self._mapper = PosedMapper(self._settings(wide=self.refine), self.encoder, self.memory,
                                   relocalise=self._relocalise, exact=self._settings(wide=False))

    def _settings(self, *, wide: bool) -> MapperConfig:
        """Settings of the mapper; wide: gates for poses that have yet to be refined."""
        tracking, refine, cloud = self.config.tracking, self.config.refine, self.config.cloud
        if wide:
            tracking = replace(tracking, outlier_px=WIDE * tracking.outlier_px)
            refine = replace(refine, robust_px=WIDE * refine.robust_px)
        if not self.metric:
            tracking = replace(tracking, depth_noise=self._depth_noise)
            cloud = replace(cloud, voxel_m=cloud.voxel_m / 2)
        return replace(self.config, tracking=tracking, refine=refine, cloud=cloud)

    @staticmethod
    def _place(frame: Frame, prediction: Prediction, shown: bool, score: float,
               variance: tuple[float, float]) -> Placed:
        """A frame that a window shows, or lists without being tied to the map."""
        if not shown:
            return Placed(frame, prediction, Placement(reason='no overlap with the map'))
        covariance = np.diag(np.repeat(variance, 3))
        return Placed(frame, prediction, Placement(prediction.T_world_cam[0], covariance, score))

    def _hand_on(self, placed: Placed) -> Estimate:
        """One frame to the mapper, with the pose and the depth that the window gave it.

        A frame that has a pose may be an anchor of the next window.
        """
        frame, placement, mapper = placed.frame, placed.placement, self._mapper
        if mapper is None:
            self._early.append(Estimate(frame.stamp_ns, Status.INITIALISING, source=frame.source,
                                        reason='waiting for views that overlap'))
            return self._early[-1]
        depth = None if placed.prediction is None else self._depth(frame, placed.prediction)
        camera = frame.camera or self._camera
        self._placements.append(placement)
        estimate = mapper.process(replace(frame, T_map_cam=placement.T_map_cam, depth=depth,
                                          camera=camera))
        if placement.covariance is not None and placed.prediction is not None:
            variance = (placement.covariance[0, 0], placement.covariance[3, 3])
            self._album.add(len(self._placements) - 1, frame.image, placed.prediction, variance,
                            mapper.newest_look())
        return self._told(estimate, placement, first=len(self._placements) == 1)

    def _first_pose(self, frame: Frame) -> np.ndarray:
        """Where the camera of the frame is that starts the map: in the origin."""
        return np.eye(4)

    def _depth(self, frame: Frame, prediction: Prediction) -> np.ndarray:
        """Sensor depth of a metric map, or what the network is surest of."""
        if self.metric and frame.depth is not None and (frame.depth > 0).any():
            return frame.depth
        depth, confidence = prediction.depth[0], prediction.confidence[0]
        known = depth > 0
        if not known.any():
            return depth
        return np.where(known & (confidence >= np.quantile(confidence[known], UNSURE_SHARE)),
                        depth, 0).astype(np.float32)

    # -- results ---------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counts of the run."""
        stats = Stats() if self._mapper is None else replace(self._mapper.stats)
        stats.frames += len(self._early)
        return stats

    @property
    def estimates(self) -> list[Estimate]:
        """One estimate per frame that was mapped, with poses as the map knows them now."""
        if self._mapper is None:
            return list(self._early)
        late = zip(self._mapper.estimates, self._placements, strict=True)
        return self._early + [self._told(*pair, first=index == 0)
                              for index, pair in enumerate(late)]

    def _told(self, estimate: Estimate, placement: Placement | None, *, first: bool) -> Estimate:
        """What the mapper knows of a frame, with the doubts of the window it came from."""
        if placement is None:
            return estimate
        if estimate.T_map_cam is None:
            return replace(estimate, reason=placement.reason or estimate.reason)
        # Optical flow is another witness: few tracks agree with a pose that is off.
        followed = first or estimate.inliers >= self.config.tracking.min_inliers
        sure = placement.score >= SURE_SCORE and followed
        return replace(estimate, status=Status.TRACKING if sure else Status.UNCERTAIN,
                       covariance=placement.covariance, score=placement.score)


def _parts(tied: np.ndarray, recent: np.ndarray) -> list[np.ndarray]:
    """Which anchors to trust, in turn: all that show the same place, the newest, the old."""
    parts = [tied, tied & recent, tied & ~recent]
    return [part for part in parts if part.any()] if parts[1].any() and parts[2].any() \
        else parts[:1]
