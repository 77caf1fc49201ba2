"""``WindowPlacement``: where a predicted window belongs in the map.

Every window comes back in a frame and a unit of its own. Its anchors, images that are mapped
already, are predicted again; the similarity transform that aligns their points with the map
(Procrustes; Umeyama 1991) also places the other views. The first window starts the map: it
decides on the unit, on the camera, and on the noise of the network's depth.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.align import Alignment
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.preparation import usable_depth
from feedforward_recon.mapping.sources.anchors import AnchorImages, Anchors
from feedforward_recon.mapping.sources.window import PlacedView, WaitingView, Window
from feedforward_recon.mapping.sources.window_geometry import (
    agreement,
    alignments,
    depth_ratio,
    moved,
    pose_spread,
    residual,
    scaling,
    selected,
    typical_depth,
)
from feedforward_recon.types import Prediction

log = logging.getLogger(__name__)
# Median distance after alignment, as a share of the typical depth: beyond, the network did not
# recognise the anchors; chosen by hand.
MAX_RESIDUAL = 0.15
# Share of the depth of an image, the least confident, that is not used: sky, edges, reflections;
# chosen by hand.
UNSURE_SHARE = 0.2
# Depth errors of one image are correlated: 20^2 of them, as many as landmarks are tracked, say
# hardly more than one. So the noise of each is taken for 20 times what it is; chosen by hand.
DEPTH_NOISE_FACTOR = 20
DEPTH_NOISE_FLOOR = 0.004  # a network is taken to be no better than a depth camera at 1 m
# Gates before refinement, times those of tracking: 15 px, the size of errors of degrees; see
# docs/experiments.md, Following a camera between windows.
WIDE = 5.0
NO_OVERLAP = 'no overlap with the map'


class WindowPlacement:
    """Aligns predicted windows with the map, and keeps the anchors of the next ones.

    refine: the map will be refined, so gates are wide until then.
    metric: sensor depth gives the unit; decided by the first window. camera: what the network
    predicts, None where cameras are given.
    """

    def __init__(self, config: MapperConfig, *, refine: bool) -> None:
        self.anchors = AnchorImages()
        self.metric, self.started = False, False
        self.camera: Camera | None = None
        self.frame = 'first camera'
        self._config, self._refine = config, refine
        self._depth_noise = 0.0

    def place(self, window: Window, prediction: Prediction) -> list[PlacedView]:
        """The views of a predicted window with their places in the map.

        Without the last ones if only they do not overlap with the others: the next window has
        nearer anchors for them.
        """
        anchors, views = window.anchors, [waiting.view for waiting in window.views]
        count = 0 if anchors is None else len(anchors)
        metres = depth_ratio(prediction, [*[None] * count, *(view.depth for view in views)])
        if anchors is None:
            self.metric = metres is not None
            if any(view.stereo is not None for view in views):
                log.warning('right images are not used with a feed-forward network; the map has a '
                            'unit of its own')
        found = agreement(prediction)
        member = found.members(count)
        fit = self._fit(window, prediction, member, metres)
        if fit is None or not member[count:].any():
            return [PlacedView(view, reason=NO_OVERLAP) for view in views]
        prediction = moved(prediction, fit)
        variance = self._variance(anchors, prediction, found.error)
        if anchors is None:
            self._start(window.views[int(np.argmax(member))], views[0], prediction,
                        float(np.median(found.error[member])))
        self.anchors.begin(anchors)
        end = int(np.flatnonzero(member)[-1]) + 1
        return [_placed(view, selected(prediction, slice(i, i + 1)), bool(member[i]),
                        float(found.score[i]), variance)
                for i, view in enumerate(views[:end - count], count)]

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
            return Alignment(window.views[root].T_map_first @ T_root_world, scale,
                             np.ones(0), np.zeros(0))
        again = selected(prediction, slice(0, len(anchors)))
        if metres is not None:
            again = moved(again, scaling(metres))
        usable = member[:len(anchors)]
        worst = 0.0
        for part in _parts(usable, anchors.recent):
            target = anchors.select(part).samples
            try:
                for fit in alignments(selected(again, part), anchors.T_map_cam[part], target,
                                      with_scale=metres is None):
                    off = residual(fit, target)
                    if off <= MAX_RESIDUAL:
                        return replace(fit, scale=fit.scale * (metres or 1.0))
                    worst = max(worst, off)
            except DegenerateError as problem:
                log.info('anchors of a window do not determine its place: %s', problem)
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

    def _start(self, root: WaitingView, first: View, prediction: Prediction, noise: float) -> None:
        """The first window decides on the camera and on the noise of depth."""
        at_first_camera = np.array_equal(root.T_map_first, np.eye(4))
        self.frame = 'first camera' if at_first_camera else 'z up'
        if not first.knows_camera:
            self.camera = Camera.from_matrix(np.median(prediction.K, 0), first.camera.size_wh)
            log.warning('no camera calibration: taking the focal length of %.0f px that the '
                        'network sees', self.camera.fx)
        elif first.camera.is_distorted:
            log.warning('the network takes images for pinhole images, these are distorted: '
                        'rectify them if poses are off near the borders')
        self._depth_noise = DEPTH_NOISE_FACTOR * max(noise, DEPTH_NOISE_FLOOR)
        self.started = True

    def settings(self, *, wide: bool) -> MapperConfig:
        """Settings of the mapper; wide: gates for poses that have yet to be refined.

        Errors of degrees are many pixels: gates that suit tracking would take inliers for
        outliers.
        """
        tracking, refine, cloud = self._config.tracking, self._config.refine, self._config.cloud
        if wide:
            tracking = replace(tracking, outlier_px=WIDE * tracking.outlier_px)
            refine = replace(refine, robust_px=WIDE * refine.robust_px)
        if not self.metric:
            tracking = replace(tracking, depth_noise=self._depth_noise)
            cloud = replace(cloud, voxel_m=cloud.voxel_m / 2)
        return replace(self._config, tracking=tracking, refine=refine, cloud=cloud)

    @property
    def mapping_settings(self) -> MapperConfig:
        """Settings while windows are mapped."""
        return self.settings(wide=self._refine)

    @property
    def final_settings(self) -> list[MapperConfig]:
        """Of the bundle adjustments of the finished map, first with wide gates."""
        return [self.settings(wide=True), self.settings(wide=False)] if self._refine else []

    def with_known_camera(self, view: View) -> View:
        """The view with its own camera, or with that of the map."""
        return view if view.knows_camera or self.camera is None \
            else replace(view, camera=self.camera)

    def as_seen(self, view: View) -> View:
        """The view with the camera of the map, and with depth only in a metric one.

        A window takes its unit from depth images alone, so the right image is left out.
        """
        view = replace(self.with_known_camera(view), stereo=None)
        return view if self.metric else replace(view, depth=None)

    def posed(self, placed: PlacedView) -> View:
        """A placed view as one with a given pose, and with depth."""
        depth = self._depth(placed)
        return replace(self.with_known_camera(placed.view), T_given=placed.T_map_cam,
                       depth=None if depth is None else usable_depth(depth, self._config.tracking),
                       needs_depth=True, stereo=None)

    def _depth(self, placed: PlacedView) -> np.ndarray | None:
        """Sensor depth [H, W] of a metric map, else the predicted depth of higher confidence."""
        if self.metric and placed.view.depth is not None:
            return placed.view.depth
        if placed.prediction is None:
            return None
        depth, confidence = placed.prediction.depth[0], placed.prediction.confidence[0]
        known = depth > 0
        if not known.any():
            return depth
        return np.where(known & (confidence >= np.quantile(confidence[known], UNSURE_SHARE)),
                        depth, 0).astype(np.float32)


def _placed(view: View, prediction: Prediction, shown: bool, score: float,
            variance: tuple[float, float]) -> PlacedView:
    """A view with its place in the map; without one where ``shown`` is False."""
    if not shown:
        return PlacedView(view, prediction, reason=NO_OVERLAP)
    return PlacedView(view, prediction, prediction.T_world_cam[0],
                      np.diag(np.repeat(variance, 3)), score)


def _parts(usable: np.ndarray, recent: np.ndarray) -> list[np.ndarray]:
    """Masks of anchors to align with, in turn: all that overlap, the newest, the old."""
    parts = [usable, usable & recent, usable & ~recent]
    return [part for part in parts if part.any()] if parts[1].any() and parts[2].any() \
        else parts[:1]
