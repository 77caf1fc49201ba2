"""``WindowedReconstructor``: a feed-forward network maps a walk window by window.

    frames -> window with a few anchors -> predict -> Procrustes from the anchors to the map
           -> poses and depth -> the online mapper with poses given -> refine -> SceneMap

Every window comes back in a frame and a unit of its own. Its anchors, images that are mapped
already, are predicted again; the similarity that brings their points onto the map carries the
other images along. From there on the frames take the way of any frame whose pose and depth
are known, so that keyframes, cloud, memory and files are those of the online mapper.

Without sensor depth the first camera is the origin, the median depth of its window is one
unit, and ``metres_per_unit`` is None.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.config import MapperConfig
from feedforward_recon.errors import ConfigError, DegenerateError, InputError
from feedforward_recon.geometry.align import Alignment
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.mapping.online import Memory
from feedforward_recon.mapping.posed import PosedMapper
from feedforward_recon.mapping.scene_map import SceneMap, Stats
from feedforward_recon.mapping.window_geometry import (
    Mapped,
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


@dataclass(frozen=True)
class WindowConfig:
    """size: images predicted together; anchors: how many of them are mapped already."""

    size: int = 32
    anchors: int = 4

    def __post_init__(self) -> None:
        """Refuse windows that could not be tied to each other."""
        if self.size < 2 or not 1 <= self.anchors < self.size:
            raise ConfigError('expected windows of at least 2 images with 1 or more anchors and '
                              f'at least one new image, found {self.size} images with '
                              f'{self.anchors} anchors; choose larger windows')

    def halved(self) -> WindowConfig:
        """Windows for half as much memory."""
        size = max(2, self.size // 2)
        return WindowConfig(size, max(1, min(self.anchors, size // 2)))


@dataclass(frozen=True)
class Placement:
    """One frame as a window places it; T_map_cam is None when nothing ties it to the map."""

    T_map_cam: np.ndarray | None = None
    covariance: np.ndarray | None = None
    score: float = 0.0
    reason: str = ''


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
        self.metric, self.camera_source = False, 'given'
        self._pending: list[Frame] = []
        self._placements: list[Placement] = []
        self._early: list[Estimate] = []
        self._mapped: Mapped | None = None
        self._camera: Camera | None = None
        self._size_hw: tuple[int, ...] | None = None
        self._depth_noise = 0.0
        self._mapper: PosedMapper | None = None

    def add(self, frame: Frame) -> None:
        """Take in a frame; a full window is mapped at once.

        Raises InputError for an image that cannot be used, MemoryError when not even two
        images fit the device.
        """
        shape = frame.image.shape
        if self._size_hw is not None and shape[:2] != self._size_hw:
            raise InputError(f'expected images of {self._size_hw[1]}x{self._size_hw[0]} as '
                             f'before, found {shape[1]}x{shape[0]} in {frame.source}; start a '
                             'new map for another camera')
        self._size_hw = shape[:2]
        self._pending.append(frame)
        self._advance(everything=False)

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

    def _advance(self, *, everything: bool) -> None:
        while self._pending:
            anchors = None if self._mapped is None else self._mapped.chosen(self.windows.anchors)
            room = self.windows.size - (0 if anchors is None else len(anchors.images))
            if len(self._pending) < room and not everything:
                return
            frames = self._pending[:room]
            try:
                prediction = self._predict(anchors, frames)
            except MemoryError:
                self._shrink()
                continue
            self._pending = self._pending[len(frames):]
            self._take(anchors, frames, prediction)

    def _predict(self, anchors: Mapped | None, frames: Sequence[Frame]) -> Prediction:
        known = () if anchors is None else anchors.images
        return self.predictor.predict([*known, *(frame.image for frame in frames)])[0]

    def _shrink(self) -> None:
        """The device is too small for a window: go on with half of it."""
        if self.windows.size == 2:
            raise InputError('expected enough memory for two images at once, found less; use '
                             'smaller images, another --device or a smaller model')
        self.windows = self.windows.halved()
        log.warning('out of memory: going on with windows of %d images, %d of them anchors',
                    self.windows.size, self.windows.anchors)

    def _take(self, anchors: Mapped | None, frames: list[Frame],
              prediction: Prediction) -> None:
        """Place a predicted window in the map and hand its frames on."""
        sensor = [None] * (len(prediction) - len(frames)) + [frame.depth for frame in frames]
        metres = depth_ratio(prediction, sensor)
        if anchors is None:
            self.metric = metres is not None
        found = agreement(prediction)
        count = len(prediction) - len(frames)
        group = found.groups
        member = np.isin(group, group[:count]) if count else _largest(group)
        fit = self._fit(anchors, prediction, member, metres)
        if fit is None or not member[count:].any():
            for frame in frames:
                self._hand_on(frame, None, Placement(reason='no overlap with the map'))
            return
        prediction = moved(prediction, fit)
        variance = self._variance(anchors, selected(prediction, slice(0, count)), found.error,
                                  typical_depth(prediction))
        if anchors is None:
            self._start(frames[0], prediction, float(np.median(found.error[member])))
        self._place(anchors, frames, selected(prediction, slice(count, None)), member[count:],
                    found.score[count:], variance)

    def _fit(self, anchors: Mapped | None, prediction: Prediction, member: np.ndarray,
             metres: float | None) -> Alignment | None:
        """From the window to the map; None when the anchors do not fit."""
        if not self.metric:
            metres = None
        if anchors is None:
            root = int(np.argmax(member))
            scale = metres or 1 / typical_depth(selected(prediction, member))
            T = inverse(prediction.T_world_cam[root])
            T[:3, 3] *= scale
            return Alignment(T, scale, np.ones(0), np.zeros(0))
        again = selected(prediction, slice(0, len(anchors.images)))
        if metres is not None:
            again = moved(again, scaling(metres))
        try:
            fit = aligned(again, anchors.prediction, with_scale=metres is None)
        except DegenerateError as problem:
            log.warning('a window of %d images was lost: %s', len(prediction), problem)
            return None
        if misfit(fit, anchors.prediction) > MAX_MISFIT:
            log.warning('a window of %d images was lost: its anchors miss the map by %.0f %% of '
                        'their depth', len(prediction), 100 * misfit(fit, anchors.prediction))
            return None
        return replace(fit, scale=fit.scale * (metres or 1.0))

    @staticmethod
    def _variance(anchors: Mapped | None, again: Prediction, error: np.ndarray,
                  depth: float) -> tuple[float, float]:
        """Variances of position and angle: what windows disagree by, added up along the walk.

        Within a window, points of one place differ by ``error`` [N] of their depth, and a whole
        image may be off by as much.
        """
        relative = float(np.median(error))
        own = (relative * depth)**2, relative**2
        if anchors is None:
            return own
        apart = pose_spread(again, anchors.prediction)
        return (anchors.variance[0] + max(apart[0]**2, own[0] / 4),
                anchors.variance[1] + max(apart[1]**2, own[1] / 4))

    # -- the map ---------------------------------------------------------------------------

    def _start(self, frame: Frame, prediction: Prediction, noise: float) -> None:
        """The first window decides on the camera and on how far depth is to be trusted."""
        size_wh = (frame.image.shape[1], frame.image.shape[0])
        self._camera = frame.camera
        if frame.camera is None:
            self.camera_source = 'predicted'
            self._camera = Camera.from_matrix(np.median(prediction.K, 0), size_wh)
            log.warning('no camera calibration: taking the focal length of %.0f px that the '
                        'network sees', self._camera.fx)
        elif frame.camera.is_distorted:
            log.warning('the network takes images for pinhole images, these are distorted: '
                        'rectify them if poses are off near the borders')
        self._depth_noise = DEPTH_NOISE_FACTOR * max(noise, DEPTH_NOISE_FLOOR)
        self._mapper = PosedMapper(self._settings(wide=self.refine), self.encoder, self.memory,
                                   poses='given')

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

    def _place(self, anchors: Mapped | None, frames: list[Frame], prediction: Prediction,
               member: np.ndarray, score: np.ndarray, variance: tuple[float, float]) -> None:
        """Hand on the frames that a window shows, and keep them as anchors of the next."""
        covariance = np.diag(np.repeat(variance, 3))
        for index, frame in enumerate(frames):
            if member[index]:
                T = prediction.T_world_cam[index]
                placement = Placement(T, covariance, float(score[index]))
            else:
                placement = Placement(reason='no overlap with the map')
            self._hand_on(frame, selected(prediction, slice(index, index + 1)), placement)
        chosen = np.flatnonzero(member)
        self._mapped = Mapped(tuple(frames[i].image for i in chosen),
                              selected(prediction, chosen), variance).after(anchors)

    def _hand_on(self, frame: Frame, prediction: Prediction | None, placement: Placement) -> None:
        """One frame to the mapper, with the pose and the depth that the window gave it."""
        if self._mapper is None:
            self._early.append(Estimate(frame.stamp_ns, Status.INITIALISING, source=frame.source,
                                        reason='waiting for views that overlap'))
            return
        depth = None if prediction is None else self._depth(frame, prediction)
        camera = frame.camera or self._camera
        self._placements.append(placement)
        self._mapper.process(replace(frame, T_map_cam=placement.T_map_cam, depth=depth,
                                     camera=camera))

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

    def _told(self, estimate: Estimate, placement: Placement, *, first: bool) -> Estimate:
        """What the mapper knows of a frame, with the doubts of the window it came from."""
        if estimate.T_map_cam is None:
            return replace(estimate, reason=placement.reason or estimate.reason)
        # Optical flow is another witness: few tracks agree with a pose that is off.
        followed = first or estimate.inliers >= self.config.tracking.min_inliers
        sure = placement.score >= SURE_SCORE and followed
        return replace(estimate, status=Status.TRACKING if sure else Status.UNCERTAIN,
                       covariance=placement.covariance, score=placement.score)


def _largest(group: np.ndarray) -> np.ndarray:
    """Members [N] of the group with the most images; of one image only if it is alone."""
    sizes = np.bincount(group)
    return (group == sizes.argmax()) & (sizes.max() > min(1, len(group) - 1))
